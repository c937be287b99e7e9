"""Tokens: what a reference image says about style, or about content, as a value that can be mixed, kept and passed on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import STREAMS


class TokensError(ValueError):
    """Tokens that cannot be made, mixed or applied; the message names both sides."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one stream.

    Args:
        values: (R, S, width), float32. S is the queries of one reference (16), or a multiple of it for references side by
            side; R is 1, or the images of a batch that each have a reference of their own.
        stream: "style" or "content".
        model_id: `Deadiff.stream_id` of the model that made them.
        labels: what the references are called, for reports.

    Raises:
        TokensError: another shape, an unknown stream, or values that are not finite.
    """

    values: Tensor
    stream: str
    model_id: str = ""
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.stream not in STREAMS:
            raise TokensError(f"stream {self.stream!r}: expected one of {', '.join(STREAMS)}")
        if self.values.ndim != 3 or not self.values.is_floating_point():
            raise TokensError(f"{self.stream} tokens have shape {tuple(self.values.shape)}, expected (images, tokens, width)")
        if not torch.isfinite(self.values).all():
            raise TokensError(f"{self.stream} tokens have NaN or Inf values")
        # no gradient and no device: tokens are kept in node caches and in files
        object.__setattr__(self, "values", self.values.detach().to("cpu", torch.float32))

    @property
    def images(self) -> int:
        return self.values.shape[0]

    @property
    def count(self) -> int:
        """S, the keys it adds to a layer."""
        return self.values.shape[1]

    @property
    def width(self) -> int:
        return self.values.shape[2]

    def averaged(self) -> Tokens:
        """The mean over the images: one reference out of several. Queries are ordered, so slots are averaged as such."""
        return replace(self, values=self.values.mean(0, keepdim=True))

    def side_by_side(self) -> Tokens:
        """All images at once, (1, R·S, width): each image of the output attends to every reference."""
        return replace(self, values=self.values.flatten(0, 1).unsqueeze(0))

    def described(self) -> str:
        """In words, for reports."""
        per_image = f" for each of {self.images} images" if self.images > 1 else ""
        named = f" ({', '.join(self.labels)})" if self.labels else ""
        return f"{self.count} {self.stream} tokens{per_image}{named}"


def mix(tokens: Sequence[Tokens], weights: Sequence[float]) -> Tokens:
    """Σ r_i tokens_i with the weights r scaled to the sum 1: one reference between several.

    Args:
        tokens: of one stream and model, of one size; R of 1 beside R of more is used for each image.
        weights: r_i, finite; negative ones lead away from a reference. Their sum must be positive.

    Returns:
        Tokens of the size of one of them.

    Raises:
        TokensError: nothing to mix, tokens that do not go together, or weights without a positive sum.
    """
    _same_kind(tokens)
    if len(weights) != len(tokens):
        raise TokensError(f"{len(tokens)} sets of tokens and {len(weights)} weights")
    total = sum(weights)
    if not all(math.isfinite(w) for w in weights) or total <= 1e-6:
        raise TokensError(f"weights {', '.join(f'{w:g}' for w in weights)}: expected numbers with a sum above 0")
    counts = {t.count for t in tokens}
    if len(counts) > 1:
        raise TokensError(
            f"tokens to mix have different counts, {' and '.join(map(str, sorted(counts)))}: put them side by side"
        )
    images = _common_images(tokens)
    mixed = sum(w / total * t.values.expand(images, -1, -1) for t, w in zip(tokens, weights, strict=True))
    assert isinstance(mixed, Tensor)
    return Tokens(mixed, tokens[0].stream, tokens[0].model_id, tuple(label for t in tokens for label in t.labels))


def side_by_side(tokens: Sequence[Tokens]) -> Tokens:
    """Several references as more keys, (R, ΣS, width): one softmax over the text and all of them.

    Raises:
        TokensError: nothing, or tokens that do not go together.
    """
    _same_kind(tokens)
    images = _common_images(tokens)
    joined = torch.cat([t.values.expand(images, -1, -1) for t in tokens], 1)
    return Tokens(joined, tokens[0].stream, tokens[0].model_id, tuple(label for t in tokens for label in t.labels))


def _same_kind(tokens: Sequence[Tokens]) -> None:
    if not tokens:
        raise TokensError("no tokens to put together")
    for label, found in (
        ("streams", [t.stream for t in tokens]),
        ("widths", [str(t.width) for t in tokens]),
        ("DEADiff files", [t.model_id for t in tokens if t.model_id]),
    ):
        if len(set(found)) > 1:
            raise TokensError(f"tokens of different {label} cannot be put together: {', '.join(dict.fromkeys(found))}")


def _common_images(tokens: Sequence[Tokens]) -> int:
    counts = {t.images for t in tokens if t.images > 1}
    if len(counts) > 1:
        raise TokensError(f"tokens for {' and for '.join(map(str, sorted(counts)))} images cannot be put together")
    return counts.pop() if counts else 1
