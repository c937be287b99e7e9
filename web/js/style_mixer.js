/**
 * StyleInject's mixer shows as many sliders as the adapter has styles, with their names: those of the loader it is connected
 * to, and since a run those of the adapter it got. They are kept in the node's properties, where a saved workflow and a reload
 * find them again.
 */

// @ts-expect-error ComfyUI serves it
import { app } from "../../../scripts/app.js";
// @ts-expect-error likewise
import { api } from "../../../scripts/api.js";
import { sliders } from "./router/labels.js";

const NODE = "StyleInjectStyleMixer";
const LOADER = "StyleInjectLoader";
const PROPERTY = "styleinject_styles";

/** @param {any} node a mixer */
function arrange(node) {
  const kept = node.properties?.[PROPERTY];
  const styles = Array.isArray(kept) ? kept.map(String) : [];
  const found = sliders(node.widgets, styles);
  for (const widget of node.widgets) {
    const slider = found.get(widget.name);
    if (!slider) continue;
    const hidden = slider.when === "hidden";
    widget.label = slider.label;
    widget.hidden = hidden; // on the canvas, which has no advanced inputs
    widget.options = { ...widget.options, hidden, advanced: slider.when === "asked" }; // in Vue nodes
  }
  node.setDirtyCanvas?.(true, true);
}

/**
 * Take other names, and make room for their sliders.
 * @param {any} node a mixer
 * @param {string[]} styles
 */
function rename(node, styles) {
  node.properties[PROPERTY] = styles;
  const before = node.computeSize()[1];
  arrange(node);
  const after = node.computeSize()[1];
  if (after !== before) node.setSize([node.size[0], node.size[1] + after - before]);
}

/**
 * The loader whose adapter a mixer gets; null where something else makes it.
 * @param {any} node a mixer
 */
function loaderOf(node) {
  const slot = node.inputs?.findIndex((/** @type {any} */ input) => input.name === "adapter") ?? -1;
  const origin = slot < 0 ? null : node.getInputNode?.(slot);
  return origin?.comfyClass === LOADER ? origin : null;
}

/** @type {Map<string, Promise<string[]>>} requests under way: a workflow that loads asks for the same file many times */
const asking = new Map();

/**
 * The names of a listed file's styles; none where the server knows none.
 * @param {string} name
 */
async function fetchStyles(name) {
  try {
    const response = await api.fetchApi(`/styleinject/style_names?adapter=${encodeURIComponent(name)}`);
    return response.ok ? (await response.json()).map(String) : [];
  } finally {
    asking.delete(name);
  }
}

/**
 * The file that a mixer's loader has chosen; undefined without such a loader.
 * @param {any} node a mixer
 */
function chosenFile(node) {
  return loaderOf(node)?.widgets?.find((/** @type {any} */ widget) => widget.name === "adapter_name")?.value;
}

/**
 * Ask the server for the names that the chosen file has.
 * @param {any} node a mixer
 */
async function ask(node) {
  const name = chosenFile(node);
  if (!name) return;
  if (!asking.has(name)) asking.set(name, fetchStyles(name));
  const styles = (await asking.get(name)) ?? [];
  if (chosenFile(node) !== name) return; // another one was chosen in the meantime
  if (styles.length && JSON.stringify(styles) !== JSON.stringify(node.properties[PROPERTY])) rename(node, styles);
}

/**
 * Let the mixers that a loader feeds know of another choice.
 * @param {any} loader
 */
function follow(loader) {
  const widget = loader.widgets?.find((/** @type {any} */ one) => one.name === "adapter_name");
  if (!widget) return;
  const chosen = widget.callback;
  widget.callback = function (/** @type {any[]} */ ...args) {
    const result = chosen?.apply(this, args);
    for (const node of loader.graph?.nodes ?? []) {
      // By its id: in Vue nodes, the graph's nodes are proxies.
      if (node.comfyClass === NODE && loaderOf(node)?.id === loader.id) ask(node);
    }
    return result;
  };
}

app.registerExtension({
  name: "StyleInject.StyleMixer",
  nodeCreated(/** @type {any} */ node) {
    if (node.comfyClass === LOADER) follow(node);
    if (node.comfyClass !== NODE) return;
    const executed = node.onExecuted;
    node.onExecuted = function (/** @type {any} */ output) {
      const result = executed?.apply(this, [output]);
      rename(this, output?.styleinject_styles ?? []);
      return result;
    };
    const configured = node.onConfigure;
    node.onConfigure = function (/** @type {any[]} */ ...args) {
      const result = configured?.apply(this, args);
      arrange(this);
      return result;
    };
    const connected = node.onConnectionsChange;
    node.onConnectionsChange = function (/** @type {any[]} */ ...args) {
      const result = connected?.apply(this, args);
      setTimeout(() => ask(this)); // the link is there only then
      return result;
    };
  },
  loadedGraphNode(/** @type {any} */ node) {
    if (node.comfyClass === NODE) setTimeout(() => ask(node));
  },
});
