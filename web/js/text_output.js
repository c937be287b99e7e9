/**
 * What this pack's nodes say, in the nodes: ComfyUI's editor shows the text output of its own nodes only.
 *
 * The text is kept in the node's properties, where a saved workflow and a reload find it again; the widget itself is not
 * saved, so that the order of the saved widget values stays what it is.
 */

// @ts-expect-error ComfyUI serves it
import { app } from "../../../scripts/app.js";
import { TextBox, addStyle, heightOf } from "./text/box.js";

const PACK = /^StyleInject[A-Z]/; // the ids of its nodes
const PROPERTY = "styleinject_text";
const WIDGET = "styleinject_text";
const PROGRESS = "$$node-text-preview"; // the editor's own widget, for the text of a node that runs
const MOST_KEPT = 8000; // letters

/** @type {WeakMap<object, TextBox>} node -> its box */
const boxes = new WeakMap();

/**
 * Show a text in a node, below its widgets.
 * @param {any} node
 * @param {string} text
 */
function show(node, text) {
  let box = boxes.get(node);
  if (!box) {
    box = addBox(node);
    boxes.set(node, box);
  }
  box.show(text, node.size[0]);
  const [, height] = node.computeSize();
  if (node.size[1] < height) node.setSize([node.size[0], height]);
  node.setDirtyCanvas?.(true, true);
}

/**
 * @param {any} node
 * @returns {TextBox}
 */
function addBox(node) {
  const box = new TextBox();
  const widget = node.addDOMWidget(WIDGET, "styleinject_text", box.element, {
    serialize: false,
    hideOnZoom: false,
    hideInPanel: true,
    getMinHeight: () => heightOf(box.text, node.size[0]),
  });
  widget.serialize = false;
  box.element.addEventListener("wheel", (event) => forwardWheel(box, event), { passive: true });
  return box;
}

/**
 * The wheel over a box that has nothing to scroll zooms the classic canvas, as it does over the rest of a node.
 * @param {TextBox} box
 * @param {WheelEvent} event
 */
function forwardWheel(box, event) {
  if (box.scrolls() && !event.ctrlKey) event.stopPropagation();
  else if (!(/** @type {any} */ (window).LiteGraph?.vueNodesMode)) app.canvas.processMouseWheel(event);
}

/**
 * Take away the last line of progress: the text that is there now says how it ended.
 * @param {any} node
 */
function removeProgress(node) {
  const index = node.widgets?.findIndex((/** @type {any} */ widget) => widget.name === PROGRESS) ?? -1;
  if (index < 0) return;
  node.widgets[index].onRemove?.();
  node.widgets.splice(index, 1);
}

/**
 * The text of a node's output: Apply's own, or what ComfyUI calls text.
 * @param {any} output
 * @returns {string | null}
 */
function textOf(output) {
  const text = output?.styleinject_text ?? output?.text;
  if (text === undefined || text === null) return null;
  return (Array.isArray(text) ? text.flat().join("\n\n") : String(text)).slice(0, MOST_KEPT);
}

/** @param {any} node one that has been configured */
function restore(node) {
  const text = node.properties?.[PROPERTY];
  if (typeof text === "string" && text) show(node, text);
}

app.registerExtension({
  name: "StyleInject.TextOutput",
  setup: addStyle,
  nodeCreated(/** @type {any} */ node) {
    if (!PACK.test(node.comfyClass ?? "")) return;
    const executed = node.onExecuted;
    node.onExecuted = function (/** @type {any} */ output) {
      const result = executed?.apply(this, [output]);
      const text = textOf(output);
      if (text) {
        removeProgress(this);
        this.properties[PROPERTY] = text;
        show(this, text);
      }
      return result;
    };
    const configured = node.onConfigure;
    node.onConfigure = function (/** @type {any[]} */ ...args) {
      const result = configured?.apply(this, args);
      restore(this);
      return result;
    };
  },
  loadedGraphNode(/** @type {any} */ node) {
    if (PACK.test(node.comfyClass ?? "") && !boxes.has(node)) restore(node);
  },
});
