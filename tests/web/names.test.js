import assert from "node:assert/strict";
import { test } from "node:test";
import { todaysName } from "../../web/js/adapters/names.js";

const NAMES = ["mine.safetensors", "demo/emoji.safetensors", "demo/mine.safetensors"];

test("the demo's adapters get their folder", () => {
  assert.equal(todaysName("emoji.safetensors", NAMES), "demo/emoji.safetensors");
});

test("other names stay, also those of files that are gone", () => {
  for (const name of ["mine.safetensors", "demo/emoji.safetensors", "gone.safetensors"]) assert.equal(todaysName(name, NAMES), name);
});
