import assert from "node:assert/strict";
import test from "node:test";

import { sliders } from "../../web/js/router/labels.js";

const widgets = (/** @type {Record<string, unknown>} */ values) => Object.entries(values).map(([name, value]) => ({ name, value }));

test("sliders carry the names of the styles, and those beyond are hidden", () => {
  const found = sliders(widgets({ style_1: 0.5, style_2: 0, style_3: 0, role: "all" }), ["style 1", "<b>ink</b>"]);
  assert.deepEqual([...found], [
    ["style_1", { label: "style 1", when: "shown" }],
    ["style_2", { label: "2: <b>ink</b>", when: "shown" }],
    ["style_3", { label: "3: –", when: "hidden" }],
  ]);
});

test("a slider beyond the styles that is not at 0 stays in sight", () => {
  assert.equal(sliders(widgets({ style_7: 0.2 }), ["ink"]).get("style_7")?.when, "shown");
});

test("without an adapter they are called as ever, and all but a few wait to be asked for", () => {
  const found = sliders(widgets({ style_4: 0, style_10: 0, style_11: 1, layers: "all" }), []);
  assert.deepEqual([...found.values()], [
    { label: "style_4", when: "shown" },
    { label: "style_10", when: "asked" },
    { label: "style_11", when: "shown" },
  ]);
});
