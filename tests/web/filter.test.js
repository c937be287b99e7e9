import assert from "node:assert/strict";
import { test } from "node:test";

import { filterLayers } from "../../web/js/router/filter.js";

const NAMES = [
  "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
  "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v",
  "down_blocks.1.downsamplers.0.conv",
  "mid_block.resnets.0.conv1",
  "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q",
  "up_blocks.1.upsamplers.0.conv",
];

/** As the server sends them: every word, also those that choose nothing here, and the blocks. */
const GROUPS = {
  all: [0, 1, 2, 3, 4, 5], attention: [0, 1, 4], conv: [2, 3, 5], linear: [0, 1, 4], self: [0], cross: [1, 4], "feed-forward": [],
  down: [0, 1, 2], mid: [3], up: [4, 5], "down.0": [0], "down.1": [1, 2], "up.1": [4, 5],
};

for (const [text, expected] of /** @type {[string, number[]][]} */ ([
  ["", [0, 1, 2, 3, 4, 5]],
  ["all", [0, 1, 2, 3, 4, 5]],
  [" , ", [0, 1, 2, 3, 4, 5]],
  ["attention", [0, 1, 4]],
  ["self", [0]],
  ["cross & up", [4]],
  ["up, mid", [3, 4, 5]],
  ["down.1", [1, 2]],
  ["up, !conv", [4]],
  ["!attention", [2, 3, 5]],
  ["down & !attention", [2]],
  ["to_q", [0, 4]],
  ["conv", [2, 3, 5]],
  ["linear & down", [0, 1]],
  ["samplers", [2, 5]],
  ["nothing like it", []],
  ["constructor", []],
  ["!", [0, 1, 2, 3, 4, 5]],
  ["up &", [4, 5]],
  ["feed-forward", []],
  ["down.0-1", [0, 1, 2]],
  ["down.1-7, mid", [1, 2, 3]],
  ["down.5-7", []],
  ["! down", [3, 4, 5]],
])) {
  test(`"${text}" chooses ${expected.length}`, () => assert.deepEqual(filterLayers(NAMES, text, GROUPS), expected));
}

test("blocks of a transformer, by number and by range", () => {
  const names = [0, 1, 9, 10].map((block) => `transformer_blocks.${block}.attn.to_q`).concat("single_transformer_blocks.1.proj_mlp");
  const groups = { "block.0": [0], "block.1": [1], "block.9": [2], "block.10": [3], "single.1": [4] };
  assert.deepEqual(filterLayers(names, "block.1", groups), [1]);
  assert.deepEqual(filterLayers(names, "blocks.1", groups), [1]);
  assert.deepEqual(filterLayers(names, "blocks.1-9, single.0-5", groups), [1, 2, 4]);
});
