"""The style mixer has the sliders that the adapter has styles, with their names, in both ways to draw nodes and after a reload."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from editor import TIMEOUT, Editor
from test_live_view import HTML, both_ways

EXAMPLE = Path(__file__).parents[2] / "example_workflows" / "10 See and steer the style router.json"
LABELS = """() => {
  const graph = window.app.rootGraph ?? window.app.graph;
  const mixer = graph.nodes.find((node) => node.type === 'StyleInjectStyleMixer');
  return mixer.widgets.slice(0, 5).map((widget) => (widget.hidden ? '(hidden)' : widget.label));
}"""

# Choose another file in the loader, as a click on its list does.
CHOOSE = """(name) => {
  const loader = (window.app.rootGraph ?? window.app.graph).nodes.find((node) => node.type === 'StyleInjectLoader');
  const widget = loader.widgets.find((widget) => widget.name === 'adapter_name');
  widget.value = name;
  widget.callback?.(name);
}"""
RAN = """() => (window.app.rootGraph ?? window.app.graph).nodes
  .some((node) => node.type === 'StyleInjectStyleMixer' && node.properties.styleinject_text)"""


@both_ways
@pytest.mark.usefixtures("server")
def test_sliders_are_named(open_editor: Callable[..., Editor], adapter_file: Callable[..., str], vue_nodes: bool) -> None:
    name = adapter_file("mixer", {"styleinject.style_names": json.dumps([HTML, "gold"])})
    workflow = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    next(node for node in workflow["nodes"] if node["type"] == "StyleInjectLoader")["widgets_values"] = [name]
    editor = open_editor(vue_nodes)
    editor.load(workflow)
    expected = [f"1: {HTML}", "2: gold", "style 3", "style 4", "(hidden)"]
    editor.page.wait_for_function(f"() => ({LABELS})()[0]?.startsWith('1: ')", timeout=TIMEOUT)
    assert editor.page.evaluate(LABELS) == expected, "before anything has run"
    editor.page.evaluate(CHOOSE, "demo/emoji-twemoji.safetensors")
    editor.page.wait_for_function(f"() => ({LABELS})()[1] === '2: dark, firm'", timeout=TIMEOUT)
    editor.page.evaluate(CHOOSE, name)
    editor.page.wait_for_function(f"() => ({LABELS})()[1] === '2: gold'", timeout=TIMEOUT)
    editor.queue()
    editor.page.wait_for_function(f"() => ({RAN})()", timeout=TIMEOUT)
    assert editor.page.evaluate(LABELS) == expected
    assert editor.page.evaluate("() => window.hacked") is None
    if vue_nodes:
        editor.page.get_by_text("2: gold").wait_for()
        assert editor.page.get_by_text("style_5", exact=True).count() == editor.page.get_by_text("5: –").count() == 0
    saved = editor.saved()
    (mixer,) = [node for node in saved["nodes"] if node["type"] == "StyleInjectStyleMixer"]
    assert len(mixer["widgets_values"]) == 18, "hidden sliders keep their places"
    editor.reload()
    editor.load(saved)
    assert editor.page.evaluate(LABELS) == expected
    assert not editor.problems
