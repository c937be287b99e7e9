"""The registry's archive in a ComfyUI of its own: it loads, every node has its help page, and the editor shows one."""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Iterator

import comfyui
import pytest
from archive import pack, unpack
from client import Client
from comfy_process import ComfyProcess
from editor import TIMEOUT, Editor
from workflows import monitored

pytest.importorskip("pathspec")
INFO = "[data-testid=info-button], .selection-toolbox button:has(.pi-question-circle)"  # over a chosen node
FOLDER = "styleinject"  # what ComfyUI-Manager makes of the package's name


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyProcess]:
    """A server with the archive's files and nothing else of this repository."""
    archive = pack(tmp_path_factory.mktemp("archive") / "node.zip")
    unpacked = unpack(archive, tmp_path_factory.mktemp("unpacked") / FOLDER)
    with ComfyProcess(
        root=comfyui.find_comfyui(),
        python=comfyui.server_python(),
        base=tmp_path_factory.mktemp("comfyui"),
        packs={FOLDER: unpacked},
        cpu=comfyui.on_cpu(),
    ) as running:
        yield running


def test_every_node_has_a_help_page(server: ComfyProcess) -> None:
    client = Client(server.url)
    nodes = [name for name, info in client.object_info().items() if info["python_module"] == f"custom_nodes.{FOLDER}"]
    assert len(nodes) >= 29
    for name in nodes:
        page = client.get(f"/extensions/{FOLDER}/docs/{name}.md").decode("utf-8")
        assert len(page) > 200, f"{name}: {page!r}"


def test_every_template_and_its_picture_are_served(server: ComfyProcess) -> None:
    client = Client(server.url)
    names = client.get_json("/workflow_templates")[FOLDER]
    assert len(names) >= 7
    for name in names:
        address = f"/api/workflow_templates/{FOLDER}/{urllib.parse.quote(name)}"
        assert client.get_json(f"{address}.json")["nodes"]
        assert client.get(f"{address}.jpg")[:2] == b"\xff\xd8"


def test_the_editor_opens_a_help_page(open_editor: Callable[..., Editor]) -> None:
    editor = open_editor()
    editor.load(monitored("help", 1))
    editor.page.evaluate("""() => {
      const graph = window.app.rootGraph ?? window.app.graph;
      const node = graph.nodes.find((node) => node.type === 'StyleInjectLoadAndApply');
      window.app.canvas.selectNode(node);
    }""")
    editor.page.wait_for_timeout(300)
    editor.page.locator(INFO).first.click(timeout=TIMEOUT)
    editor.page.get_by_text("choose a file, set the strength", exact=False).first.wait_for(timeout=TIMEOUT)
