"""Writing adapter files: safetensors with tensors named as each method says, and the config in the header (method, section 5).

`reader` reads them, and everybody else's.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import torch

from ..adapter import Adapter
from ..config import AdapterConfig
from ..methods import config_to_dict, method_of
from .atomic import WriteError, save_tensors
from .errors import AdapterFileError
from .names import lora_name
from .reader import FORMAT_VERSION


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
        "styleinject_version": str(_version(adapter)),
        "styleinject_config": json.dumps(config_to_dict(adapter.config)),
    }
    try:
        save_tensors(tensors, path, header)
    except WriteError as error:
        raise AdapterFileError(str(error)) from error


def _version(adapter: Adapter) -> int:
    """The oldest version of the format that has what is in the file, so that older programs read what they can."""
    configs = [layer.config for layer in adapter.layers.values() if isinstance(layer.config, AdapterConfig)]
    return FORMAT_VERSION if any(_is_new(config) for config in configs) else 1


def _is_new(config: AdapterConfig) -> bool:
    return config.router_pool == "paper" or config.tokens != "image" or config.reads_prompt
