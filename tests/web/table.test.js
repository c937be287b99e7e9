import assert from "node:assert/strict";
import { test } from "node:test";

import { Runs } from "../../web/js/router/runs.js";
import { decided, leadingStyle, makeTable } from "../../web/js/router/table.js";

/** Two steps of four, one role, three layers, two styles; the last layer has no values. */
function run() {
  const bytes = [254, 0, 127, 127, 255, 255, 0, 254, 0, 254, 255, 255];
  return new Runs().receive({
    run: "r", node: "1", adapter: "a", prompt: "p", workflow: "w", layers: 3, styles: 2, steps: 4,
    names: { layers: ["a.one", "a.two", "b.three"], labels: ["one", "two", "three"], blocks: ["a", "a", "b"], groups: {}, styles: ["ink", "gold"] },
    columns: [0, 1].map((step) => ({ step, sigma: 1, roles: ["positive"] })),
    values: Buffer.from(bytes).toString("base64"),
  });
}

const shown = (table) => [...table.values].map((value) => (Number.isNaN(value) ? null : Math.round(value * 1000) / 1000));

test("all styles: the mean over the chosen layers that have a value", () => {
  const table = makeTable(run(), "styles", "positive", [0, 1, 2]);
  assert.deepEqual([table.rows, table.blocks], [["ink", "gold"], ["ink", "gold"]]);
  assert.deepEqual(shown(table), [0.75, 0, null, null, 0.25, 1, null, null]);
  assert.deepEqual(shown(makeTable(run(), "styles", "positive", [1])), [0.5, 0, null, null, 0.5, 1, null, null]);
});

test("one style, per layer", () => {
  const table = makeTable(run(), 1, "positive", [1, 2]);
  assert.deepEqual([table.rows, table.blocks], [["two", "three"], ["a", "b"]]);
  assert.deepEqual(shown(table), [0.5, 1, null, null, null, null, null, null]);
});

test("how decided a layer is: 0 for equal shares, 1 for one style alone", () => {
  const table = makeTable(run(), "decided", "positive", [0, 1, 2]);
  assert.deepEqual(shown(table).slice(0, 8), [1, 1, null, null, 0, 1, null, null]);
  assert.ok(shown(table).slice(8).every((value) => value === null));
  assert.equal(table.most, 1);
  assert.equal(decided([1]), 1);
  assert.ok(Number.isNaN(decided([NaN, NaN])));
});

test("no layers, an unknown role: no values, no error", () => {
  assert.equal(makeTable(run(), "decided", "positive", []).values.length, 0);
  assert.ok(shown(makeTable(run(), "styles", "positive", [])).every((value) => value === null));
  assert.ok(shown(makeTable(run(), "styles", "negative", [0])).every((value) => value === null));
});

test("the scale of one style ends at the next tenth", () => {
  const low = run();
  low.columns.forEach((column) => column.bytes.fill(80)); // 0.315
  const table = makeTable(low, 0, "positive", [0]);
  assert.deepEqual([table.least, table.most], [0, 0.4]);
});

test("the scale of means reaches from the least to the most, and never from a value to itself", () => {
  const scale = (/** @type {number[]} */ bytes) => {
    const close = run();
    close.columns.forEach((column) => column.bytes.set([...bytes, ...bytes]));
    const { least, most } = makeTable(close, "styles", "positive", [0, 1]);
    return [least, most];
  };
  assert.deepEqual(scale([117, 137]), [0.45, 0.55]); // 0.46 and 0.54
  assert.deepEqual(scale([127, 127]), [0.5, 0.55]);
  assert.deepEqual(scale([0, 254]), [0, 1]);
  assert.deepEqual(scale([255, 255]), [0, 1], "no values");
});

test("the leading style", () => {
  assert.equal(leadingStyle(run(), 0, "positive", 0), 0);
  assert.equal(leadingStyle(run(), 1, "positive", 0), 1);
  assert.equal(leadingStyle(run(), 0, "positive", 2), -1);
});
