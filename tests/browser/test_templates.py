"""The templates in the editor, in both ways to draw nodes: nothing overlaps, nothing is missing that is not offered."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from editor import TIMEOUT, Editor
from test_live_view import VERSION, both_ways

REPO = Path(__file__).parents[2]
TEMPLATES = sorted((REPO / "example_workflows").glob("*.json"))
REFERENCE_MODEL = REPO / "styleinject_core" / "demo" / "assets" / "deadiff" / "emoji-deadiff.safetensors"  # what 11 names
# The boxes of all nodes with their titles, in the canvas's own units: [left, top, width, height].
BOXES = """() => {
  const graph = window.app.rootGraph ?? window.app.graph;
  const {scale, offset} = window.app.canvas.ds;
  const canvas = window.app.canvas.canvas.getBoundingClientRect();
  return graph.nodes.map((node) => {
    const box = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
    const title = window.LiteGraph.NODE_TITLE_HEIGHT;
    return {name: node.title, box: box
      ? [(box.left - canvas.left) / scale - offset[0], (box.top - canvas.top) / scale - offset[1], box.width / scale, box.height / scale]
      : [node.pos[0], node.pos[1] - title, node.size[0], Math.max(node.size[1], node.computeSize()[1]) + title]};
  });
}"""
# Values of lists that are not in them, but for models that the editor offers to download, ComfyUI's own picture, and words
# that ask for a file of the user's.
MISSING = """() => (window.app.rootGraph ?? window.app.graph).nodes.flatMap((node) => (node.widgets ?? [])
  .filter((widget) => Array.isArray(widget.options?.values) && !widget.options.values.includes(widget.value))
  .filter((widget) => widget.value !== 'example.png' && !/^choose an? /.test(widget.value))
  .filter((widget) => !node.properties.models?.some((model) => model.name === widget.value && model.url))
  .map((widget) => `${node.title}: ${widget.value}`))"""

# Texts that a node of Nodes 2.0 shows only a part of: longer than their box, or a text area that would have to be scrolled.
CUT = """() => [...document.querySelectorAll('[data-node-id]')].flatMap((node) => [...node.querySelectorAll('span, textarea')]
  .filter((box) => box.clientWidth > 0 && box.children.length === 0 && (box.value || box.textContent))
  .filter((box) => box.scrollWidth > box.clientWidth + 1 || (box.tagName === 'TEXTAREA' && box.scrollHeight > box.clientHeight + 2))
  .map((box) => `${node.dataset.nodeId}: ${box.value || box.textContent}`))"""


def overlapping(nodes: list[dict[str, Any]]) -> list[tuple[str, str]]:
    def between(a: float, width: float, b: float, other: float) -> bool:
        return a < b + other and b < a + width

    found = []
    for index, one in enumerate(nodes):
        for two in nodes[index + 1 :]:
            (x, y, w, h), (u, v, m, n) = one["box"], two["box"]
            if between(x, w, u, m) and between(y, h, v, n):
                found.append((one["name"], two["name"]))
    return found


@both_ways
def test_templates_open_without_overlaps_and_errors(open_editor: Callable[..., Editor], vue_nodes: bool) -> None:
    editor = open_editor(vue_nodes)
    for path in TEMPLATES:
        editor.load(json.loads(path.read_text(encoding="utf-8")))
        nodes = editor.page.evaluate(BOXES)
        assert len(nodes) > 5 and all(node["box"][2] > 50 for node in nodes)
        assert overlapping(nodes) == [], path.stem
        if vue_nodes and VERSION >= (0, 33):
            assert editor.page.evaluate(CUT) == [], path.stem
        if REFERENCE_MODEL.is_file() or not path.stem.startswith("11 "):
            assert editor.page.evaluate(MISSING) == [], path.stem


def test_the_measure_finds_overlaps() -> None:
    apart = [{"name": "a", "box": [0, 0, 10, 10]}, {"name": "b", "box": [10, 0, 10, 10]}]
    assert overlapping(apart) == []
    assert overlapping([*apart, {"name": "c", "box": [5, 9, 10, 10]}]) == [("a", "c"), ("b", "c")]


def test_the_one_node_path_is_found_first(open_editor: Callable[..., Editor]) -> None:
    """What the editor's search lists first for the pack's name."""
    from playwright.sync_api import expect

    editor = open_editor()
    editor.page.evaluate("() => window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    editor.page.locator("input:focus").wait_for(timeout=TIMEOUT)  # a busy machine opens it later
    editor.page.keyboard.type("styleinject", delay=20)
    found = editor.page.get_by_role("listbox").get_by_role("option")  # a node may show a menu with options of its own
    expect(found.first).to_contain_text("Puts a style on a model", timeout=TIMEOUT)
    editor.page.keyboard.press("Escape")


@pytest.mark.skipif(VERSION < (0, 33), reason="the path that the README shows is that of newer versions")
def test_a_style_of_the_sample_pictures_is_four_clicks_away(open_editor: Callable[..., Editor]) -> None:
    editor = open_editor(True)
    page = editor.page

    def click(found: Any) -> None:
        found.first.click(timeout=TIMEOUT)
        page.wait_for_timeout(1000)

    click(page.get_by_role("button", name=re.compile("Tem.?plates")))
    click(page.get_by_role("dialog").get_by_text("ComfyUI-StyleInject", exact=True))
    click(page.get_by_text("04 Train a style from your pictures"))
    page.wait_for_function("() => (window.app.rootGraph ?? window.app.graph).nodes.length === 17", timeout=TIMEOUT)
    click(page.get_by_test_id("queue-button"))
    for _ in range(60):
        queue = editor.client.get_json("/queue")
        if running := [*queue["queue_running"], *queue["queue_pending"]]:
            break
        page.wait_for_timeout(500)
    assert "StyleInjectTrain" in {node["class_type"] for node in running[0][2].values()}
    editor.client.interrupt()
