/**
 * StyleInject's mixer shows as many sliders as the adapter has styles, with their names, since its last run. They are kept in
 * the node's properties, where a saved workflow and a reload find them again.
 */

// @ts-expect-error ComfyUI serves it
import { app } from "../../../scripts/app.js";
import { sliders } from "./router/labels.js";

const NODE = "StyleInjectStyleMixer";
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

app.registerExtension({
  name: "StyleInject.StyleMixer",
  nodeCreated(/** @type {any} */ node) {
    if (node.comfyClass !== NODE) return;
    const executed = node.onExecuted;
    node.onExecuted = function (/** @type {any} */ output) {
      const result = executed?.apply(this, [output]);
      this.properties[PROPERTY] = output?.styleinject_styles ?? [];
      const before = this.computeSize()[1];
      arrange(this);
      const after = this.computeSize()[1];
      if (after !== before) this.setSize([this.size[0], this.size[1] + after - before]);
      return result;
    };
    const configured = node.onConfigure;
    node.onConfigure = function (/** @type {any[]} */ ...args) {
      const result = configured?.apply(this, args);
      arrange(this);
      return result;
    };
  },
});
