"""The text encoder's part of an adapter's file: ComfyUI's own loader puts it on a CLIP."""

from __future__ import annotations

import logging
from typing import Any

import comfy.lora
import torch

from ..styleinject_core import Adapter
from ..styleinject_core.files.keys import parse
from ..styleinject_core.files.reader import other_part


def apply_to_clip(clip: Any, adapter: Adapter, strength: float) -> tuple[Any, str]:
    """A clone of a CLIP with the text encoder's part of the adapter's file; the CLIP itself where there is none.

    Returns:
        The CLIP, and a line for the report.

    Raises:
        AdapterFileError: the file is not there any more, or is another.
    """
    if not adapter.skipped:
        return clip, "  text encoder: the file has nothing for it"
    tensors = other_part(adapter)
    modules = _modules(tensors)
    table = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    loaded = comfy.lora.load_lora(tensors, table, log_missing=False)
    used = [key for key in modules if key in table]
    if not loaded:
        line = f"  text encoder: none of {len(modules)} layers fits this CLIP (the first: {', '.join(modules[:2])})"
        logging.warning("StyleInject: %s:%s", adapter.name, line)
        return clip, line
    patched = clip.clone()
    patched.add_patches(loaded, strength)
    line = f"  text encoder: {len(used)} of {len(modules)} layers matched, strength {strength:g}"
    if len(used) < len(modules):
        line += f"; not in this CLIP: {', '.join([key for key in modules if key not in table][:2])}"
        logging.warning("StyleInject: %s:%s", adapter.name, line)
    return patched, line


def _modules(tensors: dict[str, torch.Tensor]) -> list[str]:
    """The modules that a file's tensors belong to, as the file spells them."""
    return list(dict.fromkeys(found.module if (found := parse(key)) else key for key in tensors))
