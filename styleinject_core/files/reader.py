"""Reading adapter files of every kind: keys are sorted by module, modules become layers, and what is not used is named.

header -> sorting (keys) -> tensors -> one layer per module, by its method -> Adapter
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..adapter import Adapter
from ..config import AdapterConfig, LayerConfig
from ..layer_names import parse
from ..layers import UnsupportedLayerError
from ..methods import METHODS, AdapterLayer, config_from_dict
from ..methods.fixed import alpha_of
from ..methods.method import Problem
from .alphas import Scales, scales_beside, stated_scales
from .errors import AdapterFileError
from .header import is_known_version, parse_json, read_header, shortened
from .keys import DIFFERENCE, LOHA, LOKR, LORA, STYLEINJECT
from .keys import parse as parse_key
from .names import layer_name, layers_per_block
from .sorting import Module, Sorted, sort

FORMAT_VERSION = 2  # 2: router_pool "paper", tokens other than "image", router_input other than "layer"
Parts = dict[str, Tensor]


def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter from a .safetensors file, on the CPU: StyleInject's, DiffuseKronA's, a LoRA, LoHa, LoKr, DoRA or
    difference in any spelling.

    Args:
        path: the file. Its stem becomes the adapter's name.

    Returns:
        The adapter, module names in diffusers spelling, `adapter.keys` with their names in the file. `adapter.skipped`
        lists what is for another model (a text encoder), `adapter.unused` what is for this one and cannot be used, and why.

    Raises:
        AdapterFileError: no such file, not safetensors, no adapter inside, or less than half of it can be used; two adapters,
            or one layer twice; a newer format version, an unknown config field, NaN or Inf values, or shapes that contradict
            each other or the config.
    """
    path = Path(path)
    header = read_header(path)
    found = sort(path.name, header.entries)
    config = _read_config(path, header.metadata)
    names = _names(path, found)
    tensors = _read_tensors(path, found)
    scales = _scales(path, header.metadata, found, tensors)
    authors = _is_of_diffusekrona(found, tensors)
    layers, unused = {}, dict(found.unused)
    for key, module in found.modules.items():
        layer = _Reading(path, module, names[key], tensors, scales, config, authors)
        layers[names[key]] = layer.read()
    keys = {names[key]: key for key in found.modules}
    whole = _whole_config(layers, config)
    metadata = {k: v for k, v in header.metadata.items() if k != "format" and not k.startswith("styleinject_")}
    return Adapter(layers, whole, metadata, path.stem, found.skipped, keys=keys, unused=unused, path=path)


class _Reading:
    """One module's way from a file's tensors to a layer."""

    def __init__(
        self,
        path: Path,
        module: Module,
        name: str,
        tensors: Mapping[str, Tensor],
        scales: Scales,
        stated: LayerConfig | None,
        authors: bool,
    ):
        self.path, self.module, self.name, self.scales, self.stated, self.authors = path, module, name, scales, stated, authors
        self.parts = {method: {part: tensors[key] for part, key in keys.items()} for method, keys in module.methods.items()}
        self.shared = {part: tensors[key] for part, key in module.shared.items()}

    def problem(self, text: str) -> AdapterFileError:
        """What is wrong with this layer."""
        return AdapterFileError(f"{self.path.name}: {shortened(self.name)}: {text}")

    def read(self) -> AdapterLayer:
        """The layer.

        Raises:
            AdapterFileError: tensors that contradict each other.
        """
        methods = dict(self.parts)
        difference = methods.get(DIFFERENCE, {})
        if len(methods) == 2 and set(difference) == {"bias"}:  # a change of the bias beside one of the weight
            methods.pop(DIFFERENCE)
            difference = {"bias": difference["bias"]}
        if len(methods) > 1:
            raise self.problem(f"the file has both {' and '.join(sorted(methods))} for this layer")
        (method, parts), extra = next(iter(methods.items())), difference if DIFFERENCE not in methods else {}
        readers: dict[str, Callable[[Parts], AdapterLayer]] = {
            STYLEINJECT: self._styleinject,
            LORA: self._lora,
            LOHA: self._loha,
            LOKR: self._lokr,
            DIFFERENCE: self._difference,
        }
        try:
            if method not in readers:
                return self._by(method, {**parts, **self.shared}, self._stated(method))
            return readers[method]({**parts, **extra})
        except UnsupportedLayerError as error:
            raise self.problem(str(error)) from None

    def _by(self, method: str, parts: Parts, stated: Any = None) -> AdapterLayer:
        for part, value in parts.items():
            _check_values(part, value, self.problem)
        return METHODS[method].read(parts, stated, self.problem)

    def _stated(self, method: str) -> LayerConfig | None:
        """What the file's own config says of this layer, where it is of that method."""
        if self.stated is None or not isinstance(self.stated, METHODS[method].config):
            return None
        return self.stated.for_layer(self.name)

    def _styleinject(self, parts: Parts) -> AdapterLayer:
        method = METHODS["styleinject"]
        named = {suffix.removeprefix(".styleinject_"): part for part, suffix in method.suffixes.items()}
        if unknown := [part for part in parts if part not in named]:
            key = self.module.methods[STYLEINJECT].get(unknown[0], f"{self.module.key}.{unknown[0]}")
            raise AdapterFileError(
                f"{self.path.name}: {shortened(key)}: unknown part {shortened(unknown[0])!r}, "
                f"expected one of {', '.join(named)}"
            )
        return self._by("styleinject", {named[part]: value for part, value in parts.items()}, self._stated("styleinject"))

    def _lora(self, parts: Parts) -> AdapterLayer:
        if self.authors and ".processor." in self.module.key:
            return self._of_diffusekrona(parts)
        parts = {**parts, **self.shared}
        if unknown := [part for part in parts if part.endswith("_bias") and part != "up_bias"]:
            raise self.problem(f"a bias of the {unknown[0].removesuffix('_bias')} matrix is not supported")
        rank = parts["down"].shape[0] if "down" in parts and parts["down"].ndim else 0
        parts = self._with_alpha(parts, rank)
        if "up_bias" in parts:
            parts = self._with_up_bias(parts, rank)
        if set(parts) <= {"down", "up", "alpha"} and all(
            parts[side].ndim in (2, 4) for side in ("down", "up") if side in parts
        ):
            named = {"down": "A", "up": "B", "alpha": "alpha"}
            layer = self._by("lora", {named[part]: value for part, value in parts.items()}, self._stated_lora(parts))
            if ".processor." in self.module.key and "alpha" not in parts and parts["down"].ndim == 2:
                layer.or_else(self._of_diffusekrona(parts))  # a common rank by chance: the model's layer will tell
            return layer
        return self._by("low_rank", self._with_magnitudes(parts))

    def _stated_lora(self, parts: Parts) -> LayerConfig | None:
        """The file's own config of a LoRA; an alpha that another program has changed since is the tensor's."""
        stated = self._stated("lora")
        if not isinstance(stated, AdapterConfig) or stated.method != "lora":
            return None
        alpha = alpha_of(parts, self.problem)
        known = stated.r if stated.alpha is None else stated.alpha  # Python compares any number with any other
        return stated if alpha is None or alpha == known else replace(stated, alpha=alpha)

    def _with_up_bias(self, parts: Parts, rank: int) -> Parts:
        """PEFT's bias of the up matrix, as a change of the layer's bias: it is scaled with the product."""
        alpha = parts.get("alpha")
        scale = 1.0 if alpha is None or alpha.numel() != 1 or not rank else float(alpha) / rank
        bias = parts.pop("up_bias") if "bias" not in parts else None
        if bias is None:
            raise self.problem("it has a bias of the up matrix and a difference of the bias")
        return {**parts, "bias": bias.float() * scale}

    def _with_magnitudes(self, parts: Parts) -> Parts:
        return {{"dora_scale": "magnitude", "magnitude": "peft_magnitude"}.get(part, part): v for part, v in parts.items()}

    def _with_alpha(self, parts: Parts, rank: int) -> Parts:
        """The tensors with the alpha that only the header, or a file beside, states."""
        if "alpha" in parts or not self.scales or not rank:
            return parts
        scale = self._scale(rank)
        return parts if scale is None else {**parts, "alpha": torch.tensor(scale * rank, dtype=torch.float64)}

    def _scale(self, rank: int | None) -> float | None:
        found = self.scales.of(self.module.key)
        if found is None:
            return None
        config, module = found
        try:
            if rank is not None and config.rank_of(module) != rank:
                raise self.problem(f"file has rank {rank}, {config.source} says {config.rank_of(module)}")
            return config.scale(module)
        except AdapterFileError as error:
            raise error if str(error).startswith(self.path.name) else self.problem(f"{config.source}: {error}") from None

    def _loha(self, parts: Parts) -> AdapterLayer:
        parts = {**parts, **self.shared}
        rank = parts["w1_b"].shape[0] if "w1_b" in parts and parts["w1_b"].ndim else 0
        return self._by("loha", self._with_magnitudes(self._with_alpha(parts, rank)))

    def _lokr(self, parts: Parts) -> AdapterLayer:
        parts = {**parts, **self.shared}
        factor = parts.get("w2_b", parts.get("w1_b"))
        if factor is not None and factor.ndim:
            parts = self._with_alpha(parts, factor.shape[0])
        elif self.scales and "w2" in parts and "alpha" not in parts and (scale := self._scale(None)) is not None:
            parts = {**parts, "w2": parts["w2"].float() * scale}  # PEFT scales full factors too
        full = {"w1", "w2"} <= set(parts) <= {"w1", "w2", "alpha"} and parts["w1"].ndim == 2 and parts["w2"].ndim in (2, 4)
        if full:
            return self._by("kronecker", {"A": parts["w1"], "B": parts["w2"]}, self._stated("kronecker"))
        return self._by("lokr", self._with_magnitudes(parts))

    def _difference(self, parts: Parts) -> AdapterLayer:
        return self._by("difference", {**parts, **self._with_magnitudes(self.shared)})

    def _of_diffusekrona(self, parts: Parts) -> AdapterLayer:
        """A file of DiffuseKronA's released program: down (a2, a1) and up (b1, b2), with its order of rows."""
        for side in ("down", "up"):
            if side not in parts:
                raise self.problem(f"DiffuseKronA's {side} factor is missing")
            if parts[side].ndim != 2 or 0 in parts[side].shape:
                raise self.problem(f"DiffuseKronA's {side} factor has shape {tuple(parts[side].shape)}, expected a matrix")
        return self._by("kronecker", {"A_permuted": parts["down"].mT.contiguous(), "B_permuted": parts["up"]})


def other_part(adapter: Adapter) -> Parts:
    """What an adapter's file holds for other models, by its keys: `adapter.skipped`; alphas that only the header states are
    made tensors of their own, for programs that know no others.

    Raises:
        AdapterFileError: the file is gone or has changed.
    """
    path = adapter.path
    if path is None:
        return {}
    header = read_header(path)
    if missing := [key for key in adapter.skipped if key not in header.entries]:
        raise AdapterFileError(f"{path.name}: {shortened(missing[0])} is not in it any more: load it again")
    tensors = _read_keys(path, adapter.skipped)
    scales = stated_scales(path, header.metadata)
    for key, value in list(tensors.items()):
        found = parse_key(key)
        if (
            found is None
            or (found.method, found.part) != (LORA, "down")
            or f"{found.module}.alpha" in tensors
            or not value.ndim
        ):
            continue
        if (stated := scales.of(found.module)) is not None and stated[0].rank_of(stated[1]) == value.shape[0]:
            tensors[f"{found.module}.alpha"] = torch.tensor(stated[0].scale(stated[1]) * value.shape[0])
    return tensors


def _names(path: Path, found: Sorted) -> dict[str, str]:
    """Name in the file -> name of the layer. Raises AdapterFileError: one layer in two spellings."""
    blocks = layers_per_block(found.modules)
    names: dict[str, str] = {}
    seen: dict[str, str] = {}
    for key in found.modules:
        name = layer_name(key, blocks)
        if name in seen:
            raise AdapterFileError(
                f"{path.name}: {shortened(seen[name])} and {shortened(key)} are two spellings of one layer, {shortened(name)}"
            )
        seen[name], names[key] = key, name
    return names


def _read_tensors(path: Path, found: Sorted) -> dict[str, Tensor]:
    """The tensors of the modules that are used, checked one by one."""
    wanted = [
        key
        for module in found.modules.values()
        for parts in (*module.methods.values(), module.shared)
        for key in parts.values()
    ]
    return _read_keys(path, wanted)


def _read_keys(path: Path, wanted: Iterable[str]) -> dict[str, Tensor]:
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in wanted:
                # cloned: a tensor that stays mapped to the file would change, or end the process, with it
                tensors[key] = file.get_tensor(key).clone()
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        text = shortened(str(error))
        if isinstance(error, SafetensorError) and "dtype" not in text.lower():
            raise AdapterFileError(f"{path.name}: damaged or truncated, not a whole safetensors file ({text})") from None
        raise AdapterFileError(f"{path.name}: a tensor cannot be read: {text}") from None
    return tensors


def _check_values(part: str, value: Tensor, problem: Problem) -> None:
    if part == "alpha" and not value.is_floating_point() and not value.is_complex():
        return  # whole numbers have been seen there
    if not value.is_floating_point():
        raise problem(f"{part} has dtype {value.dtype}, expected a floating point type")
    if value.element_size() == 1:
        try:
            value = value.float()
        except (RuntimeError, NotImplementedError):
            raise problem(f"{part} has dtype {value.dtype}, which is not supported") from None
    if not torch.isfinite(value).all():
        raise problem(f"{part} has NaN or Inf values")


def _scales(path: Path, metadata: Mapping[str, str], found: Sorted, tensors: Mapping[str, Tensor]) -> Scales:
    """Alphas that stand in no tensor: the header's, else those of the file beside."""
    if scales := stated_scales(path, metadata):
        return scales
    if any("alpha" in module.shared for module in found.modules.values()):
        return Scales({})
    ranks = {}
    for key, module in found.modules.items():
        for method, part in ((LORA, "down"), (LOHA, "w1_b"), (LOKR, "w2_b")):
            own = module.methods.get(method, {})
            if part in own and tensors[own[part]].ndim:
                ranks[key] = tensors[own[part]].shape[0]
    return scales_beside(path, ranks)


def _is_of_diffusekrona(found: Sorted, tensors: Mapping[str, Tensor]) -> bool:
    """Whether what looks like LoRA on attention processors is DiffuseKronA's: their factors have no common rank."""
    for key, module in found.modules.items():
        own = module.methods.get(LORA, {})
        if ".processor." not in key or not {"down", "up"} <= set(own):
            continue
        down, up = tensors[own["down"]], tensors[own["up"]]
        if down.ndim != 2 or up.ndim != 2:
            return False
        if down.shape[0] != up.shape[1]:
            return True
    return False


def _read_config(path: Path, metadata: Mapping[str, str]) -> LayerConfig | None:
    """What a file of ours says of itself."""
    version = metadata.get("styleinject_version", str(FORMAT_VERSION))
    if not is_known_version(version, FORMAT_VERSION):
        raise AdapterFileError(
            f"{path.name}: styleinject_version is {shortened(version)}, this version of the pack reads up to {FORMAT_VERSION}: "
            "update it"
        )
    if "styleinject_config" not in metadata:
        return None
    values = parse_json(path, metadata["styleinject_config"], "styleinject_config")
    try:
        if not isinstance(values, dict):
            raise ValueError(f"expected an object, found {type(values).__name__}")
        config = config_from_dict(values)
        own = {layer_name(name): fields for name, fields in config.layers.items()}
        return replace(config, layers=own)  # type: ignore[type-var]
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise AdapterFileError(f"{path.name}: styleinject_config: {shortened(str(error))}") from None


def _whole_config(layers: Mapping[str, AdapterLayer], stated: LayerConfig | None) -> LayerConfig:
    """The adapter's config: the stated one or the first layer's, with overrides for the layers that differ from it."""
    targets = tuple(dict.fromkeys(parse(name).target for name in layers))
    base = stated or replace(next(iter(layers.values())).config, target_modules=targets)  # type: ignore[type-var]
    own = {name: layer.config for name, layer in layers.items() if isinstance(layer.config, type(base))}
    return replace(base, layers={name: o for name, config in own.items() if (o := base.override(config))})  # type: ignore[type-var]
