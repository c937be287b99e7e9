/**
 * The live view of the router in StyleInject's monitor nodes: what ComfyUI's frontend calls, and nothing else.
 * The messages come from integration/live.py.
 */

// @ts-expect-error ComfyUI serves it
import { api } from "../../../scripts/api.js";
// @ts-expect-error ComfyUI serves it
import { app } from "../../../scripts/app.js";
import { keep, recall } from "./router/memory.js";
import { Panel, addStyle } from "./router/panel.js";
import { Runs } from "./router/runs.js";

const NODE = "StyleInjectRouterMonitor";
const EVENT = "styleinject.router";
const SIZE = [420, 400]; // of a new node, in the canvas's pixels
const MIN_HEIGHT = 260; // of the panel

/** @typedef {import("./router/runs.js").Run} Run */

/** Kept apart from the nodes, which are made anew whenever a workflow's tab is opened or a change undone. */
const runs = new Runs();

/** @type {WeakMap<object, Panel>} node -> its panel */
const panels = new WeakMap();

/** The open workflow's outermost graph; older frontends know it by another name. */
const rootGraph = () => app.rootGraph ?? app.graph;

/**
 * The node an execution id names.
 * @param {string} executionId "7", or "3:7" for node 7 in the subgraph that node 3 is
 */
function nodeAt(executionId) {
  const path = executionId.split(":");
  const last = path.pop();
  let graph = rootGraph();
  for (const id of path) graph = graph?.getNodeById(id)?.subgraph;
  return graph?.getNodeById(last) ?? null;
}

/**
 * Show a run in the monitor it belongs to, if that is in the open workflow.
 * @param {Run} run
 */
function show(run) {
  const open = rootGraph()?.id;
  if (run.workflow && open && run.workflow !== open) return;
  const node = nodeAt(run.node);
  const panel = node && panels.get(node);
  // Several instances of a subgraph share its nodes, and one monitor may watch several adapters: all of their runs.
  panel?.show(runs.all().filter((other) => other.workflow === run.workflow && nodeAt(other.node) === node));
}

/** @param {any} node a monitor */
function addPanel(node) {
  const panel = new Panel();
  // Neither saved in the workflow nor sent with the prompt: the order of the saved widgets stays what it is.
  const widget = node.addDOMWidget("router_live", "styleinject_router", panel.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => MIN_HEIGHT,
  });
  widget.serialize = false;
  panels.set(node, panel);
  node.setSize([Math.max(node.size[0], SIZE[0]), Math.max(node.size[1], SIZE[1])]);
  const removed = node.onRemoved;
  node.onRemoved = function (/** @type {any[]} */ ...args) {
    panel.close();
    return removed?.apply(this, args);
  };
}

/**
 * The wheel over the panel zooms the classic canvas, as it does over the rest of a node; Vue nodes see to that themselves.
 * @param {WheelEvent} event
 */
function forwardWheel(event) {
  if (!(/** @type {any} */ (window).LiteGraph?.vueNodesMode)) app.canvas.processMouseWheel(event);
}

app.registerExtension({
  name: "StyleInject.RouterLive",
  setup() {
    addStyle();
    api.addEventListener(EVENT, (/** @type {CustomEvent} */ event) => {
      const run = runs.receive(event.detail);
      show(run);
      if (run.end) keep(runs.all());
    });
    recall().then((kept) => {
      runs.add(kept);
      kept.forEach(show);
    });
  },
  nodeCreated(/** @type {any} */ node) {
    if (node.comfyClass !== NODE) return;
    addPanel(node);
    panels.get(node)?.element.addEventListener("wheel", forwardWheel, { passive: true });
  },
  afterConfigureGraph() {
    runs.all().forEach(show);
  },
});
