"""Where an adapter's layers are in a model of ComfyUI: by the key as it stands in the file, in ComfyUI's own table, first.

The table (`comfy.lora.model_lora_keys_unet`) is what ComfyUI's LoRA loader goes by: U-Nets and transformers of every family,
with what a model fuses (qkv, linear1) as rows of one weight, and what it keeps in another order with a function.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import comfy.lora
import comfy.utils
from torch import Tensor, nn

from ..styleinject_core import Adapter
from ..styleinject_core.adapter import host_shapes
from ..styleinject_core.attach import Place
from ..styleinject_core.layer_names import parse
from ..styleinject_core.layers import LayerShape
from ..styleinject_core.methods.difference import difference_of
from ..styleinject_core.site import Rows

COMPILED = "_orig_mod"  # where torch.compile keeps the module it wraps
_MODEL = "diffusion_model."
_DIFFUSERS = "transformer."  # before diffusers' names in the table
# What is tried before a file's key, and before a layer's name, where the table does not know it as it stands.
_FILE_PREFIXES = ("", _MODEL, "transformer.", "lora_unet_")
_NAME_PREFIXES = ("", "transformer.", _MODEL, "unet.", "base_model.model.")


@dataclass(frozen=True)
class Found:
    """One layer's place, and what is to be done to the rows of a change before they are in the model's order."""

    place: Place
    reorder: Callable[[Tensor], Tensor] | None = None


def find_places(model: nn.Module, adapter: Adapter) -> dict[str, Found]:
    """Where the layers of an adapter are in a model; those that are not there are left out.

    Args:
        model: a comfy.model_base.BaseModel, without what others have injected into it.
    """
    host = diffusion_model(model)
    modules = {name.replace(f"{COMPILED}.", ""): name for name, _ in host.named_modules()}
    table: dict[str, Any] = comfy.lora.model_lora_keys_unet(model, {})
    unet = _unet_names(model)
    found = {}
    for name in adapter.names:
        target = _target(table, unet, name, adapter.keys.get(name))
        if target is None:
            plain = name.removeprefix(_MODEL)
            target = f"{_MODEL}{plain}.weight" if plain in modules else None
        if target is not None and (where := _found(target, modules)) is not None:
            found[name] = where
    return found


def layer_shapes(model: nn.Module) -> dict[str, LayerShape]:
    """Every layer of a model that can be adapted, by the name that files give it: the diffusers name where ComfyUI's table
    knows one, else its own. What a model fuses is there by its parts."""
    host = diffusion_model(model)
    own = {name.replace(f"{COMPILED}.", ""): shape for name, shape in host_shapes(host).items()}
    unet = {module: name for name, module in _unet_names(model).items()}
    known: dict[str, list[tuple[str, Rows | None]]] = {}
    for key, target in comfy.lora.model_lora_keys_unet(model, {}).items():
        if not key.startswith(_DIFFUSERS) or not (isinstance(target, str) or len(target) == 2):
            continue  # with a function: rows in another order than the file's
        weight, offset = (target, None) if isinstance(target, str) else target
        if weight.endswith(".weight") and (offset is None or offset[0] == 0):
            module = weight.removeprefix(_MODEL).removesuffix(".weight")
            rows = None if offset is None else Rows(offset[1], offset[2])
            known.setdefault(module, []).append((key.removeprefix(_DIFFUSERS), rows))
    found: dict[str, LayerShape] = {}
    for module, shape in own.items():
        for name, rows in _names_of(unet.get(module, module), shape.out_features, known.get(module, [])):
            found[name] = shape if rows is None else replace(shape, out_features=rows.size)
    return found


def _names_of(module: str, rows: int, known: list[tuple[str, Rows | None]]) -> list[tuple[str, Rows | None]]:
    """The names of one module's layer, or of the layers that it fuses.

    Args:
        rows: of its weight.
        known: what the table calls it, and parts of it.
    """
    end, parts = 0, list[tuple[str, Rows | None]]()
    for name, part in sorted(((name, part) for name, part in known if part is not None), key=lambda item: item[1].start):
        if part.start == end and part.start + part.size <= rows:
            parts.append((name, part))
            end = part.start + part.size
    projections = [item for item in parts if parse(item[0]).projection]
    if len(projections) == 3:
        return parts if end == rows else projections  # of Flux 2's linear1 the table tells the rest wrongly
    if parts and not projections and end == rows:
        return parts  # where keys have fewer heads than queries, as in Lumina 2, what the table tells is wrong
    return [next(((name, None) for name, part in known if part is None), (module, None))]


def in_leaves(model: nn.Module, adapter: Adapter) -> bool:
    """Whether every layer of an adapter is a module without others in it: ComfyUI patches the weights of no other, such as
    the modulation that is a block's own parameter."""
    modules = dict(diffusion_model(model).named_modules())
    return not any(list(modules[found.place.module].children()) for found in find_places(model, adapter).values())


def unet_modules(model: nn.Module, wanted: Iterable[str]) -> dict[str, str]:
    """The module names of a U-Net's layers, by their diffusers names; those that are not there are left out."""
    modules = {name.replace(f"{COMPILED}.", ""): name for name, _ in diffusion_model(model).named_modules()}
    table = _unet_names(model)
    return {name: modules[table[name]] for name in wanted if table.get(name) in modules}


def _target(table: Mapping[str, Any], unet: Mapping[str, str], name: str, key: str | None) -> Any:
    """What ComfyUI's table says of a layer: by its key in the file, else by the diffusers name."""
    if key is not None:
        spelled = key.removeprefix("model.") if key.startswith("model.diffusion_model.") else key
        spelled = spelled.replace("lora_unet__", "lora_unet_", 1) if spelled.startswith("lora_unet__") else spelled
        for prefix in _FILE_PREFIXES:
            if f"{prefix}{spelled}" in table:
                return table[f"{prefix}{spelled}"]
    if name in unet:
        return f"{_MODEL}{unet[name]}.weight"
    return next((table[f"{prefix}{name}"] for prefix in _NAME_PREFIXES if f"{prefix}{name}" in table), None)


def _found(target: Any, modules: Mapping[str, str]) -> Found | None:
    """A target of the table as a place: "<key>", (key, (0, start, size)) or (key, rows or None, function). Keys are of weights,
    or of other parameters, as a block's modulation."""
    whole, offset, reorder = target, None, None
    if not isinstance(target, str):
        whole, offset = target[0], target[1]
        reorder = target[2] if len(target) > 2 else None
    owner, _, parameter = whole.replace(f"{COMPILED}.", "").removeprefix(_MODEL).rpartition(".")
    name = modules.get(owner)
    if name is None or (parameter != "weight" and offset is not None):
        return None
    if offset is not None and offset[0] != 0:
        logging.warning("StyleInject: %s: a slice along dimension %s is not supported", whole, offset[0])
        return None
    return Found(Place(name, None if offset is None else Rows(offset[1], offset[2]), parameter), reorder)


def fitted(model: nn.Module, adapter: Adapter, found: Mapping[str, Found]) -> Adapter:
    """The adapter as this model's layers want it; the same object where they want it as it is.

    A layer's numbers may have another shape in the file, and its rows another order. What does not fit is left as it is,
    for the attachment to say.
    """
    host = diffusion_model(model)
    changed = {}
    for name, layer in adapter.layers.items():
        if name not in found or not layer.fixed:
            continue
        place, reorder = found[name].place, found[name].reorder
        try:
            module = host.get_submodule(place.module)
            shape = LayerShape.of(module) if place.parameter == "weight" else None
            shape = shape or LayerShape.of_other(module, place.parameter)
        except (AttributeError, ValueError):
            continue
        if shape is not None and place.rows is not None:
            shape = LayerShape(shape.in_features, place.rows.size, shape.kernel)
        fitting = None if shape is None else layer.on(shape)
        if fitting is not None and reorder is not None:
            fitting = difference_of(fitting, reorder)
        if fitting is not None and fitting is not layer:
            changed[name] = fitting
    if not changed:
        return adapter
    return adapter.with_changed(changed)


def diffusion_model(model: nn.Module) -> nn.Module:
    """The network itself, whether torch.compile wraps it or not."""
    network: Any = model.diffusion_model
    return getattr(network, COMPILED, network)


def forget_prompts(model: nn.Module) -> None:
    """Drop the keys and values of prompts that a network keeps from one call to the next: HiDream-O1 does, under the prompt
    alone, and what they were computed with may have changed."""
    forget = getattr(diffusion_model(model), "clear_kv_cache", None)
    if forget is not None:
        forget()


def _unet_names(model: nn.Module) -> dict[str, str]:
    """Diffusers name -> module name, of a U-Net's layers; none for other models."""
    config: Any = model.model_config
    table = comfy.utils.unet_to_diffusers(config.unet_config)
    return {
        key.removesuffix(".weight"): value.removesuffix(".weight") for key, value in table.items() if key.endswith(".weight")
    }
