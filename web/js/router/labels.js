/**
 * What to call the mixer's sliders.
 * @param {string[]} widgets names, of which the sliders are "style_1", "style_2", ...
 * @param {string[]} styles the adapter's names of its styles; empty where no adapter is connected
 * @returns {Map<string, string>} slider -> label; sliders beyond the adapter's styles say that they do nothing
 */
export function labels(widgets, styles) {
  const found = new Map();
  for (const widget of widgets) {
    const number = /^style_(\d+)$/.exec(widget)?.[1];
    if (!number) continue;
    const name = styles[Number(number) - 1];
    if (styles.length === 0) found.set(widget, widget);
    else if (name === undefined) found.set(widget, `${number}: –`);
    else found.set(widget, name === `style ${number}` ? name : `${number}: ${name}`);
  }
  return found;
}
