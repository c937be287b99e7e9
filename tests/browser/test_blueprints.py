"""The pack's subgraph blueprints: the editor finds them, and what they place runs on the embedded model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfy_process import ComfyProcess
from editor import TIMEOUT, Editor
from test_live_view import VERSION

FOLDER = Path(__file__).parents[2] / "subgraphs"
EMPTY = {"nodes": [], "links": [], "version": 0.4, "last_node_id": 0, "last_link_id": 0}
SMALL = {"width": 64, "height": 64}
TRAINING = {"size": 64, "steps": 2, "name": "from_blueprint", "learning_rate": 1e-3, **SMALL}
# Blueprint -> what its widgets are set to.
BLUEPRINTS: dict[str, dict[str, Any]] = {
    "Draw with and without a style": {
        "adapter_name": "demo/emoji-openmoji-line.safetensors", "prompt": "turtle", "negative": "", **SMALL,
    },
    "Train a style from a folder of pictures": {"prompts": "turtle\nstrawberry", **TRAINING},
    "Train one subject from five photos": {
        "prompts": "jack, cat face", "class": "cat face", "caption": "cat face", "trigger": "jack", "class_images": 2, **TRAINING,
    },
}  # fmt: skip
# Connect the demo model to the only node, show its first two outputs, and set its widgets.
SET_UP = """(values) => {
  const graph = window.app.rootGraph ?? window.app.graph, [node] = graph.nodes;
  const add = (type) => { const one = window.LiteGraph.createNode(type); graph.add(one); return one; };
  const model = add('StyleInjectDemoModel');
  for (const name of ['MODEL', 'CLIP', 'VAE']) {
    const from = model.outputs.findIndex((output) => output.name === name);
    model.connect(from, node, node.inputs.findIndex((input) => input.name === name.toLowerCase()));
  }
  for (const slot of [0, 1]) node.connect(slot, add('PreviewImage'), 0);
  for (const [name, value] of Object.entries(values)) {
    const widget = node.widgets.find((widget) => widget.name === name);
    if (!widget) throw new Error(`no widget ${name}: ${node.widgets.map((widget) => widget.name)}`);
    widget.value = value;
    widget.callback?.(value);
  }
}"""
SHOWN = """() => (window.app.rootGraph ?? window.app.graph).nodes
  .filter((node) => node.type === 'PreviewImage').every((node) => node.imgs?.length || window.app.nodeOutputs[node.id]?.images?.length)"""
pytestmark = pytest.mark.skipif(VERSION < (0, 33), reason="older versions do not list the blueprints of packs")


def test_they_are_served(server: ComfyProcess, open_editor: Callable[..., Editor]) -> None:
    listed = open_editor(True).client.get_json("/global_subgraphs").values()
    ours = {entry["name"] for entry in listed if entry["info"]["node_pack"].startswith("custom_nodes.")}
    assert ours == set(BLUEPRINTS) == {path.stem for path in FOLDER.glob("*.json")}


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_they_are_found_placed_and_run(server: ComfyProcess, open_editor: Callable[..., Editor], name: str) -> None:
    editor = open_editor(True)
    page = editor.page
    editor.load(EMPTY)
    for _ in range(2):  # it may think that it is still open
        page.evaluate("() => window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
        page.wait_for_timeout(1000)
        if page.evaluate("() => document.activeElement?.tagName === 'INPUT'"):
            break
    page.keyboard.type(name[:18], delay=10)  # of more than 32 letters the search finds nothing
    page.get_by_role("option").filter(has_text=name).first.click(timeout=TIMEOUT)
    page.wait_for_timeout(500)
    page.mouse.click(700, 300)
    page.wait_for_function("() => (window.app.rootGraph ?? window.app.graph).nodes.length === 1", timeout=TIMEOUT)
    page.evaluate(SET_UP, BLUEPRINTS[name])
    page.evaluate("() => window.app.queuePrompt(0)")
    page.wait_for_function(SHOWN, timeout=TIMEOUT)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_their_nodes_say_where_they_come_from(path: Path) -> None:
    (inner,) = json.loads(path.read_text(encoding="utf-8"))["definitions"]["subgraphs"]
    assert inner["name"] == path.stem and inner["description"] and inner["category"].startswith("StyleInject")
    for node in inner["nodes"]:
        ours = node["type"].startswith("StyleInject")
        assert node["properties"]["cnr_id"] == ("styleinject" if ours else "comfy-core")
