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
])) {
  test(`"${text}" chooses ${expected.length}`, () => assert.deepEqual(filterLayers(NAMES, text, [2, 3, 5]), expected));
}
