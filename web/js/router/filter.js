/** The layer filter: the words of the pack's layer selector (styleinject_core/selector.py), forgiving, for typing. */

/** @type {Record<string, (name: string) => boolean>} */
const GROUPS = {
  all: () => true,
  attention: (name) => /(^|\.)attn\d*\./.test(name),
  self: (name) => name.includes(".attn1."),
  cross: (name) => name.includes(".attn2."),
  down: (name) => name.startsWith("down_block"),
  mid: (name) => name.startsWith("mid_block"),
  up: (name) => name.startsWith("up_block"),
};

/**
 * Which layers a filter chooses. "," is either, "&" both, "!" not; a word that is no group is a part of a name.
 * @param {string[]} names of all layers
 * @param {string} text as typed; empty is all of them
 * @param {number[]} convolutions the indices of those that are convolutions
 * @returns {number[]} their indices, in order; none where nothing matches
 */
export function filterLayers(names, text, convolutions) {
  const alternatives = text.split(",").map((part) => part.trim()).filter(Boolean);
  const removes = (/** @type {string} */ part) => part.startsWith("!") && !part.includes("&"); // "!up & cross": the ! is of up alone
  const wanted = alternatives.filter((part) => !removes(part));
  const unwanted = alternatives.filter(removes).map((part) => part.slice(1));
  return names.flatMap((name, index) => {
    const conv = convolutions.includes(index);
    const chosen = wanted.length === 0 || wanted.some((part) => matchesAll(name, part, conv));
    return chosen && !unwanted.some((part) => matchesAll(name, part, conv)) ? [index] : [];
  });
}

/**
 * @param {string} name
 * @param {string} conjunction terms joined by &
 * @param {boolean} conv whether it is a convolution
 */
function matchesAll(name, conjunction, conv) {
  const terms = conjunction.split("&").map((term) => term.trim()).filter(Boolean);
  return terms.length > 0 && terms.every((term) => {
    const negated = term.startsWith("!");
    return matches(name, term.replace(/^!\s*/, "").trim(), conv) !== negated;
  });
}

/**
 * @param {string} name
 * @param {string} term
 * @param {boolean} conv
 */
function matches(name, term, conv) {
  if (term === "conv") return conv;
  if (term === "linear") return !conv;
  if (Object.hasOwn(GROUPS, term)) return GROUPS[term](name);
  const block = /^(down|up)\.(\d+)$/.exec(term);
  if (block) return name.startsWith(`${block[1]}_blocks.${block[2]}.`);
  return term !== "" && name.includes(term);
}
