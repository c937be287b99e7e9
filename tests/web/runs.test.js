import assert from "node:assert/strict";
import { test } from "node:test";

import { Runs } from "../../web/js/router/runs.js";

const LAYERS = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1"];
const STYLES = ["ink", "gold"];

/** A message of one column per step; every value is `value`. */
export function message({ run = "r1", node = "5", adapter = "ink", prompt = "p1", workflow = "w", steps = 4, columns = [0],
  roles = ["positive", "negative"], value = 127, ...rest } = {}) {
  const bytes = new Uint8Array(columns.length * roles.length * LAYERS.length * STYLES.length).fill(value);
  return {
    run, node, adapter, prompt, workflow, layers: LAYERS.length, styles: STYLES.length, steps,
    columns: columns.map((step) => ({ step, sigma: 10 - step, roles })),
    values: Buffer.from(bytes).toString("base64"),
    ...rest,
  };
}

test("steps add up over messages, and a later one replaces an earlier", () => {
  const runs = new Runs();
  runs.receive(message({ columns: [0, 1] }));
  runs.receive(message({ columns: [2] }));
  const run = runs.receive(message({ columns: [2], value: 254, end: "finished" }));
  assert.deepEqual([...run.columns.keys()], [0, 1, 2]);
  assert.equal(run.value(1, "positive", 0, 1), 0.5);
  assert.equal(run.value(2, "negative", 1, 0), 1);
  assert.equal(run.end, "finished");
  assert.deepEqual(run.roles(), ["positive", "negative"]);
});

test("bytes are (roles, layers, styles), 255 is no value", () => {
  const run = new Runs().receive({
    ...message(),
    values: Buffer.from([0, 1, 2, 3, 4, 5, 255, 255]).toString("base64"),
  });
  assert.equal(run.value(0, "positive", 1, 0), 2 / 254);
  assert.equal(run.value(0, "negative", 0, 1), 5 / 254);
  assert.ok(Number.isNaN(run.value(0, "negative", 1, 0)));
  assert.ok(Number.isNaN(run.value(3, "positive", 0, 0)), "a step that has not come");
  assert.ok(Number.isNaN(run.value(0, "another", 0, 0)), "a role that is not there");
});

test("roles may differ from step to step", () => {
  const runs = new Runs();
  runs.receive(message({ columns: [0], roles: ["area", "positive"] }));
  const run = runs.receive(message({ columns: [1], roles: ["negative", "positive"], value: 254 }));
  assert.deepEqual(run.roles(), ["positive", "area", "negative"]);
  assert.equal(run.value(0, "positive", 1, 1), 0.5);
  assert.ok(Number.isNaN(run.value(0, "negative", 1, 1)));
  assert.equal(run.value(1, "positive", 1, 1), 1);
});

test("there are numbers until names come", () => {
  const runs = new Runs();
  const run = runs.receive(message());
  assert.deepEqual(run.layers, ["layer 1", "layer 2"]);
  assert.deepEqual([run.labels, run.blocks, run.groups], [run.layers, run.layers, {}]);
  const names = { layers: LAYERS, labels: ["down 0.0 self to_q", "mid.0 res conv1"], blocks: ["down 0", "mid"],
    groups: { all: [0, 1], conv: [1] }, styles: STYLES };
  runs.receive(message({ columns: [1], names }));
  const { layers, labels, blocks, groups, styles } = run;
  assert.deepEqual({ layers, labels, blocks, groups, styles }, names);
});

test("a new run replaces the one before; another prompt also replaces other adapters of its node", () => {
  const runs = new Runs();
  runs.receive(message({ run: "a", adapter: "ink" }));
  runs.receive(message({ run: "b", adapter: "gold" }));
  runs.receive(message({ run: "c", adapter: "ink" }));
  assert.deepEqual(runs.all().map((run) => run.id), ["b", "c"]);
  runs.receive(message({ run: "other node", node: "5:7", prompt: "p2" }));
  runs.receive(message({ run: "other workflow", workflow: "w2", prompt: "p2" }));
  runs.receive(message({ run: "d", adapter: "ink", prompt: "p2" }));
  assert.deepEqual(runs.all().map((run) => run.id), ["other node", "other workflow", "d"]);
});

test("a snapshot stays as it was", () => {
  const runs = new Runs();
  const held = runs.receive(message({ columns: [0] })).snapshot();
  const run = runs.receive(message({ columns: [1], end: "finished" }));
  assert.deepEqual([held.columns.size, held.end, held.value(0, "positive", 0, 0)], [1, "", 0.5]);
  assert.deepEqual([run.columns.size, run.end], [2, "finished"]);
});

test("old runs are forgotten", () => {
  const runs = new Runs();
  for (let node = 0; node < 100; node++) runs.receive(message({ node: String(node), run: `run ${node}` }));
  assert.equal(runs.all().length, 32);
  assert.equal(runs.all()[31].node, "99");
});

test("a message with too few values is an error that says how many", () => {
  assert.throws(() => new Runs().receive({ ...message(), values: "AAAA" }), /ink: the message has 3 values, its columns call for 8/);
});

test("runs of before come back, but not in place of newer ones", () => {
  const before = new Runs();
  const [one, two] = ["1", "2"].map((node) => before.receive(message({ node })));
  const now = new Runs();
  const newer = now.receive(message({ node: "2", run: "newer" }));
  now.add([one, two]);
  assert.deepEqual(now.all(), [one, newer]);
});
