"""What one forward pass of a training sees: latents, and the prompts as the model takes them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Conditioning = dict[str, Tensor]  # what a prompt becomes; every tensor has one row per prompt


@dataclass(frozen=True)
class Batch:
    """What one forward pass sees, B examples of one size.

    Args:
        latents: x0, (B, C, H, W) float32.
        conditioning: the captions, a row each.
        teacher: the same captions for a teacher with another text encoder.
        empty, teacher_empty: what takes a dropped caption's place, a row each, where that depends on the image.
        styles: (B,) the number of each example's style, from 0; -1 where it has none. None where no example has one.
    """

    latents: Tensor
    conditioning: Conditioning
    teacher: Conditioning | None = None
    empty: Conditioning | None = None
    teacher_empty: Conditioning | None = None
    styles: Tensor | None = None


def rows(conditioning: Mapping[str, Tensor], index: Tensor | Sequence[int]) -> Conditioning:
    """The prompts of some rows."""
    index = torch.as_tensor(index)
    return {key: value[index.to(value.device)] for key, value in conditioning.items()}


def joined(conditionings: Sequence[Mapping[str, Tensor]]) -> Conditioning:
    """Prompts one under the other.

    Token sequences of different length (B, L, C) are repeated to their least common multiple, which attention does not
    notice: its keys and values are repeated together.

    Raises:
        ValueError: prompts of different kinds (keys), or of other sizes than length.
    """
    keys = list(conditionings[0])
    result = {}
    for other in conditionings:
        if list(other) != keys:
            raise ValueError(f"conditionings of different kinds: one has {', '.join(keys)}, one has {', '.join(other)}")
    for key in keys:
        values = [c[key] for c in conditionings]
        if values[0].ndim == 3:
            length = math.lcm(*(v.shape[1] for v in values))
            values = [v.repeat(1, length // v.shape[1], 1) for v in values]
        if len({v.shape[1:] for v in values}) > 1:
            raise ValueError(f"conditioning {key!r} has sizes {', '.join(str(tuple(v.shape[1:])) for v in values)}")
        result[key] = torch.cat(values)
    return result


def where(mask: Tensor, conditioning: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Conditioning:
    """Each row from `conditioning`, or where mask (B,) is set from `other`, which has as many rows, or one for all.

    What only `conditioning` has is about the image, not the caption, and stays.
    """
    of_image = {key: value for key, value in conditioning.items() if key not in other}
    conditioning = {key: value for key, value in conditioning.items() if key in other}
    count = len(mask)
    rows_of_first, rows_of_other = torch.arange(count), torch.arange(count) % len(next(iter(other.values())))
    if mask.all():
        return {**rows(other, rows_of_other), **of_image}
    chosen = rows(joined([conditioning, other]), torch.where(mask, count + rows_of_other, rows_of_first))
    return {**chosen, **of_image}


def conditioning_hash(conditioning: Mapping[str, Tensor]) -> str:
    """A fingerprint of prompts, for recognizing a run's data."""
    return tensors_hash(conditioning.values())


def tensors_hash(tensors: Any) -> str:
    """A fingerprint of tensors' shapes and values."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
