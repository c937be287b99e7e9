"""What of a MODEL's adapters is lost where ComfyUI saves or merges models, said there.

A checkpoint and a merge are weights. Fixed changes that hold for the whole run are weights too (`weight_patches`), and go with
them; what a router decides for each picture, and what is on for a part of sampling only, cannot.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import comfy.sd

from .injection import Injection
from .live import running_server
from .patcher import ModelPatcher, injections_of, references_of
from .taking_part import say

_MARK = "_styleinject_watched"
_DEPENDS = "what it changes depends on the picture, and weights cannot hold that"


def watch() -> None:
    """Have ComfyUI's functions for saving and merging say what they lose; what they do stays as it is.

    There is no callback for either, and a MODEL is not told. Every node that saves or merges comes through here.
    """
    _around(comfy.sd, "save_checkpoint", _on_save)
    _around(ModelPatcher, "get_key_patches", _on_merge)
    _around(ModelPatcher, "model_state_dict", _on_read)


def _around(owner: Any, name: str, before: Callable[..., None]) -> None:
    function = getattr(owner, name)
    if hasattr(function, _MARK):
        return

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        return function(*args, **kwargs)

    setattr(watched, _MARK, True)
    setattr(owner, name, watched)


def _on_save(*args: Any, **kwargs: Any) -> None:
    _tell(kwargs.get("model", args[1] if len(args) > 1 else None), "saved", "where the checkpoint is loaded")


def _on_merge(model: Any, *args: Any, **kwargs: Any) -> None:
    if args or kwargs:  # without a prefix, it is ComfyUI that looks for what its own hooks change
        _tell(model, "merged", "to the merged model")


def _on_read(model: Any, *args: Any, **kwargs: Any) -> None:
    if args or kwargs:  # Extract and Save LoRA asks for the network's weights alone
        _tell(model, "in the weights that are extracted", "beside what comes of them")


def _tell(model: Any, done: str, where: str) -> None:
    if not isinstance(model, ModelPatcher):
        return
    lost = {i.applied.adapter.name: _reason(i) for i in injections_of(model) if i.strong and not i.patched}
    lost |= {f"reference {r.name}": _DEPENDS for r in references_of(model) if r.reference.active}
    lines = [f'"{name}" is not {done}: {reason}. Apply it {where}.' for name, reason in lost.items()]
    if lines:
        node: Any = getattr(running_server(), "last_node_id", None)
        say(" ".join(lines), str(node or ""))


def _reason(injection: Injection) -> str:
    if not all(layer.fixed for layer in injection.applied.adapter.layers.values()):
        return _DEPENDS
    return (
        f"it is on from {injection.start_percent:g} to {injection.end_percent:g} only, and weights are always on "
        "(on from 0 to 1 it would be among them)"
    )
