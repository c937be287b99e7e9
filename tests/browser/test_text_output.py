"""What nodes say is shown in them, in both ways to draw nodes, and is there again after a reload."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from editor import TIMEOUT, Editor
from test_live_view import HTML, SEEDS, both_ways
from workflows import LINE_ART, Workflow

# Of every node with a box: its type and the text in it, if it can be seen.
TEXTS = """() => {
  const graph = window.app.rootGraph ?? window.app.graph;
  return Object.fromEntries(graph.nodes.flatMap((node) => {
    const element = node.widgets?.find((widget) => widget.name === 'styleinject_text')?.element;
    const seen = element?.isConnected && element.checkVisibility() && element.clientHeight > 10;
    return element ? [[node.type, seen ? element.textContent : '(not seen)']] : [];
  }));
}"""


def talking(name: str, seed: int, adapter: str = LINE_ART) -> dict[str, Any]:
    """A workflow of nodes that have something to say."""
    workflow = Workflow(name)
    kind = (0, "STYLEINJECT_ADAPTER")
    model = workflow.node("StyleInjectDemoModel", (0, 0), (270, 110), "openmoji")
    loader = workflow.node("StyleInjectLoader", (0, 180), (300, 100), adapter)
    both = workflow.node("StyleInjectLoadAndApply", (0, 350), (300, 160), LINE_ART, 0.5 + seed / 1000, 1)  # not from the cache
    applied = workflow.node("StyleInjectApply", (700, 0), (320, 420), 1.0, 1.0, 1.0, 0.0, 1.0, "up", "as trained")
    info = workflow.node("StyleInjectInfo", (330, 0), (340, 300))
    named = workflow.node("StyleInjectNameStyles", (330, 400), (340, 260), "gold\nink", "")
    mixer = workflow.node("StyleInjectStyleMixer", (1050, 0), (320, 760), *([0.0] * 16), "all", "all")
    prompt = workflow.node("StyleInjectDemoPrompt", (0, 580), (300, 120), "turtle")
    latent = workflow.node("EmptyLatentImage", (0, 760), (300, 120), 64, 64, 1)
    sampler = workflow.node("KSampler", (700, 500), (320, 290), seed, "fixed", 1, 3.0, "euler", "normal", 1.0)
    decoded = workflow.node("StyleInjectDemoDecode", (1050, 820), (250, 100), 1)
    shown = workflow.node("PreviewImage", (1330, 820), (250, 270))
    workflow.link(model, (0, "MODEL"), both, "model")
    workflow.link(both, (0, "MODEL"), applied, "model")
    for target in (applied, info, named, mixer):
        workflow.link(loader, kind, target, "adapter")
    workflow.link(applied, (0, "MODEL"), sampler, "model")
    for name_of_input in ("positive", "negative"):
        workflow.link(prompt, (0, "CONDITIONING"), sampler, name_of_input)
    workflow.link(latent, (0, "LATENT"), sampler, "latent_image")
    workflow.link(sampler, (0, "LATENT"), decoded, "samples")
    workflow.link(decoded, (0, "IMAGE"), shown, "images")
    return workflow.content


def widget_values(workflow: dict[str, Any]) -> dict[str, Any]:
    return {node["type"]: node.get("widgets_values") or [] for node in workflow["nodes"]}


@both_ways
def test_texts_are_shown_and_stay(open_editor: Callable[..., Editor], adapter_file, vue_nodes: bool) -> None:
    """Where the nodes say something it is seen in them, also after the page has been loaded anew; widgets keep their places."""
    name = adapter_file(f"talking{vue_nodes}", {"modelspec.description": HTML})
    editor = open_editor(vue_nodes)
    workflow = talking("talking", next(SEEDS), name)
    editor.load(workflow)
    assert editor.page.evaluate(TEXTS) == {}
    editor.queue()
    editor.page.wait_for_function(f"() => Object.keys(({TEXTS})()).length === 5", timeout=TIMEOUT)
    editor.fit()
    texts = editor.page.evaluate(TEXTS)
    assert texts["StyleInjectLoadAndApply"] == "95 of 95 layers, StyleInject demo"
    assert texts["StyleInjectApply"] == "95 of 95 layers, StyleInject demo\n53 of them chosen by layers"
    assert HTML in texts["StyleInjectInfo"] and "parameters   857,804" in texts["StyleInjectInfo"]
    assert texts["StyleInjectNameStyles"].startswith("1  gold\n2  ink\n")
    assert "the router decides" in texts["StyleInjectStyleMixer"]
    assert editor.page.evaluate("() => window.hacked") is None

    saved = editor.saved()
    assert widget_values(saved) == widget_values(workflow)
    editor.reload()
    editor.load(json.loads(json.dumps(saved)))
    assert editor.page.evaluate(TEXTS) == texts
    assert widget_values(editor.saved()) == widget_values(workflow)


def test_a_later_run_replaces_the_text(open_editor: Callable[..., Editor]) -> None:
    editor = open_editor()
    editor.load(talking("replaced", next(SEEDS)))
    editor.queue()
    found = f"() => ({TEXTS})()['StyleInjectNameStyles']?.startsWith('1  gold')"
    editor.page.wait_for_function(found, timeout=TIMEOUT)
    editor.page.evaluate("""() => {
      const graph = window.app.rootGraph ?? window.app.graph;
      graph.nodes.find((node) => node.type === 'StyleInjectNameStyles').widgets[0].value = 'silver';
    }""")
    editor.queue()
    editor.page.wait_for_function(found.replace("gold", "silver"), timeout=TIMEOUT)
    boxes = editor.page.evaluate("""() => (window.app.rootGraph ?? window.app.graph).nodes
      .find((node) => node.type === 'StyleInjectNameStyles').widgets.filter((widget) => widget.name === 'styleinject_text').length""")
    assert boxes == 1


@both_ways
def test_old_names_of_the_demos_adapters_are_no_error(open_editor: Callable[..., Editor], vue_nodes: bool) -> None:
    """A workflow of the first versions names them without "demo/"; the editor would mark that as a missing model."""
    editor = open_editor(vue_nodes)
    editor.load(talking("old", next(SEEDS), LINE_ART.removeprefix("demo/")))
    assert widget_values(editor.saved())["StyleInjectLoader"] == [LINE_ART]
    assert not editor.page.get_by_text("missing", exact=False).filter(visible=True).count()
