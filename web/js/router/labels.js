/**
 * @typedef {object} Slider
 * @property {string} label what to call it
 * @property {"shown" | "hidden" | "asked"} when whether it is shown: "asked" with a node's advanced inputs
 */

const FEW = 4; // sliders of a mixer that does not know its adapter; as in nodes/router/control.py

/**
 * What the mixer's sliders are called, and which are there.
 * @param {{name: string, value?: unknown}[]} widgets of which the sliders are "style_1", "style_2", ...
 * @param {string[]} styles the adapter's names of its styles; empty where no adapter is connected
 * @returns {Map<string, Slider>} by the widget's name. Sliders beyond the adapter's styles do nothing: they are hidden, but
 *   for those that are not at 0, which are an error until they are
 */
export function sliders(widgets, styles) {
  const found = new Map();
  for (const { name: widget, value } of widgets) {
    const number = Number(/^style_(\d+)$/.exec(widget)?.[1] ?? NaN);
    if (Number.isNaN(number)) continue;
    const name = styles[number - 1];
    const set = Number(value ?? 0) > 0;
    if (styles.length === 0) found.set(widget, { label: widget, when: set || number <= FEW ? "shown" : "asked" });
    else if (name === undefined) found.set(widget, { label: `${number}: –`, when: set ? "shown" : "hidden" });
    else found.set(widget, { label: name === `style ${number}` ? name : `${number}: ${name}`, when: "shown" });
  }
  return found;
}
