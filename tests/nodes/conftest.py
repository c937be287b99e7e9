"""Fixtures for tests inside ComfyUI: the pack's nodes loaded as ComfyUI loads them, and a tiny MODEL.

Importing this file makes ComfyUI importable (``import comfy``, ``import nodes``, ``import folder_paths``),
on the CPU, with an empty base directory of its own, so that no test sees or touches the user's models.
"""

from __future__ import annotations

import asyncio
import atexit
import inspect
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfyui
import pytest
import tiny_model
import training
from pack_loader import Pack, load_pack


def enter_comfyui(root: Path) -> Path:
    """Put ComfyUI first on ``sys.path``, set its arguments and return its base directory, a new folder.

    First, because this repository has a folder ``nodes`` too, and ComfyUI's ``nodes.py`` must win.
    """
    for name in ("nodes", "server", "folder_paths", "execution", "utils", "app"):
        module = sys.modules.get(name)
        if module is not None and root not in Path(getattr(module, "__file__", None) or "/").resolve().parents:
            raise RuntimeError(f"a module {name!r} that is not ComfyUI's is imported already: {module!r}")
    sys.path.insert(0, str(root))
    import comfy.cli_args  # parses no arguments unless main.py asks for it

    base = Path(tempfile.mkdtemp(prefix="styleinject-nodes-"))
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    for folder in ("models", "custom_nodes", "input", "output", "temp", "user"):
        (base / folder).mkdir()
    comfy.cli_args.args.cpu = comfyui.on_cpu()
    comfy.cli_args.args.base_directory = str(base)
    return base


try:
    BASE = enter_comfyui(comfyui.search().root) if not comfyui.problem("nodes") else None
except comfyui.NotAComfyUI:  # tests/conftest.py ends the run with the message
    BASE = None


@pytest.fixture(scope="session")
def comfy_base() -> Path:
    """ComfyUI's base directory in this process: ``models``, ``output`` and so on are in it, empty at first."""
    return BASE


@pytest.fixture(scope="session")
def pack() -> Pack:
    """The pack, loaded as ComfyUI loads it: ``pack["NodeId"]``, ``pack.submodule("integration.patcher")``."""
    return load_pack(comfyui.REPO)


@pytest.fixture(scope="session")
def run_node(pack: Pack) -> Callable[..., tuple]:
    """``run_node("NodeId", input=value, ...)``: execute a node and return the tuple of its outputs.

    Required inputs that are not given take their schema's default, as in the graph editor. What needs the
    server or hidden inputs belongs into ``tests/server``.
    """

    def run(node_id: str, /, **inputs: Any) -> tuple:
        import torch

        node = pack[node_id]
        specs = node.INPUT_TYPES()
        for name, spec in specs.get("required", {}).items():
            options = spec[1] if len(spec) > 1 else {}
            if name not in inputs and "default" in options:
                inputs[name] = [options["default"]] if node.INPUT_IS_LIST else options["default"]
        unknown = set(inputs) - set(specs.get("required", {})) - set(specs.get("optional", {}))
        if unknown:
            raise TypeError(f"{node_id} has no input {sorted(unknown)}")
        with torch.inference_mode():
            output = node.execute(**inputs)
            if inspect.isawaitable(output):
                output = asyncio.run(output)
        result = getattr(output, "result", output)
        return tuple(result) if result is not None else ()

    return run


@pytest.fixture(scope="session")
def tiny_unet_model() -> Callable[..., Any]:
    """``tiny_unet_model(seed=0, dtype=float32, **unet_config)``: see ``tiny_model.build_tiny_model``."""
    return tiny_model.build_tiny_model


@pytest.fixture(scope="session")
def sample() -> Callable[..., Any]:
    """``sample(model, seed=0, steps=3, ...)``: see ``tiny_model.sample``."""
    return tiny_model.sample


@pytest.fixture(scope="session")
def conditioning() -> Callable[..., list]:
    """``conditioning(seed=0, batch=1, tokens=77)``: see ``tiny_model.conditioning``."""
    return tiny_model.conditioning


@pytest.fixture
def trained_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pack: Pack) -> Path:
    """Where training writes in this test: output/styleinject in a folder of its own, where the loader looks too."""
    import folder_paths

    folder = tmp_path / "styleinject"
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "styleinject_trained", ([str(folder)], {".safetensors"}))
    return folder


@pytest.fixture
def train(run_node: Callable[..., tuple], conditioning: Callable[..., list], trained_folder: Path) -> Callable[..., tuple]:
    """``train("StyleInjectDistill", model=..., options={...}, ...)``: run a training node, StyleInjectTrain by default, on
    a few random latents and with the settings of ``training.SMALL``."""

    def run(node: str = "StyleInjectTrain", /, *, options: dict[str, Any] | None = None, **inputs: Any) -> tuple:
        given = {"conditioning": conditioning(0), **training.SMALL, **inputs}
        if node != "StyleInjectDistill":
            given.setdefault("latents", training.latents())
        if options is not None:
            given["options"] = run_node("StyleInjectTrainOptions", **options)[0]
        return run_node(node, **training.as_lists(given))

    return run


@pytest.fixture(autouse=True)
def unloaded_afterwards() -> Iterator[None]:
    """Let no test find the models of the one before it still loaded."""
    yield
    import comfy.model_management

    comfy.model_management.unload_all_models()
