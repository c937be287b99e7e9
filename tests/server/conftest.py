"""Fixtures for tests against a real ComfyUI server: the process, a client, the small checkpoint.

One server is started for the whole session. A test that needs other arguments starts its own::

    def test_low_vram(start_server):
        with start_server("--novram") as server:
            Client(server.url).queue(...)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import checkpoints
import comfyui
import pytest
from client import Client
from comfy_process import ComfyProcess
from ui_workflow import to_prompt

PACK_NAME = "ComfyUI-StyleInject"
SMALL_MODELS = comfyui.REPO / "tests" / "server" / "small_models"


@pytest.fixture(scope="session")
def checkpoint() -> str:
    """The name of the small SD 1.5 checkpoint, as CheckpointLoaderSimple wants it."""
    return checkpoints.small_checkpoint().name


@pytest.fixture(scope="session")
def start_server(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ComfyProcess]:
    """``start_server("--novram", ...)``: a server with the pack and the small checkpoint; use it in a ``with``."""

    def start(*args: str) -> ComfyProcess:
        has_pack = (comfyui.REPO / "__init__.py").is_file()
        return ComfyProcess(
            root=comfyui.find_comfyui(),
            python=comfyui.server_python(),
            base=tmp_path_factory.mktemp("comfyui"),
            packs={PACK_NAME: comfyui.REPO, "SmallModels": SMALL_MODELS} if has_pack else {},
            checkpoints=[checkpoints.small_checkpoint()],
            cpu=comfyui.on_cpu(),
            args=args,
        )

    return start


@pytest.fixture(scope="session")
def server(start_server: Callable[..., ComfyProcess]) -> Iterator[ComfyProcess]:
    """The running server: ``url``, ``base`` (its base directory), ``log()``."""
    with start_server() as running:
        yield running


@pytest.fixture
def client(server: ComfyProcess) -> Client:
    """A client of the running server."""
    return Client(server.url)


@pytest.fixture
def example(client: Client) -> Callable[..., dict[str, dict[str, Any]]]:
    """``example("name.json")``: a workflow of ``example_workflows`` as a prompt for ``client.queue``."""

    def load(name: str) -> dict[str, dict[str, Any]]:
        return to_prompt(comfyui.REPO / "example_workflows" / name, client.object_info())

    return load


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Show the end of the server's log beside a failed test."""
    report = (yield).get_result()
    running = getattr(item, "funcargs", {}).get("server")
    if report.failed and isinstance(running, ComfyProcess):
        report.sections.append(("ComfyUI's log", running.log(60)))
