/** The names of an adapter's styles beside the sliders of StyleInject's mixer, from the node's last run. */

// @ts-expect-error ComfyUI serves it
import { app } from "../../../scripts/app.js";
import { labels } from "./router/labels.js";

const NODE = "StyleInjectStyleMixer";

app.registerExtension({
  name: "StyleInject.StyleMixer",
  nodeCreated(/** @type {any} */ node) {
    if (node.comfyClass !== NODE) return;
    const executed = node.onExecuted;
    node.onExecuted = function (/** @type {any} */ output) {
      const result = executed?.apply(this, [output]);
      const found = labels(this.widgets.map((/** @type {any} */ widget) => widget.name), output?.styleinject_styles ?? []);
      for (const widget of this.widgets) if (found.has(widget.name)) widget.label = found.get(widget.name);
      this.setDirtyCanvas?.(true);
      return result;
    };
  },
});
