"""Files that this program writes for itself, with a checksum: safetensors alone would not notice a changed number."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .atomic import save_tensors

CHECKSUM = "checksum"
# What reading a damaged file raises, and making sense of what it says.
DAMAGE = (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, OverflowError)


def checksum(tensors: Mapping[str, Tensor], header: str = "") -> str:
    """Over a header and over tensors, byte by byte."""
    digest = hashlib.blake2b(header.encode(), digest_size=16)
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """A file's metadata and its tensors, copies: not mapped to a file that may be replaced. Raises what DAMAGE names."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}, {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - no dict


def save_checked(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors with their checksum. Raises WriteError."""
    save_tensors({key: tensor.contiguous() for key, tensor in tensors.items()}, path, {CHECKSUM: checksum(tensors)})


def load_checked(path: Path) -> dict[str, Tensor] | None:
    """What was written; None where there is no such file, or where it is not as it was written."""
    try:
        metadata, tensors = read(path)
        return tensors if metadata.get(CHECKSUM) == checksum(tensors) else None
    except DAMAGE:
        return None
