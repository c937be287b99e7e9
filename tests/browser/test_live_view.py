"""The router live: a monitor's panel in ComfyUI's editor, in both of its ways to draw nodes."""

from __future__ import annotations

import io
import itertools
import json
import re
import time
from collections.abc import Callable

import comfyui
import pytest
from client import Client
from comfy_process import ComfyProcess
from editor import Editor, Windows
from PIL import Image
from ui_workflow import to_prompt
from workflows import monitor_ids, monitored

from styleinject_core import load_adapter
from styleinject_core.demo.styles import adapter_path

SEEDS = itertools.count(1)  # ComfyUI samples again only if something has changed
VERSION = tuple(int(part) for part in re.findall(r"\d+", comfyui.comfyui_version(comfyui.find_comfyui()))[:2])
HTML = "<img src=x onerror=window.hacked=1><b>bold</b>"
# In 0.3.64 Vue nodes are an experiment that does not draw every workflow.
both_ways = pytest.mark.parametrize(
    "vue_nodes", [False, True][: 1 + (VERSION >= (0, 8))], ids=["canvas", "vue"][: 1 + (VERSION >= (0, 8))]
)


def expected(editor: Editor, node: str, step: int, layer: int, style: int) -> float:
    """A probability for the positive prompt, as the server has sent it."""
    return editor.values(node)[step]["positive"][layer][style] / 254


@both_ways
def test_the_heat_map_fills_and_can_be_read_and_saved(open_editor: Callable[..., Editor], vue_nodes: bool) -> None:
    editor = open_editor(vue_nodes)
    workflow = monitored("one", next(SEEDS), steps=16)
    editor.load(workflow)
    assert editor.panel().locator(".hint").is_visible()
    empty = editor.colors()
    editor.queue()
    editor.wait_for_status("step 16 of 16, finished")
    seen = [int(match[1]) for text in editor.said() if (match := re.search(r"step (\d+) of 16, sampling", text))]
    assert len(set(seen)) > 2 and seen == sorted(seen), "it fills step by step"
    assert not editor.panel().locator(".hint").is_visible()
    assert editor.colors() > empty + 10
    pixels, shown = editor.panel().locator("canvas").evaluate("(canvas) => [canvas.width, canvas.clientWidth]")
    assert pixels >= shown, "drawn small while zoomed out, it would be blurred when zoomed in"
    (node,) = monitor_ids(workflow)
    values = editor.values(node)
    assert set(values) == set(range(16)) and set(values[0]) == {"positive", "negative"}

    canvas = editor.panel().locator("canvas")
    styles, layers = len(values[0]["positive"][0]), len(values[0]["positive"])
    canvas.hover()
    found = re.search(r"step (\d+), sigma [\d.]+, positive: (.+) ([\d.]+), mean of (\d+) layers", editor.status())
    assert found, editor.status()
    named = load_adapter(adapter_path("openmoji-line")).style_names
    step, style = int(found[1]) - 1, named.index(found[2])
    mean = sum(expected(editor, node, step, layer, style) for layer in range(layers)) / layers
    assert abs(mean - float(found[3])) < 0.002 and int(found[4]) == layers and style < styles

    editor.choose("What to show", f"{named[1]}, per layer")
    editor.choose("For which prompt", "negative")
    editor.panel().get_by_title("Which layers").fill("up & to_q")
    canvas.hover()
    found = re.search(
        rf"step (\d+), sigma [\d.]+, negative, (up_blocks\S+to_q): {named[1]} ([\d.]+); leading ({'|'.join(named)})",
        editor.status(),
    )
    assert found, editor.status()
    names = next(message["names"] for message in editor.messages if "names" in message)
    shown = values[int(found[1]) - 1]["negative"][names["layers"].index(found[2])][1] / 254
    assert abs(shown - float(found[3])) < 0.002

    with editor.page.expect_download() as download:
        editor.panel().get_by_text("PNG").click()
    assert download.value.suggested_filename == "router_emoji-openmoji-line_negative.png"
    with Image.open(io.BytesIO(download.value.path().read_bytes())) as picture:
        assert picture.width == 2000 and len(picture.convert("RGB").getcolors(1 << 24)) > 20
        assert picture.convert("RGB").getpixel((1, 1)) == (255, 255, 255)


@both_ways
def test_nothing_of_it_is_saved_in_the_workflow(open_editor: Callable[..., Editor], vue_nodes: bool) -> None:
    """After a reload the browser shows the last run again, another browser has the panel with a hint, and the widgets keep
    their places."""
    editor = open_editor(vue_nodes)
    workflow = monitored("saved", next(SEEDS), steps=4)
    editor.load(workflow)
    editor.queue()
    editor.wait_for_status("finished")
    saved = editor.saved()
    widgets = {node["type"]: node.get("widgets_values") for node in saved["nodes"]}
    assert widgets["StyleInjectRouterMonitor"] == ["all"]
    assert widgets["KSampler"] == next(node["widgets_values"] for node in workflow["nodes"] if node["type"] == "KSampler")
    assert "router_live" not in json.dumps(saved)
    editor.load(saved)  # within the same page the last run is still there
    editor.wait_for_status("finished")
    colors = editor.colors()
    editor.reload()
    editor.load(saved)
    editor.wait_for_status("step 4 of 4, finished")
    assert editor.colors() == colors
    editor.page.evaluate("() => new Promise((done) => { indexedDB.deleteDatabase('styleinject').onsuccess = done; })")
    editor.reload()
    editor.load(saved)
    assert editor.panel().locator(".hint").is_visible()
    assert editor.status() == ""


def test_names_from_a_file_are_text(open_editor: Callable[..., Editor], adapter_file) -> None:
    name = adapter_file("html", {"styleinject.style_names": json.dumps([HTML, "gold"])})
    editor = open_editor()
    editor.load(monitored("html", next(SEEDS), adapter=name))
    editor.queue()
    editor.wait_for_status("finished")
    assert HTML in editor.panel().get_by_title("What to show").inner_text()
    editor.choose("What to show", f"{HTML}, per layer")
    editor.panel().locator("canvas").hover()
    assert HTML in editor.status()
    assert editor.panel().locator("img, b").count() == 0
    assert editor.page.evaluate("() => window.hacked") is None


def test_several_monitors_show_their_own(open_editor: Callable[..., Editor]) -> None:
    editor = open_editor()
    workflow = monitored("several", next(SEEDS), monitors=3, steps=6)
    editor.load(workflow)
    editor.queue()
    for index in range(3):
        editor.wait_for_status("step 6 of 6, finished", index)
    assert {message["node"] for message in editor.messages} == set(monitor_ids(workflow))
    assert len({message["run"] for message in editor.messages}) == 3
    editor.choose("What to show", "how decided, per layer", 1)
    assert "all styles" in [editor.panel(0).get_by_title("What to show").input_value()]


@both_ways
def test_a_monitor_in_a_subgraph(open_editor: Callable[..., Editor], vue_nodes: bool) -> None:
    editor = open_editor(vue_nodes)
    workflow = monitored("subgraph", next(SEEDS), steps=6)
    (inner,) = monitor_ids(workflow)
    editor.load(workflow)
    outer = editor.page.evaluate(
        """(id) => {
          const graph = window.app.rootGraph ?? window.app.graph;
          return String(graph.convertToSubgraph(new Set([graph.getNodeById(id)])).node.id);
        }""",
        inner,
    )
    editor.queue()
    editor.page.wait_for_function(
        "() => !window.app.canvas.graph.nodes.some((node) => node.type === 'StyleInjectRouterMonitor')"
    )
    editor.page.evaluate(
        """(id) => {
          const node = (window.app.rootGraph ?? window.app.graph).getNodeById(id);
          window.app.canvas.openSubgraph(node.subgraph, node);
        }""",
        outer,
    )
    editor.wait_for_status("step 6 of 6, finished")
    assert len({message["node"] for message in editor.messages}) == 1
    assert re.fullmatch(rf"{outer}:\d+", editor.messages[0]["node"])


def test_pause_holds_the_picture(open_editor: Callable[..., Editor]) -> None:
    editor = open_editor()
    editor.load(monitored("pause", next(SEEDS), steps=40))
    editor.queue()
    editor.wait_for_status("sampling")
    editor.panel().get_by_text("Pause").click()
    held = editor.status()
    assert "paused" in held
    editor.page.wait_for_timeout(1000)
    editor.panel().get_by_title("Which layers").fill("up")
    editor.page.wait_for_timeout(100)
    assert editor.status() == held, "a change of what is shown does not bring in later steps"
    editor.panel().get_by_text("Resume").click()
    editor.wait_for_status("step 40 of 40, finished")


def test_a_reload_in_mid_run_shows_the_rest_and_an_interrupt_is_said(
    open_editor: Callable[..., Editor], server: ComfyProcess
) -> None:
    editor = open_editor()
    workflow = monitored("long", next(SEEDS), steps=2000)
    editor.load(workflow)
    editor.queue()
    editor.wait_for_status("sampling")
    editor.reload()
    editor.load(workflow)
    editor.wait_for_status("sampling")
    assert "layer 1" not in editor.status()
    editor.page.wait_for_timeout(2500)  # names come again every two seconds
    editor.choose("What to show", "how decided, per layer")
    Client(server.url).interrupt()
    editor.wait_for_status("interrupted")
    reached = int(re.search(r"step (\d+) of 2000", editor.status())[1])
    assert 1 < reached < 2000
    assert "names" in editor.messages[-1]


def test_another_workflow_with_the_same_node_ids_shows_nothing(open_editor: Callable[..., Editor]) -> None:
    editor = open_editor()
    editor.load(monitored("first", next(SEEDS), steps=6))
    editor.queue()
    editor.wait_for_status("finished")
    editor.load(monitored("second", next(SEEDS), steps=6))
    editor.page.wait_for_timeout(500)
    assert editor.panel().locator(".hint").is_visible()


def test_without_a_browser_it_runs_all_the_same(windows: Windows, server: ComfyProcess) -> None:
    windows.close()
    client = Client(server.url)
    prompt = to_prompt(monitored("no browser", next(SEEDS), steps=4), client.object_info())
    prompt_id = client.post("/prompt", {"prompt": prompt})["prompt_id"]
    deadline = time.monotonic() + 60
    while not (entry := client.get_json(f"/history/{prompt_id}").get(prompt_id)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert entry["status"]["status_str"] == "success"
