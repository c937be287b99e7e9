/** What came from the server: the router's probabilities of the last sampling runs. */

const MISSING = 255;
const LEVELS = 254;
const MOST_RUNS = 32; // of all workflows together; the oldest are forgotten

/**
 * One message of integration/live.py, where its fields are described.
 * @typedef {object} Message
 * @property {string} node
 * @property {string} adapter
 * @property {string} run
 * @property {string} prompt
 * @property {string} workflow
 * @property {number} layers
 * @property {number} styles
 * @property {{layers: string[], labels: string[], blocks: string[], groups: Record<string, number[]>, styles: string[]}} [names]
 * @property {number} steps
 * @property {{step: number, sigma: number, roles: string[]}[]} columns
 * @property {string} values
 * @property {"finished" | "interrupted"} [end]
 */

/**
 * One step: `bytes` holds (roles, layers, styles).
 * @typedef {{sigma: number, roles: string[], bytes: Uint8Array}} Column
 */

/** One adapter's routers in one sampling run, as far as it has come. */
export class Run {
  /** @param {Message} message its first */
  constructor(message) {
    this.id = message.run;
    this.node = message.node;
    this.adapter = message.adapter;
    this.prompt = message.prompt;
    this.workflow = message.workflow;
    this.layers = numbered("layer", message.layers);
    this.styles = numbered("style", message.styles);
    /** What to call each layer, and the part of the model it is in, for people. */
    this.labels = this.layers;
    this.blocks = this.layers;
    /** @type {Record<string, number[]>} word of the layer selector -> indices of the layers it chooses */
    this.groups = {};
    this.steps = message.steps;
    /** @type {Map<number, Column>} */
    this.columns = new Map();
    /** @type {"" | "finished" | "interrupted"} */
    this.end = "";
  }

  /**
   * Take in a message of this run.
   * @param {Message} message
   * @throws {Error} its values are not as many as its columns call for
   */
  add(message) {
    const bytes = fromBase64(message.values);
    const row = this.layers.length * this.styles.length;
    const expected = message.columns.reduce((sum, column) => sum + column.roles.length * row, 0);
    if (bytes.length !== expected) {
      throw new Error(`${message.adapter}: the message has ${bytes.length} values, its columns call for ${expected}`);
    }
    let start = 0;
    for (const { step, sigma, roles } of message.columns) {
      const end = start + roles.length * row;
      this.columns.set(step, { sigma, roles, bytes: bytes.subarray(start, end) });
      start = end;
    }
    if (message.names) {
      this.layers = message.names.layers;
      this.styles = message.names.styles;
      this.labels = message.names.labels;
      this.blocks = message.names.blocks;
      this.groups = message.names.groups;
    }
    this.steps = Math.max(this.steps, message.steps);
    this.end = message.end ?? this.end;
  }

  /** The run as it is now, which later messages do not change. */
  snapshot() {
    return Object.assign(Object.create(Run.prototype), this, { columns: new Map(this.columns) });
  }

  /** Every role that some step has, the positive prompt first. */
  roles() {
    const roles = [...new Set([...this.columns.values()].flatMap((column) => column.roles))];
    return roles.sort((a, b) => Number(b === "positive") - Number(a === "positive"));
  }

  /**
   * A probability, NaN where there is none.
   * @param {number} step
   * @param {string} role
   * @param {number} layer
   * @param {number} style
   */
  value(step, role, layer, style) {
    const column = this.columns.get(step);
    const index = column ? column.roles.indexOf(role) : -1;
    if (!column || index < 0) return NaN;
    const byte = column.bytes[(index * this.layers.length + layer) * this.styles.length + style];
    return byte === MISSING ? NaN : byte / LEVELS;
  }
}

/** The last runs: one per monitor and adapter of a workflow. */
export class Runs {
  constructor() {
    /** @type {Map<string, Run>} */
    this._byPlace = new Map();
  }

  /**
   * Take in a message, and forget what it makes old: the run before, and those of earlier prompts in the same monitor.
   * @param {Message} message
   * @returns {Run}
   */
  receive(message) {
    const own = place(message);
    let run = this._byPlace.get(own);
    if (run?.id !== message.run) {
      for (const [key, old] of this._byPlace) {
        const sameNode = old.workflow === message.workflow && old.node === message.node;
        if (key === own || (sameNode && old.prompt !== message.prompt)) this._byPlace.delete(key);
      }
      run = new Run(message);
      this._byPlace.set(own, run);
      const [oldest] = this._byPlace.keys();
      if (this._byPlace.size > MOST_RUNS) this._byPlace.delete(oldest);
    }
    run.add(message);
    return run;
  }

  /**
   * Take in runs of before, where there are no newer ones of the same monitor.
   * @param {Run[]} runs oldest first
   */
  add(runs) {
    const newer = [...this._byPlace];
    const watched = new Set(newer.map(([, run]) => JSON.stringify([run.workflow, run.node])));
    const older = runs.filter((run) => !watched.has(JSON.stringify([run.workflow, run.node])));
    this._byPlace = new Map([...older.map((run) => /** @type {[string, Run]} */ ([place(run), run])), ...newer]);
  }

  /** @returns {Run[]} oldest first */
  all() {
    return [...this._byPlace.values()];
  }
}

/** @param {{workflow: string, node: string, adapter: string}} run */
function place(run) {
  return JSON.stringify([run.workflow, run.node, run.adapter]);
}

/** @param {string} text */
function fromBase64(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

/**
 * Names until the real ones come.
 * @param {string} word
 * @param {number} count
 */
function numbered(word, count) {
  return Array.from({ length: count }, (_, index) => `${word} ${index + 1}`);
}
