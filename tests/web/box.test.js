import assert from "node:assert/strict";
import { test } from "node:test";
import { heightOf } from "../../web/js/text/box.js";

test("a box is as high as its lines", () => {
  const [one, two, three] = ["a", "a\nb", "a\nb\n"].map((text) => heightOf(text, 300));
  assert.ok(one < two && two < three);
  assert.equal(three - two, two - one);
});

test("long lines count as often as they are wrapped, more of them in a narrower node", () => {
  const text = "x".repeat(100);
  assert.ok(heightOf(text, 300) > heightOf("x", 300));
  assert.ok(heightOf(text, 200) > heightOf(text, 600));
});

test("a box does not grow beyond its limit", () => {
  assert.equal(heightOf("a\n".repeat(100), 300), heightOf("a\n".repeat(1000), 300));
});
