"""Fixtures for tests in a real browser: the server with the pack, Chromium, and an editor open in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import chromium
import comfyui
import pytest
from comfy_process import ComfyProcess
from editor import Editor, Windows

CHROMIUM_ARGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyProcess]:
    """The running server."""
    with ComfyProcess(
        root=comfyui.find_comfyui(),
        python=comfyui.server_python(),
        base=tmp_path_factory.mktemp("comfyui"),
        packs={"ComfyUI-StyleInject": comfyui.REPO},
        cpu=comfyui.on_cpu(),
    ) as running:
        yield running


@pytest.fixture(scope="module")
def windows(server: ComfyProcess) -> Iterator[Windows]:
    """A browser, see ``Windows``.

    Not for the whole session: while Playwright runs, this thread has an event loop, which other tests start themselves.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium.find_chromium(), args=CHROMIUM_ARGS)

        yield Windows(browser, server.url)
        browser.close()


@pytest.fixture
def open_editor(windows: Windows) -> Iterator[Callable[..., Editor]]:
    """``open_editor(vue_nodes=False)``: the window, with nothing noted yet. At the end, nothing in the pack's code may have raised."""
    opened: list[Editor] = []

    def open_it(vue_nodes: bool = False) -> Editor:
        editor = windows(vue_nodes)
        editor.messages.clear()
        editor.problems.clear()
        opened.append(editor)
        return editor

    yield open_it
    assert not [problem for editor in opened for problem in editor.problems]


@pytest.fixture
def adapter_file(server: ComfyProcess) -> Callable[[str, dict[str, str]], str]:
    """``adapter_file("name", metadata)``: the demo's line art adapter under another name and with more metadata."""

    def make(name: str, metadata: dict[str, str]) -> str:
        from safetensors import safe_open
        from safetensors.torch import save_file

        source = comfyui.REPO / "styleinject_core" / "demo" / "assets" / "adapters" / "emoji-openmoji-line.safetensors"
        folder = server.base / "models" / "styleinject"
        folder.mkdir(parents=True, exist_ok=True)
        with safe_open(source, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            save_file(tensors, folder / f"{name}.safetensors", {**file.metadata(), **metadata})
        return f"{name}.safetensors"

    return make


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Show the end of the server's log beside a failed test."""
    report = (yield).get_result()
    running = getattr(item, "funcargs", {}).get("server")
    if report.failed and isinstance(running, ComfyProcess):
        report.sections.append(("ComfyUI's log", running.log(60)))
