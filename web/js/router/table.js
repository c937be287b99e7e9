/** From a run to the numbers of one picture. */

/** @typedef {import("./runs.js").Run} Run */

/**
 * What to show: "styles" has a row per style, the mean over layers; "decided" a row per layer, 0 where all styles have
 * equal shares, 1 where one has all; a number a row per layer, the probability of the style of that index.
 * @typedef {"styles" | "decided" | number} View
 */

/**
 * Rows and the steps from 0; `values` holds (rows, steps), NaN where there is none, between `least` and `most`.
 * @typedef {object} Table
 * @property {string[]} rows what to call each
 * @property {string[]} blocks what to call the part of the model that each is in; of styles, they themselves
 * @property {number} steps
 * @property {Float32Array} values
 * @property {number} least
 * @property {number} most
 */

/**
 * @param {Run} run
 * @param {View} view
 * @param {string} role
 * @param {number[]} layers indices of those that take part
 * @returns {Table}
 */
export function makeTable(run, view, role, layers) {
  const byStyle = view === "styles";
  const rows = byStyle ? run.styles : layers.map((index) => run.labels[index]);
  const blocks = byStyle ? rows : layers.map((index) => run.blocks[index]);
  const values = new Float32Array(rows.length * run.steps).fill(NaN);
  for (const step of run.columns.keys()) {
    if (step >= run.steps) continue;
    for (let row = 0; row < rows.length; row++) {
      values[row * run.steps + step] = byStyle
        ? mean(layers.map((layer) => run.value(step, role, layer, row)))
        : layerValue(run, view, step, role, layers[row]);
    }
  }
  const most = view === "decided" ? 1 : roundUp(values);
  return { rows, blocks, steps: run.steps, values, ...(byStyle ? range(values) : { least: 0, most }) };
}

/**
 * The style with the largest probability in a layer; -1 where there is no value.
 * @param {Run} run
 * @param {number} step
 * @param {string} role
 * @param {number} layer
 */
export function leadingStyle(run, step, role, layer) {
  const shares = run.styles.map((_, style) => run.value(step, role, layer, style)).map((share) => (Number.isNaN(share) ? -1 : share));
  const most = Math.max(...shares);
  return most < 0 ? -1 : shares.indexOf(most);
}

/**
 * @param {Run} run
 * @param {"decided" | number} view
 * @param {number} step
 * @param {string} role
 * @param {number} layer
 */
function layerValue(run, view, step, role, layer) {
  if (view !== "decided") return run.value(step, role, layer, view);
  return decided(run.styles.map((_, style) => run.value(step, role, layer, style)));
}

/**
 * 1 minus the entropy of the shares, relative to the largest it can be; NaN where there are none.
 * @param {number[]} all NaN for styles that the layer has not got
 */
export function decided(all) {
  const shares = all.filter((share) => !Number.isNaN(share));
  if (shares.length === 0) return NaN;
  if (shares.length < 2) return 1;
  const entropy = shares.reduce((sum, share) => sum - (share > 0 ? share * Math.log(share) : 0), 0);
  return Math.min(1, Math.max(0, 1 - entropy / Math.log(shares.length)));
}

/**
 * The mean of those that are there.
 * @param {number[]} values
 */
function mean(values) {
  const there = values.filter((value) => !Number.isNaN(value));
  return there.reduce((sum, value) => sum + value, 0) / there.length;
}

/**
 * The color scale of means over layers: they lie close together, and on a scale from 0 they would all look the same. In
 * steps of a twentieth, so that it does not move at every step.
 * @param {Float32Array} values
 */
function range(values) {
  const there = values.filter((value) => !Number.isNaN(value));
  if (there.length === 0) return { least: 0, most: 1 };
  const least = Math.floor(Math.min(...there) * 20 + 1e-4);
  const most = Math.ceil(Math.max(...there) * 20 - 1e-4);
  return { least: least / 20, most: Math.max(most, least + 1) / 20 };
}

/**
 * The top of the color scale: the largest value, rounded up to a tenth, so that it does not move at every step.
 * @param {Float32Array} values
 */
function roundUp(values) {
  const largest = values.reduce((most, value) => (value > most ? value : most), 0);
  return Math.max(1, Math.ceil(largest * 10 - 1e-4)) / 10;
}
