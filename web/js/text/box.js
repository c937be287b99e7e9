/**
 * A box of read-only text in a node, as high as its text asks for.
 * The text comes from files among others: it reaches the page as text only.
 */

const LINE = 15; // pixels, as in the style below
const PADDING = 10; // above and below together
const LETTER = 6.7; // pixels a letter of the font below is wide, about
const MARGIN = 44; // of the node's width, what the text has not
const MOST_LINES = 16; // of more, the box scrolls

const STYLE = `
.styleinject-text { box-sizing: border-box; width: 100%; margin: 0; padding: 4px 7px; overflow: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; user-select: text; cursor: text; font: 11px/15px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono",
  monospace; color: var(--input-text, #ddd); background: var(--comfy-input-bg, #222); border-radius: 6px; }
`;

/** Put the style sheet into the page, once. */
export function addStyle() {
  document.head.append(Object.assign(document.createElement("style"), { textContent: STYLE }));
}

/**
 * How high a box has to be for a text, in pixels.
 * @param {string} text
 * @param {number} width of the node, in pixels
 */
export function heightOf(text, width) {
  const letters = Math.max(10, Math.floor((width - MARGIN) / LETTER));
  const lines = text.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / letters)), 0);
  return Math.min(lines, MOST_LINES) * LINE + PADDING;
}

export class TextBox {
  constructor() {
    this.text = "";
    this.element = Object.assign(document.createElement("pre"), { className: "styleinject-text", tabIndex: 0 });
    // What is selected in it is copied as text, not as a node.
    for (const type of ["copy", "keydown"]) this.element.addEventListener(type, (event) => event.stopPropagation());
  }

  /**
   * @param {string} text
   * @param {number} width of the node
   */
  show(text, width) {
    this.text = text;
    this.element.textContent = text;
    this.element.style.minHeight = `${heightOf(text, width)}px`;
    this.element.style.maxHeight = `${heightOf("\n".repeat(MOST_LINES), width)}px`;
  }

  /** Whether it has more text than it shows. */
  scrolls() {
    return this.element.scrollHeight > this.element.clientHeight + 1;
  }
}
