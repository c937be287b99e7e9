import assert from "node:assert/strict";
import { test } from "node:test";

import { cellAt, rowLabels, viridis } from "../../web/js/router/heatmap.js";

const BOX = { left: 50, top: 10, width: 200, height: 100 };
const TABLE = {
  rows: ["a", "b", "c", "d"], blocks: ["a", "a", "b", "b"], steps: 10, values: new Float32Array(40), least: 0, most: 1,
};

test("viridis from end to end", () => {
  assert.deepEqual(viridis(0), [68, 1, 84]);
  assert.deepEqual(viridis(1), [253, 231, 37]);
  assert.deepEqual(viridis(0.5), [33, 145, 140]);
  assert.deepEqual(viridis(2), viridis(1));
});

test("the cell under a point", () => {
  assert.deepEqual(cellAt(BOX, TABLE, 50, 10), { row: 0, step: 0 });
  assert.deepEqual(cellAt(BOX, TABLE, 249, 109), { row: 3, step: 9 });
  assert.deepEqual(cellAt(BOX, TABLE, 151, 61), { row: 2, step: 5 });
  for (const [x, y] of [[49, 50], [251, 50], [100, 9], [100, 111]]) assert.equal(cellAt(BOX, TABLE, x, y), null);
  assert.equal(cellAt(BOX, { ...TABLE, rows: [] }, 100, 50), null);
});

test("every row has its label where there is room, else each block of the model has one", () => {
  const rows = [0, 1, 2].flatMap((block) => [0, 1, 2, 3].map((n) => `down ${block}.${n} self to_q`));
  const table = { rows, blocks: rows.map((label) => label.slice(0, 6)) };
  assert.deepEqual(rowLabels(table, 20, 11)[5], { row: 5, text: "down 1.1 self to_q" });
  assert.deepEqual(rowLabels(table, 3, 11), [{ row: 0, text: "down 0" }, { row: 4, text: "down 1" }, { row: 8, text: "down 2" }]);
  assert.deepEqual(rowLabels(table, 2, 11), [{ row: 0, text: "down 0" }, { row: 8, text: "down 2" }], "no labels over each other");
});
