/** Workflows of the pack's first versions name the demo's adapters without "demo/": they are given the names of today. */

// @ts-expect-error ComfyUI serves it
import { app } from "../../../scripts/app.js";
import { todaysName } from "./adapters/names.js";

const NODES = new Set(["StyleInjectLoader", "StyleInjectLoadAndApply"]);

app.registerExtension({
  name: "StyleInject.AdapterNames",
  nodeCreated(/** @type {any} */ node) {
    if (!NODES.has(node.comfyClass)) return;
    const configured = node.onConfigure;
    node.onConfigure = function (/** @type {any[]} */ ...args) {
      const result = configured?.apply(this, args);
      const widget = this.widgets?.find((/** @type {any} */ other) => other.name === "adapter_name");
      const names = widget?.options?.values;
      if (Array.isArray(names)) widget.value = todaysName(widget.value, names);
      return result;
    };
  },
});
