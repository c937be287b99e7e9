"""Adapter files: safetensors with `<module>.styleinject_<part>` tensors and the config in the header (method, section 5).

A plain LoRA (kohya, diffusers or PEFT spelling) loads as an adapter with one style, no router and no hypernetwork.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..adapter import Adapter
from ..config import AdapterConfig
from ..layer_names import parse
from ..layers import PARTS, LayerAdapter, LayerShape, UnsupportedLayerError
from .names import diffusers_name, is_other_model_part

FORMAT_VERSION = 1
_FILE_PARTS = {"A": "A", "B": "B", "router.weight": "router_weight", "router.bias": "router_bias",
               "hyper.weight": "hyper_weight", "hyper.bias": "hyper_bias"}  # fmt: skip
_NAME_OF_PART = {part: name for name, part in _FILE_PARTS.items()}
_STYLEINJECT_KEY = re.compile(r"(.+)\.styleinject_([A-Za-z_.]+)")
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
    if not any(_STYLEINJECT_KEY.fullmatch(key) for key in tensors):
        return _load_lora(path, tensors, metadata)
    config = _read_config(path, metadata)
    parts: dict[str, dict[str, Tensor]] = {}
    skipped = []
    for key, tensor in tensors.items():
        match = _STYLEINJECT_KEY.fullmatch(key)
        if match is None or is_other_model_part(key):
            skipped.append(key)
        elif match[2] not in _FILE_PARTS:
            raise AdapterFileError(f"{path.name}: {key}: unknown part {match[2]!r}, expected one of {', '.join(_FILE_PARTS)}")
        else:
            parts.setdefault(diffusers_name(match[1]), {})[_FILE_PARTS[match[2]]] = tensor
    layers = {name: _layer(path, name, own, config.for_layer(name) if config else None) for name, own in parts.items()}
    return Adapter(layers, _whole_config(layers, config), _other_metadata(metadata), path.stem, tuple(skipped))


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
        for part, value in layer.tensors().items():
            stored = value.detach().to("cpu", dtype).contiguous()
            if not torch.isfinite(stored).all():
                raise AdapterFileError(f"{path.name}: {name}: {part} has NaN or Inf values, nothing was written")
            tensors[f"{name}.styleinject_{_NAME_OF_PART[part]}"] = stored
    header = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": path.stem,
        "modelspec.date": date.today().isoformat(),
        **adapter.metadata,
        **(metadata or {}),
        "format": "pt",
        "styleinject_version": str(FORMAT_VERSION),
        "styleinject_config": json.dumps(adapter.config.to_dict()),
    }
    atomic_save(tensors, path, header)


def atomic_save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """save_file under a temporary name in the same folder, then rename. Raises AdapterFileError, leaving nothing behind."""
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".tmp", dir=path.parent)
        os.close(handle)
        save_file(tensors, temporary, metadata)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"{path.name}: could not be written to {path.parent}: {error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


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
            if not any(_STYLEINJECT_KEY.fullmatch(k) or _LORA_KEY.fullmatch(k) for k in keys):
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


def _read_config(path: Path, metadata: dict[str, str]) -> AdapterConfig | None:
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
        config = AdapterConfig.from_dict(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise AdapterFileError(f"{path.name}: styleinject_config: {error}") from None
    return replace(config, layers={diffusers_name(name): own for name, own in config.layers.items()})


def _layer(path: Path, name: str, parts: dict[str, Tensor], stated: AdapterConfig | None) -> LayerAdapter:
    """A LayerAdapter from a file's tensors. Their shapes are the truth; a config that contradicts them is an error."""

    def fail(problem: str) -> AdapterFileError:
        return AdapterFileError(f"{path.name}: {name}: {problem}")

    for part in ("A", "B"):
        if part not in parts:
            raise fail(f"styleinject_{part} is missing")
    for part, value in parts.items():
        if not value.is_floating_point():
            raise fail(f"{part} has dtype {value.dtype}, expected a floating point type")
        if not torch.isfinite(value.float() if value.element_size() == 1 else value).all():
            raise fail(f"{part} has NaN or Inf values")
    A, B = parts["A"], parts["B"]
    if A.ndim not in (3, 5) or B.ndim != 2:
        raise fail(f"A has shape {_dims(A)} and B {_dims(B)}, expected (n, r, k[, kh, kw]) and (d, r)")
    n, r, k = A.shape[:3]
    d = B.shape[0]
    expected = {"B": (d, r), "router_weight": (n, k), "router_bias": (n,), "hyper_weight": (d, n), "hyper_bias": (d,)}
    for part, shape in expected.items():
        if part in parts and tuple(parts[part].shape) != shape:
            raise fail(f"{_NAME_OF_PART[part]} has shape {_dims(parts[part])}, expected {shape} beside A of {_dims(A)}")
    for pair in (("router_weight", "router_bias"), ("hyper_weight", "hyper_bias")):
        if (pair[0] in parts) != (pair[1] in parts):
            raise fail(f"{pair[0]} and {pair[1]} must both be there or both be absent")
    if n > 1 and "router_weight" not in parts:
        raise fail(f"{n} styles but no router")
    for label, found, field in (("rank", r, "r"), ("n_styles", n, "n_styles")):
        if stated is not None and getattr(stated, field) != found:
            raise fail(f"file has {label} {found}, config says {getattr(stated, field)}")
    has_hyper = "hyper_weight" in parts
    if stated is not None and has_hyper != (stated.sta != "none"):
        raise fail(f"file has {'a' if has_hyper else 'no'} hypernetwork, config says sta = {stated.sta!r}")
    config = stated or AdapterConfig(r=r, n_styles=n, sta="multiplicative" if has_hyper else "none")
    kernel = (A.shape[3], A.shape[4]) if A.ndim == 5 else None
    try:
        return LayerAdapter.from_tensors(LayerShape(k, d, kernel), config, {part: parts.get(part) for part in PARTS})
    except UnsupportedLayerError as error:
        raise fail(str(error)) from None


def _load_lora(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Adapter:
    """A LoRA file as an adapter with one style, no router and no hypernetwork."""
    found: dict[str, dict[str, Tensor]] = {}
    skipped = []
    for key, tensor in tensors.items():
        match = _LORA_KEY.fullmatch(key)
        if match is None or is_other_model_part(key):
            if _OTHER_METHOD.search(key):
                raise AdapterFileError(
                    f"{path.name}: {key}: only plain LoRA is read, not DoRA, LoHa, LoKr, biases or weight differences"
                )
            skipped.append(key)
            continue
        side = {"down": "A", "A": "A", "up": "B", "B": "B", "mid": "mid", None: "alpha"}[match["side"]]
        module = (match["module"] or match["alpha"]).replace(".processor.", ".")
        if module.endswith("to_out"):  # diffusers' attention processors name the output projection without its index
            module += ".0"
        found.setdefault(diffusers_name(module), {})[side] = tensor
    layers = {}
    for name, own in found.items():
        if "mid" in own:
            raise AdapterFileError(f"{path.name}: {name}: LoRA with a mid matrix (CP decomposition) is not supported")
        if "A" not in own or "B" not in own:
            raise AdapterFileError(f"{path.name}: {name}: LoRA {'down' if 'A' not in own else 'up'} matrix is missing")
        A, B, alpha = own["A"], own["B"], own.get("alpha")
        if A.ndim == 4 and A.shape[2:] == (1, 1) and B.ndim == 2:
            A = A.flatten(1)
        if B.ndim == 4 and B.shape[2:] != (1, 1):
            raise AdapterFileError(f"{path.name}: {name}: LoRA up matrix has shape {_dims(B)}, expected a 1x1 convolution")
        if A.ndim not in (2, 4) or B.ndim not in (2, 4) or A.shape[0] != B.shape[1]:
            raise AdapterFileError(f"{path.name}: {name}: LoRA ranks contradict: down {_dims(A)}, up {_dims(B)}")
        value = None if alpha is None else float(alpha)
        if value is not None and not math.isfinite(value):
            raise AdapterFileError(f"{path.name}: {name}: alpha is {value}")
        config = AdapterConfig(r=A.shape[0], n_styles=1, alpha=value, sta="none")
        layers[name] = _layer(path, name, {"A": A.unsqueeze(0), "B": B.flatten(1)}, config)
    if not layers:
        raise AdapterFileError(
            f"{path.name}: {len(skipped)} tensors, none for a U-Net layer (a LoRA for the text encoder only?)"
        )
    return Adapter(layers, _whole_config(layers, None), _other_metadata(metadata), path.stem, tuple(skipped))


def _whole_config(layers: dict[str, LayerAdapter], stated: AdapterConfig | None) -> AdapterConfig:
    """The adapter's config: the stated one or the first layer's, with overrides for the layers that differ from it."""
    base = stated or replace(next(iter(layers.values())).config, target_modules=_targets(layers))
    return replace(base, layers={name: o for name, layer in layers.items() if (o := base.override(layer.config))})


def _targets(layers: dict[str, LayerAdapter]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(parse(name).target for name in layers))


def _other_metadata(metadata: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in metadata.items() if k != "format" and not k.startswith("styleinject_")}


def _dims(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
