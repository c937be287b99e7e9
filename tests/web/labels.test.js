import assert from "node:assert/strict";
import test from "node:test";

import { labels } from "../../web/js/router/labels.js";

test("sliders carry the names of the styles", () => {
  const found = labels(["style_1", "style_2", "style_3", "role"], ["style 1", "<b>ink</b>"]);
  assert.deepEqual([...found], [["style_1", "style 1"], ["style_2", "2: <b>ink</b>"], ["style_3", "3: –"]]);
});

test("without an adapter they are called as ever", () => {
  assert.deepEqual([...labels(["style_10", "layers"], [])], [["style_10", "style_10"]]);
});
