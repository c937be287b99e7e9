const DEMO = "demo/"; // as in integration/paths.py

/**
 * What an adapter is called now.
 * @param {string} name from a workflow
 * @param {string[]} names those there are
 * @returns {string} the same, where it is there, or is no name of the demo's adapters either
 */
export function todaysName(name, names) {
  return !names.includes(name) && names.includes(DEMO + name) ? DEMO + name : name;
}
