"""Adapters on a MODEL: the one file that touches ModelPatcher.

A MODEL with adapters is a clone that has one APPLY_MODEL wrapper with all of them, and their weights as an additional
model, so that ComfyUI loads, counts, and offloads them like its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import nn

from ..styleinject_core import Adapter, Applied
from ..styleinject_core.adapter import a
from ..styleinject_core.router.control import Rule
from .injection import KEY, Injection, select_adapters
from .monitor import Monitor
from .places import find_places, fitted, in_leaves
from .reference import AppliedReference
from .sampling import ApplyModelWrapper, SampleWrapper, calc_cond_batch_wrapper, predict_noise_wrapper, prepare_state
from .weight_patches import add_patches, remove_patches

_CACHE, _FITTED = "_comfyui_patchers", "_comfyui_fitted"


def apply_adapter(
    model: ModelPatcher,
    adapter: Adapter,
    *,
    strength: float,
    dma: float = 1.0,
    sta: float = 1.0,
    layers: str = "all",
    layer_weights: str = "",
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    control: Sequence[Rule] = (),
    node_id: str = "",
) -> tuple[ModelPatcher, Injection]:
    """A clone of `model` with one more adapter; `model` and `adapter` stay as they are.

    Returns:
        The clone, and the adapter as it is on it.

    Raises:
        ValueError: a strength that is no finite number, percents out of order, a control for another adapter (from Applied,
            Injection).
        AdapterMismatchError, SelectorError: the adapter does not fit the model, or a selector matches nothing.
    """
    with without_injections(model):
        adapter = _fitted(adapter, model)
        # what holds for the whole run and for every image is ComfyUI's to patch into the weights
        lasting = not control and (start_percent, end_percent) == (0, 1)
        patched = lasting and all(layer.fixed for layer in adapter.layers.values()) and in_leaves(model.model, adapter)
        weights = None if patched else managed_weights(adapter, model)
        applied = Applied(adapter if weights is None else weights.model, strength, dma, sta, layers, layer_weights)
        injection = Injection(applied, start_percent, end_percent, tuple(control), patched, node_id)
        report = injection.report(model.model)  # what does not fit is said now, not in mid-sampling
        if report.share < 1 or report.biases or report.narrowed:
            logging.warning("StyleInject: %s", report)
        clone = _with_injections(model, (*injections_of(model), injection))
        if patched:
            add_patches(clone, injection.attachment(model.model), injection)
    if weights is not None:
        held = clone.get_additional_models_with_key(KEY)
        if all(other.model is not weights.model for other in held):
            clone.set_additional_models(KEY, [*held, weights])
    return clone, injection


@contextmanager
def without_injections(model: ModelPatcher) -> Iterator[None]:
    """The model as it is by itself for the length of a with block: AnimateDiff and others leave their modules in a model that
    is loaded, also between runs and in the model of other MODELs, and with them layers have other names."""
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models]
    patchers = [p for p in (model, *loaded) if p is not None and getattr(p, "model", None) is model.model]
    with ExitStack() as stack:
        for patcher in {id(p): p for p in patchers}.values():
            stack.enter_context(patcher.use_ejected())
        yield


def _fitted(adapter: Adapter, model: ModelPatcher) -> Adapter:
    """The adapter as this model's layers want it; one is kept with the adapter for each model it is applied to."""
    kept: WeakKeyDictionary[nn.Module, Adapter] = adapter.__dict__.setdefault(_FITTED, _Fitted())
    host = model.model
    if host not in kept:
        made = fitted(host, adapter, find_places(host, adapter))
        if made is adapter:
            return adapter
        kept[host] = made
    return kept[host]


class _Fitted(WeakKeyDictionary):
    """Model -> adapter; a copy of the adapter it belongs to starts without any."""

    def __deepcopy__(self, memo: dict) -> _Fitted:
        return _Fitted()


def injections_of(model: ModelPatcher) -> tuple[Injection, ...]:
    """The adapters on a MODEL, in the order they were applied."""
    return tuple(i for wrapper in model.get_wrappers(WrappersMP.APPLY_MODEL, KEY) for i in wrapper.injections)


def apply_reference(model: ModelPatcher, applied: AppliedReference) -> ModelPatcher:
    """A clone of `model` with one more reference image; `model` stays as it is.

    Raises:
        ReferenceMismatchError: DEADiff does not fit the model.
    """
    with without_injections(model):
        applied.attachment(model.model)  # what does not fit is said now, not in mid-sampling
    return _with_injections(model, injections_of(model), references=(*references_of(model), applied))


def references_of(model: ModelPatcher) -> tuple[AppliedReference, ...]:
    """The reference images on a MODEL, in the order they were applied."""
    return tuple(r for wrapper in model.get_wrappers(WrappersMP.APPLY_MODEL, KEY) for r in wrapper.references)


def set_strength(model: ModelPatcher, adapter_name: str, strength: float) -> ModelPatcher:
    """A clone of `model` whose adapters of that name ("all": every one) have another overall strength.

    Raises:
        ValueError: no adapter is applied, none of that name, or a strength that is no finite number.
    """
    present = injections_of(model)
    chosen = select_adapters(present, adapter_name)
    rescaled = [replace(i, applied=replace(i.applied, strength=strength)) if i in chosen else i for i in present]
    clone = _with_injections(model, tuple(rescaled))
    patched = [(old, new) for old, new in zip(present, rescaled, strict=True) if old is not new and old.patched]
    if patched:
        remove_patches(clone, [old for old, _ in patched])
        with without_injections(model):
            for _, new in patched:
                add_patches(clone, new.attachment(model.model), new)
    return clone


def managed_weights(adapter: Adapter, model: ModelPatcher) -> ModelPatcher:
    """A copy of the adapter in the dtype this model computes in, as a model that ComfyUI loads and offloads.

    One copy per dtype and device is kept with the adapter, for all the models it is applied to, and dies with it.
    """
    patchers = adapter.__dict__.setdefault(_CACHE, _Patchers())
    key = (compute_dtype(model), model.load_device)
    if key not in patchers:
        patchers[key] = _new_patcher(adapter, *key, model.offload_device)
    return patchers[key]


class _Patchers(dict):
    """(dtype, device) -> ModelPatcher; a copy of the adapter it belongs to starts without any."""

    def __deepcopy__(self, memo: dict) -> _Patchers:
        return _Patchers()


def _new_patcher(
    source: Adapter, dtype: torch.dtype, load_device: torch.device, offload_device: torch.device, disable_dynamic: bool = False
) -> ModelPatcher:
    """A patcher around a copy of `source` in `dtype`; tensors that have it already are shared, not copied."""
    copy = source.with_layers(lambda layer: layer.converted(offload_device, dtype))
    copy = copy.requires_grad_(False).eval()
    patcher = wrap(copy, load_device, offload_device, disable_dynamic)
    # how newer versions make copies for other GPUs; from the copy, for a reference to `source` would be a cycle
    patcher.cached_patcher_init = (_new_patcher, (copy, dtype, load_device, offload_device))
    return patcher


def wrap(
    module: nn.Module, load_device: torch.device, offload_device: torch.device, disable_dynamic: bool = False
) -> ModelPatcher:
    """A ModelPatcher around a module, of the kind this ComfyUI uses for its own models."""
    kind = ModelPatcher if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcher)
    return kind(module, load_device=load_device, offload_device=offload_device)


def compute_dtype(model: ModelPatcher) -> torch.dtype:
    """The dtype a model's layers compute in; float32 where it is none an adapter can be kept in."""
    base: Any = model.model
    dtype = getattr(base, "manual_cast_dtype", None) or base.get_dtype()
    return dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float32


def monitored(model: ModelPatcher, monitor: Monitor) -> ModelPatcher:
    """A clone of `model` whose sampling runs a monitor records.

    Raises:
        ValueError: no adapter that it could record is applied.
    """
    present = select_adapters(injections_of(model), monitor.adapter_name)
    names = [i.applied.adapter.name for i in present]
    if not any(i.applied.adapter.routed for i in present):
        kind = present[0].applied.adapter.kind
        raise ValueError(f"{', '.join(names)}: {a(kind)} has no style router, there is nothing to monitor")
    return _with_injections(model, injections_of(model), (*_monitors_of(model), monitor))


def _monitors_of(model: ModelPatcher) -> tuple[Monitor, ...]:
    return tuple(m for wrapper in model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY) for m in wrapper.monitors)


def _with_injections(
    model: ModelPatcher,
    injections: tuple[Injection, ...],
    monitors: tuple[Monitor, ...] | None = None,
    references: tuple[AppliedReference, ...] | None = None,
) -> ModelPatcher:
    """A clone with these adapters; its monitors and references stay unless others are given."""
    references = references_of(model) if references is None else references
    wrappers: dict[str, Any] = {
        WrappersMP.APPLY_MODEL: ApplyModelWrapper(injections, references),
        WrappersMP.OUTER_SAMPLE: SampleWrapper(injections, _monitors_of(model) if monitors is None else monitors, references),
        WrappersMP.PREDICT_NOISE: predict_noise_wrapper,
        WrappersMP.CALC_COND_BATCH: calc_cond_batch_wrapper,
    }
    clone = model.clone()
    for kind, wrapper in wrappers.items():
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    clone.remove_callbacks_with_key(CallbacksMP.ON_PREPARE_STATE, KEY)
    clone.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, KEY, prepare_state)
    return clone
