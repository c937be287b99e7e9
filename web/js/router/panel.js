/**
 * The panel in a monitor node: controls, the heat map, a line about what is under the pointer.
 * Names come from files: they reach the page as text only (textContent, fillText, Option's text).
 */

import { filterLayers } from "./filter.js";
import { cellAt, drawHeatmap } from "./heatmap.js";
import { leadingStyle, makeTable } from "./table.js";

/** @typedef {import("./runs.js").Run} Run */
/** @typedef {import("./table.js").View} View */
/** @typedef {import("./heatmap.js").Look} Look */

const HINT = "Queue the workflow: while it samples, the router's style probabilities appear here, step by step.";
const EXPORT_WIDTH = 1000;
const EXPORT_LOOK = { text: "#222222", background: "#ffffff", empty: "#eeeeee", size: 14 };

const STYLE = `
.styleinject-router { display: flex; flex-direction: column; gap: 4px; min-height: 260px; box-sizing: border-box;
  padding: 2px; font: 11px sans-serif; color: var(--input-text, #ddd); overflow: hidden; }
.styleinject-router .bar { display: flex; flex-wrap: wrap; gap: 4px; }
.styleinject-router :is(select, input, button) { font: inherit; color: inherit; height: 22px; padding: 0 4px; min-width: 0;
  background: var(--comfy-input-bg, #222); border: 1px solid var(--border-color, #4e4e4e); border-radius: 4px; }
.styleinject-router select { max-width: 170px; }
.styleinject-router input { flex: 1 1 70px; }
.styleinject-router button { cursor: pointer; }
.styleinject-router [hidden] { display: none !important; }
.styleinject-router .picture { position: relative; flex: 1 1 0; min-height: 120px; }
.styleinject-router canvas { position: absolute; inset: 0; width: 100%; height: 100%; }
.styleinject-router .hint { position: absolute; inset: 0; display: grid; place-content: center; text-align: center;
  padding: 0 12%; opacity: 0.75; pointer-events: none; }
.styleinject-router .status { flex: 0 0 3.75em; line-height: 1.25; overflow-wrap: anywhere; overflow: hidden; }
`;

/** Put the style sheet into the page, once. */
export function addStyle() {
  document.head.append(make("style", { textContent: STYLE }));
}

export class Panel {
  constructor() {
    /** @type {Run[]} as they come in */
    this._latest = [];
    /** @type {Run[]} what is shown: the same, or how they were when the panel was paused */
    this._runs = [];
    /** @type {Run | undefined} the chosen one */
    this._run = undefined;
    this._paused = false;
    this._frame = 0; // the one that is asked for
    /** @type {PointerEvent | null} the last one over the picture */
    this._pointer = null;
    /** @type {{table: import("./table.js").Table, box: import("./heatmap.js").Box, layers: number[]} | null} */
    this._drawn = null;

    this._adapter = make("select", { title: "Which adapter" });
    this._view = make("select", { title: "What to show" });
    this._role = make("select", { title: "For which prompt" });
    this._filter = make("input", { title: 'Which layers: "up & cross", "mid, to_v", "!conv"', placeholder: "all layers" });
    this._pause = make("button", { title: "Hold the picture; sampling goes on", textContent: "Pause" });
    this._save = make("button", { title: "Save the heat map as a PNG file", textContent: "PNG" });
    this._canvas = make("canvas");
    this._hint = make("div", { className: "hint", textContent: HINT });
    this._status = make("div", { className: "status" });
    const bar = make("div", { className: "bar" });
    bar.append(this._adapter, this._view, this._role, this._filter, this._pause, this._save);
    const picture = make("div", { className: "picture" });
    picture.append(this._canvas, this._hint);
    this.element = make("div", { className: "styleinject-router" });
    this.element.append(bar, picture, this._status);

    this._resized = new ResizeObserver(() => this._redraw());
    this._listen();
    this._update();
  }

  /**
   * Show these runs, of which one is chosen where there are several; called again at each message.
   * @param {Run[]} runs
   */
  show(runs) {
    this._latest = runs;
    if (this._paused) return;
    this._runs = runs;
    this._update();
  }

  /** The node is gone. */
  close() {
    this._resized.disconnect();
    cancelAnimationFrame(this._frame);
  }

  _listen() {
    for (const select of [this._adapter, this._view, this._role]) select.addEventListener("change", () => this._update());
    this._filter.addEventListener("input", () => this._redraw());
    // Typing must not reach the editor's shortcuts (Delete, Ctrl+C, ...).
    this._filter.addEventListener("keydown", (event) => event.stopPropagation());
    this._pause.addEventListener("click", () => this._setPaused(!this._paused));
    this._save.addEventListener("click", () => this._export());
    for (const type of /** @type {const} */ (["pointermove", "pointerleave"])) {
      this._canvas.addEventListener(type, (event) => {
        this._pointer = type === "pointermove" ? event : null;
        this._tell();
      });
    }
    this._canvas.addEventListener("pointerenter", () => this._redraw()); // sharp again, if the editor's zoom has changed
    this._resized.observe(this._canvas);
  }

  /** Bring the controls up to date with the runs, and draw. */
  _update() {
    const labels = this._runs.map((run) => (sameAdapter(this._runs, run) ? `${run.adapter} (${run.node})` : run.adapter));
    const chosen = setOptions(this._adapter, labels);
    this._run = this._runs[Math.max(0, chosen)];
    this._adapter.hidden = this._runs.length < 2;
    setOptions(this._view, ["all styles", "how decided, per layer", ...(this._run?.styles ?? []).map((name) => `${name}, per layer`)]);
    setOptions(this._role, this._run?.roles() ?? []);
    for (const control of [this._view, this._role, this._filter, this._pause, this._save]) control.disabled = !this._run;
    this._hint.hidden = this._run !== undefined;
    this._redraw();
  }

  /** @returns {View} */
  _chosenView() {
    const index = this._view.selectedIndex;
    return index <= 0 ? "styles" : index === 1 ? "decided" : index - 2;
  }

  /** @param {boolean} paused */
  _setPaused(paused) {
    this._paused = paused;
    this._pause.textContent = paused ? "Resume" : "Pause";
    if (paused) this._runs = this._runs.map((run) => run.snapshot());
    else this._runs = this._latest;
    this._update();
  }

  /** Draw at the browser's next frame, which for a hidden tab is never. */
  _redraw() {
    if (this._frame) return;
    this._frame = requestAnimationFrame(() => {
      this._frame = 0;
      this._draw();
    });
  }

  _draw() {
    const { clientWidth: width, clientHeight: height } = this._canvas;
    const context = this._canvas.getContext("2d");
    if (!context || width < 40 || height < 40) return;
    // Never coarser than at zoom 1: nothing tells when the editor zooms in.
    const zoom = this._canvas.getBoundingClientRect().width / width || 1;
    const scale = window.devicePixelRatio * Math.min(2, Math.max(1, zoom));
    this._canvas.width = Math.round(width * scale);
    this._canvas.height = Math.round(height * scale);
    this._drawn = null;
    if (!this._run) return;
    const layers = filterLayers(this._run.layers, this._filter.value, this._run.groups);
    this._filter.style.borderColor = layers.length ? "" : "#d55e00";
    const table = makeTable(this._run, this._chosenView(), this._role.value, layers);
    const text = getComputedStyle(this.element).color;
    context.scale(scale, scale);
    const box = drawHeatmap(context, table, width, height, { text, background: "", empty: "#8884", size: 11 });
    this._drawn = { table, box, layers };
    this._tell();
  }

  /** Say what is under the pointer, or how far the run is. */
  _tell() {
    const cell = this._cellUnderPointer();
    this._status.textContent = cell ? this._describe(cell.row, cell.step) : this._progress();
  }

  _cellUnderPointer() {
    if (!this._drawn || !this._pointer) return null;
    const shown = this._canvas.getBoundingClientRect(); // the editor's zoom included
    const x = ((this._pointer.clientX - shown.left) / shown.width) * this._canvas.clientWidth;
    const y = ((this._pointer.clientY - shown.top) / shown.height) * this._canvas.clientHeight;
    return cellAt(this._drawn.box, this._drawn.table, x, y);
  }

  /**
   * What is in a cell, in words.
   * @param {number} row
   * @param {number} step
   */
  _describe(row, step) {
    const run = /** @type {Run} */ (this._run);
    const { table, layers } = /** @type {NonNullable<Panel["_drawn"]>} */ (this._drawn);
    const value = table.values[row * table.steps + step];
    const column = run.columns.get(step);
    const where = `step ${step + 1}` + (column ? `, sigma ${column.sigma.toPrecision(3)}` : "");
    if (Number.isNaN(value)) return `${where}: no value`;
    const view = this._chosenView();
    const role = this._role.value;
    if (view === "styles") return `${where}, ${role}: ${run.styles[row]} ${value.toFixed(3)}, mean of ${layers.length} layers`;
    const layer = layers[row];
    const leading = leadingStyle(run, step, role, layer);
    const share = run.value(step, role, layer, leading).toFixed(3);
    const what = view === "decided" ? `decided ${value.toFixed(3)}` : `${run.styles[view]} ${value.toFixed(3)}`;
    return `${where}, ${role}, ${run.layers[layer]}: ${what}; leading ${run.styles[leading]} ${share}`;
  }

  /** How far the run is, in words. */
  _progress() {
    const run = this._run;
    if (!run) return "";
    const seen = Math.max(-1, ...run.columns.keys()) + 1;
    const state = run.end === "interrupted" ? "interrupted" : run.end ? "finished" : "sampling";
    return `${run.adapter}: step ${seen} of ${run.steps}, ${state}${this._paused ? ", paused" : ""}`;
  }

  /** Save what is shown, larger and on white, as a PNG file. */
  _export() {
    if (!this._drawn || !this._run) return;
    const { table } = this._drawn;
    const canvas = make("canvas", { width: 2 * EXPORT_WIDTH, height: 0 });
    const height = Math.min(1600, Math.max(360, table.rows.length * 16 + 90));
    canvas.height = 2 * height;
    const context = canvas.getContext("2d");
    if (!context) return;
    context.scale(2, 2);
    const filter = this._filter.value.trim();
    const title = [this._run.adapter, this._view.value, this._role.value, ...(filter ? [`layers: ${filter}`] : [])].join("  ·  ");
    drawHeatmap(context, table, EXPORT_WIDTH, height, { ...EXPORT_LOOK, title });
    const name = `router_${this._run.adapter}_${this._role.value}`.replace(/[^\w.-]+/g, "_");
    canvas.toBlob((blob) => {
      if (!blob) return;
      const link = make("a", { href: URL.createObjectURL(blob), download: `${name}.png` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    });
  }
}

/**
 * Whether another of the runs has the same adapter.
 * @param {Run[]} runs
 * @param {Run} run
 */
function sameAdapter(runs, run) {
  return runs.some((other) => other !== run && other.adapter === run.adapter);
}

/**
 * @template {keyof HTMLElementTagNameMap} T
 * @param {T} tag
 * @param {Partial<HTMLElementTagNameMap[T]>} properties
 * @returns {HTMLElementTagNameMap[T]}
 */
function make(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}

/**
 * Give a select these options, and keep what was chosen where it is still among them.
 * @param {HTMLSelectElement} select
 * @param {string[]} labels
 * @returns {number} index of the chosen one, -1 where there are none
 */
function setOptions(select, labels) {
  const same = labels.length === select.options.length && labels.every((label, i) => select.options[i].text === label);
  if (!same) {
    const renamed = labels.length === select.options.length ? select.selectedIndex : 0; // names come after numbers
    const index = labels.includes(select.value) ? labels.indexOf(select.value) : renamed;
    select.replaceChildren(...labels.map((label) => new Option(label, label)));
    select.selectedIndex = labels.length ? Math.max(0, index) : -1;
  }
  return select.selectedIndex;
}
