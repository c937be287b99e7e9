/** The layer filter: the layer selector's words (styleinject_core/selector.py), forgiving, for typing. */

/** @typedef {Record<string, number[]>} Groups word of the selector -> indices of the layers it chooses, as the server says */

/**
 * Which layers a filter chooses. "," is either, "&" both, "!" not; a word that is no group is a part of a name.
 * @param {string[]} names of all layers
 * @param {string} text as typed; empty is all of them
 * @param {Groups} groups
 * @returns {number[]} their indices, in order; none where nothing matches
 */
export function filterLayers(names, text, groups) {
  const alternatives = text.split(",").map((part) => part.trim()).filter(Boolean);
  const removes = (/** @type {string} */ part) => part.startsWith("!") && !part.includes("&"); // "!up & cross": the ! is of up alone
  const wanted = alternatives.filter((part) => !removes(part)).map((part) => conjunction(names, part, groups));
  const unwanted = alternatives.filter(removes).map((part) => conjunction(names, part.slice(1), groups));
  return [...names.keys()].filter((index) => {
    const chosen = wanted.length === 0 || wanted.some((matches) => matches(index));
    return chosen && !unwanted.some((matches) => matches(index));
  });
}

/**
 * @param {string[]} names
 * @param {string} text terms joined by &
 * @param {Groups} groups
 * @returns {(index: number) => boolean} whether a layer satisfies all of them
 */
function conjunction(names, text, groups) {
  const terms = text.split("&").map((term) => term.trim()).filter(Boolean).map((term) => {
    const chosen = layersOf(names, term.replace(/^!\s*/, ""), groups);
    return { chosen, negated: term.startsWith("!") };
  });
  return (index) => terms.length > 0 && terms.every(({ chosen, negated }) => chosen.has(index) !== negated);
}

/**
 * @param {string[]} names
 * @param {string} term
 * @param {Groups} groups
 * @returns {Set<number>}
 */
function layersOf(names, term, groups) {
  const word = term.replace(/^blocks\./, "block.");
  if (Object.hasOwn(groups, word)) return new Set(groups[word]);
  const range = /^(\w+\.)(\d+)-(\d+)$/.exec(word);
  if (range) {
    const [start, first, last] = [range[1], Number(range[2]), Number(range[3])];
    const within = (/** @type {string} */ group) => {
      const number = Number(group.slice(start.length));
      return group.startsWith(start) && first <= number && number <= last;
    };
    return new Set(Object.keys(groups).filter(within).flatMap((group) => groups[group]));
  }
  return new Set([...names.keys()].filter((index) => term !== "" && names[index].includes(term)));
}
