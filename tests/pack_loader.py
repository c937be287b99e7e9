"""Load a node pack by its location, as ComfyUI does, for tests inside ComfyUI (``tests/nodes``)."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Pack:
    """The pack as loaded by ComfyUI: its module and its node classes by node id."""

    module: ModuleType
    nodes: dict[str, type]

    def __getitem__(self, node_id: str) -> type:
        if node_id not in self.nodes:
            raise KeyError(f"no node {node_id!r}; the pack has {sorted(self.nodes)}")
        return self.nodes[node_id]

    def submodule(self, name: str) -> ModuleType:
        """A module of the pack, e.g. ``styleinject_core.adapter``: the copy that the nodes use.

        ``import styleinject_core`` in a test would make a second copy of every class.
        """
        return importlib.import_module(f"{self.module.__name__}.{name}")


def load_pack(folder: Path) -> Pack:
    """Load a node pack by its location, as ``nodes.load_custom_node`` does, but let its errors through."""
    from comfy_api.latest import ComfyExtension

    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        if getattr(module, "NODE_CLASS_MAPPINGS", None) is not None:
            raise TypeError("the pack has NODE_CLASS_MAPPINGS: ComfyUI would ignore its comfy_entrypoint")
        nodes = asyncio.run(node_classes(module.comfy_entrypoint, ComfyExtension))
    except BaseException:
        del sys.modules[name]
        raise
    return Pack(module, nodes)


async def node_classes(entrypoint: Callable[[], Any], extension_class: type) -> dict[str, type]:
    """The node classes that an entrypoint declares, by node id."""
    extension = entrypoint()
    if inspect.isawaitable(extension):
        extension = await extension
    if not isinstance(extension, extension_class):
        raise TypeError(f"comfy_entrypoint returned {extension!r}, not a ComfyExtension")
    if hasattr(extension, "on_load"):  # newer versions await it first
        await extension.on_load()
    nodes: dict[str, type] = {}
    for node in await extension.get_node_list():
        node_id = node.GET_SCHEMA().node_id
        if node_id in nodes:
            raise ValueError(f"two nodes are called {node_id!r}")
        nodes[node_id] = node
    return nodes
