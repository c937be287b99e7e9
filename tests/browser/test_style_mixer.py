"""The style mixer's sliders carry the names of the adapter's styles, in both ways to draw nodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from editor import TIMEOUT, Editor
from test_live_view import HTML, both_ways

EXAMPLE = Path(__file__).parents[2] / "example_workflows" / "router_monitor.json"
LABELS = """() => {
  const graph = window.app.rootGraph ?? window.app.graph;
  const mixer = graph.nodes.find((node) => node.type === 'StyleInjectStyleMixer');
  return mixer.widgets.slice(0, 5).map((widget) => widget.label);
}"""


@both_ways
@pytest.mark.usefixtures("server")
def test_sliders_are_named(open_editor: Callable[..., Editor], adapter_file: Callable[..., str], vue_nodes: bool) -> None:
    name = adapter_file("mixer", {"styleinject.style_names": json.dumps([HTML, "gold"])})
    workflow = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    next(node for node in workflow["nodes"] if node["type"] == "StyleInjectLoader")["widgets_values"] = [name]
    editor = open_editor(vue_nodes)
    editor.load(workflow)
    editor.queue()
    editor.page.wait_for_function(f"() => ({LABELS})()[0]?.startsWith('1: ')", timeout=TIMEOUT)
    assert editor.page.evaluate(LABELS) == [f"1: {HTML}", "2: gold", "style 3", "style 4", "5: –"]
    assert editor.page.evaluate("() => window.hacked") is None
    if vue_nodes:
        editor.page.get_by_text("2: gold").wait_for()
    assert not editor.problems
