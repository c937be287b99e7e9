"""Adapter files: safetensors with tensors named as each method says, and the config in the header (method, section 5).

A LoRA in any spelling (kohya, diffusers, PEFT) is a file like any other.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..adapter import Adapter
from ..config import LayerConfig
from ..methods import METHODS, AdapterLayer, config_from_dict, config_to_dict, method_of
from .atomic import WriteError, save_tensors
from .names import diffusers_name, is_other_model_part, kind_of_layer, lora_name

FORMAT_VERSION = 1
_LORA_KEY = re.compile(
    r"(?P<module>.+?)(?:_lora\.|\.lora_|\.lora\.)(?P<side>down|up|A|B|mid)(?:\.[^.]+)??\.weight|(?P<alpha>.+)\.alpha"
)
_OTHER_METHOD = re.compile(r"\.(dora_scale|diff|diff_b)$|\.(hada|lokr)_|\.lora_magnitude_vector\b|\.lora_[AB](\.[^.]+)?\.bias$")


class AdapterFileError(ValueError):
    """A file that is no usable adapter, or cannot be written; the message names the file, the tensor and both values."""


def load_adapter(path: str | Path) -> Adapter:
    """Read a StyleInject adapter or a LoRA from a .safetensors file, on the CPU.

    Args:
        path: the file. Its stem becomes the adapter's name.

    Returns:
        The adapter, module names in diffusers spelling; `adapter.skipped` lists what in the file is no U-Net layer.

    Raises:
        AdapterFileError: no such file, not safetensors, no adapter inside, a newer format version, an unknown config
            field, NaN or Inf values, or shapes that contradict each other or the config.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    config = _read_config(path, metadata)
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}  # (layer, method) -> its tensors by part
    skipped = []
    for key, tensor in tensors.items():
        if is_other_model_part(key):
            skipped.append(key)
        elif place := _place(key):
            module, method, part = place
            parts.setdefault((diffusers_name(module), method), {})[part] = tensor
        elif ".styleinject_" in key:
            known = ", ".join(suffix.removeprefix(".styleinject_") for suffix in METHODS["styleinject"].suffixes.values())
            unknown = key.rpartition(".styleinject_")[2]
            raise AdapterFileError(f"{path.name}: {key}: unknown part {unknown!r}, expected one of {known}")
        elif _OTHER_METHOD.search(key):
            raise AdapterFileError(f"{path.name}: {key}: only plain LoRA is read, not DoRA, LoHa, biases or weight differences")
        else:
            skipped.append(key)
    layers: dict[str, AdapterLayer] = {}
    for (name, method), own in parts.items():
        if name in layers:
            first = METHODS[layers[name].config.method].title
            raise AdapterFileError(f"{path.name}: {name}: the file has both {first} and {METHODS[method].title} for this layer")
        layers[name] = _layer(path, name, method, own, config)
    if not layers:
        raise AdapterFileError(
            f"{path.name}: {len(skipped)} tensors, none for a U-Net layer (a LoRA for the text encoder only?)"
        )
    return Adapter(layers, _whole_config(layers, config), _other_metadata(metadata), path.stem, tuple(skipped))


def _place(key: str) -> tuple[str, str, str] | None:
    """(module, method, part) of a tensor's name, in any spelling of a method's suffixes; None for none of them."""
    for method in METHODS.values():
        for part, suffix in method.suffixes.items():
            if key.endswith(suffix) and len(key) > len(suffix):
                return key.removesuffix(suffix), method.name, part
    if match := _LORA_KEY.fullmatch(key):
        side = {"down": "A", "A": "A", "up": "B", "B": "B", "mid": "mid", None: "alpha"}[match["side"]]
        module = (match["module"] or match["alpha"]).replace(".processor.", ".")
        # diffusers' attention processors name the output projection without its index
        return module + (".0" if module.endswith("to_out") else ""), METHODS["lora"].name, side
    return None


def save_adapter(
    adapter: Adapter, path: str | Path, metadata: dict[str, str] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write an adapter; the file appears whole or not at all.

    Args:
        path: ends in .safetensors; the folder must exist.
        metadata: entries for the header (ModelSpec and others) over those the adapter carries.
        dtype: what to store the tensors in; None keeps theirs.

    Raises:
        AdapterFileError: a wrong suffix, a missing folder, values that are not finite, or a disk that refuses.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise AdapterFileError(f"{path.name}: expected a name that ends in .safetensors")
    tensors = {}
    for name, layer in adapter.layers.items():
        method = method_of(layer, adapter.config)
        for part, value in method.tensors(layer).items():
            stored = value.detach().to("cpu", dtype).contiguous()
            if not torch.isfinite(stored).all():
                raise AdapterFileError(f"{path.name}: {name}: {part} has NaN or Inf values, nothing was written")
            tensors[(lora_name(name) if method.lora_names else name) + method.suffixes[part]] = stored
    header = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": path.stem,
        "modelspec.date": date.today().isoformat(),
        **adapter.metadata,
        **(metadata or {}),
        "format": "pt",
        "styleinject_version": str(FORMAT_VERSION),
        "styleinject_config": json.dumps(config_to_dict(adapter.config)),
    }
    try:
        save_tensors(tensors, path, header)
    except WriteError as error:
        raise AdapterFileError(str(error)) from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix != ".safetensors":
        raise AdapterFileError(f"{path.name}: only .safetensors files are read (pickled files can run code)")
    if not path.is_file():
        raise AdapterFileError(f"{path.name}: no such file in {path.parent}")
    if path.stat().st_size == 0:
        raise AdapterFileError(f"{path.name}: the file is empty")
    with path.open("rb") as file:
        start = file.read(9)  # safetensors: the header's length in 8 bytes, then its "{"
    if start[8:] != b"{" and start.startswith((b"PK", b"\x80")):
        raise AdapterFileError(f"{path.name}: this is a pickled PyTorch file, whatever its name says; expected safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            keys = list(file.keys())
            if not any(map(_place, keys)):
                raise AdapterFileError(f"{path.name}: {_what_else(keys)}")
            # cloned: a tensor that stays mapped to the file would change, or end the process, with it
            return {key: file.get_tensor(key).clone() for key in keys}, metadata
    except SafetensorError as error:
        raise AdapterFileError(f"{path.name}: damaged or truncated, not a whole safetensors file ({error})") from None


def _what_else(keys: list[str]) -> str:
    """What a safetensors file without any adapter layer is."""
    if any(k.startswith(("model.diffusion_model.", "first_stage_model.", "double_blocks.")) for k in keys):
        return f"this is a whole model checkpoint ({len(keys)} tensors), not an adapter"
    examples = ", ".join(keys[:3]) or "none"
    return f"no adapter inside: none of its {len(keys)} tensors is a StyleInject or LoRA layer (first: {examples})"


def _read_config(path: Path, metadata: dict[str, str]) -> LayerConfig | None:
    version = metadata.get("styleinject_version", str(FORMAT_VERSION))
    if not version.isdigit() or int(version) > FORMAT_VERSION:
        raise AdapterFileError(
            f"{path.name}: styleinject_version is {version}, this version of the pack reads up to {FORMAT_VERSION}: update it"
        )
    if "styleinject_config" not in metadata:
        return None
    try:
        values = json.loads(metadata["styleinject_config"])
        if not isinstance(values, dict):
            raise ValueError(f"expected an object, found {type(values).__name__}")
        config = config_from_dict(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise AdapterFileError(f"{path.name}: styleinject_config: {error}") from None
    return replace(config, layers={diffusers_name(name): own for name, own in config.layers.items()})  # type: ignore[type-var]


def _layer(path: Path, name: str, method: str, parts: dict[str, Tensor], stated: LayerConfig | None) -> AdapterLayer:
    """One layer as its method reads it, with the config that the file states for it, if it is of that method."""

    def problem(text: str) -> AdapterFileError:
        return AdapterFileError(f"{path.name}: {name}: {text}")

    for part, value in parts.items():
        if not value.is_floating_point():
            raise problem(f"{part} has dtype {value.dtype}, expected a floating point type")
        if not torch.isfinite(value.float() if value.element_size() == 1 else value).all():
            raise problem(f"{part} has NaN or Inf values")
    own = stated.for_layer(name) if stated is not None and isinstance(stated, METHODS[method].config) else None
    return METHODS[method].read(parts, own, problem)


def _whole_config(layers: dict[str, AdapterLayer], stated: LayerConfig | None) -> LayerConfig:
    """The adapter's config: the stated one or the first layer's, with overrides for the layers that differ from it."""
    base = stated or replace(next(iter(layers.values())).config, target_modules=_targets(layers))  # type: ignore[type-var]
    own = {name: layer.config for name, layer in layers.items() if isinstance(layer.config, type(base))}
    overrides = {name: o for name, config in own.items() if (o := base.override(config))}
    return replace(base, layers=overrides)  # type: ignore[type-var]


def _targets(layers: dict[str, AdapterLayer]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(kind_of_layer, layers)))


def _other_metadata(metadata: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in metadata.items() if k != "format" and not k.startswith("styleinject_")}
