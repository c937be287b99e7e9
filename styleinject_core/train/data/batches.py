"""What one forward pass of a training sees: latents, and the prompts as the model takes them."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Each(tuple[Any, ...]):
    """One value per prompt, of whatever kind: numbers, lists, tensors of other sizes. Only the model puts them together."""


@dataclass(frozen=True)
class Given:
    """What a host program gives a model beside a prompt, and of which of its kinds it is."""

    kind: type
    value: Any


Conditioning = dict[str, Any]  # what prompts become: tensors of one row per prompt, or an Each


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


def rows(conditioning: Mapping[str, Any], index: Tensor | Sequence[int]) -> Conditioning:
    """The prompts of some rows."""
    numbers = index.tolist() if isinstance(index, Tensor) else list(index)
    return {
        key: Each(value[k] for k in numbers) if isinstance(value, Each) else value[numbers]
        for key, value in conditioning.items()
    }


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A value with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Given):
        return Given(value.kind, mapped(value.value, change))
    if isinstance(value, dict):
        return {key: mapped(part, change) for key, part in value.items()}
    if type(value) in (list, tuple, Each):
        return type(value)(mapped(part, change) for part in value)
    return value


def nbytes(value: Any) -> int:
    """Of every tensor in a value."""
    sizes = [0]

    def noted(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    mapped(value, noted)
    return sum(sizes)


def joined(conditionings: Sequence[Mapping[str, Any]]) -> Conditioning:
    """Prompts one under the other.

    Token sequences of different length (B, L, C) are repeated to their least common multiple, which attention does not
    notice: its keys and values are repeated together.

    Raises:
        ValueError: prompts of different kinds (keys), or of other sizes than length.
    """
    keys = list(conditionings[0])
    result: Conditioning = {}
    for other in conditionings:
        if list(other) != keys:
            raise ValueError(f"conditionings of different kinds: one has {', '.join(keys)}, one has {', '.join(other)}")
    for key in keys:
        found = [c[key] for c in conditionings]
        if any(isinstance(value, Each) for value in found):
            result[key] = Each(row for value in found for row in value)
            continue
        values = [value for value in found if isinstance(value, Tensor)]
        if values[0].ndim == 3:
            length = math.lcm(*(v.shape[1] for v in values))
            values = [v.repeat(1, length // v.shape[1], 1) for v in values]
        if len({v.shape[1:] for v in values}) > 1:
            raise ValueError(f"conditioning {key!r} has sizes {', '.join(str(tuple(v.shape[1:])) for v in values)}")
        result[key] = torch.cat(values)
    return result


def where(mask: Tensor, conditioning: Mapping[str, Any], other: Mapping[str, Any]) -> Conditioning:
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


def conditioning_hash(conditioning: Mapping[str, Any]) -> str:
    """A fingerprint of prompts, for recognizing a run's data."""
    return tensors_hash(conditioning.values())


def weights_hash(parameters: Iterable[Tensor]) -> str:
    """A fingerprint of all of a model's weights: of their dtypes, shapes and, by checksums, every bit of them.

    CRC-32 takes 0.6 s for the 2 GB of Stable Diffusion 1.5's U-Net on one core, a cryptographic hash 2.7: nobody forges these.
    """
    return tensors_hash([part for parameter in parameters for part in _weights_parts(parameter.detach())])


def _weights_parts(parameter: Tensor) -> list[Any]:
    flat = parameter.flatten()
    try:
        content = flat.cpu().contiguous().view(torch.uint8)
    except (RuntimeError, NotImplementedError, TypeError):  # a quantized kind that has no bytes of its own
        content = flat.float().cpu().contiguous().view(torch.uint8)
    return [str(parameter.dtype), tuple(parameter.shape), zlib.crc32(content.numpy().data)]


def tensors_hash(tensors: Any) -> str:
    """A fingerprint of tensors' shapes and values, and of what else there is between them."""
    digest = hashlib.blake2b(digest_size=8)

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(str(tuple(value.shape)).encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        elif isinstance(value, Given):
            digest.update(value.kind.__name__.encode())
            add(value.value)
        elif isinstance(value, dict):
            for key, part in sorted(value.items(), key=lambda item: str(item[0])):
                digest.update(str(key).encode())
                add(part)
        elif isinstance(value, (list, tuple)):
            for part in value:
                add(part)
        else:
            digest.update(repr(value).encode())

    for tensor in tensors:
        add(tensor)
    return digest.hexdigest()
