"""What one call of the host model knows, and who listens to the routers during it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .functional.host import HostLayer, statistics_dtype

EVERYWHERE = "all"  # the role of rows that no host has told apart


@dataclass(frozen=True)
class Tokens:
    """Where the image's tokens are in the sequences of a transformer, for one call of it.

    Args:
        count: how many there are.
        after: how many follow them in every sequence that holds them: padding, reference images. What else a sequence holds is
            before them, unless `leading`.
        frames: of the clip that they are of, which follow one another.
        leading: whether nothing is before them, and all else after them.
        alone: whether only sequences of nothing else are known to hold them.
    """

    count: int
    after: int = 0
    frames: int = 1
    leading: bool = False
    alone: bool = False

    def within(self, length: int) -> slice | None:
        """Where they are in a sequence of that length; None where it cannot be one that holds them."""
        if self.alone and length != self.count:
            return None
        start = 0 if self.leading else length - self.after - self.count
        return slice(start, start + self.count) if start >= 0 and start + self.count <= length else None


class Listener:
    """Somebody who steers, records or measures what the routers of one adapter do in a call; these defaults do nothing.

    Nothing here may wait for the device.
    """

    def of(self, rows: Sequence[int]) -> Listener:
        """Who listens to a call of these rows of a batch alone, where the host divides one."""
        return self

    def steer(self, layer: str, s: Tensor) -> Tensor:
        """The s to use in that layer instead of s, (B, n) or (B, L, n)."""
        return s

    def record(self, layer: str, s: Tensor) -> None:
        """The layer uses s."""

    def measures(self, layer: str) -> bool:
        """Whether `measure` is to be called for this layer."""
        return False

    def measure(self, layer: str, s: Tensor, x: Tensor, h: Tensor | None, host: HostLayer, weights: Any) -> None:
        """The layer has been called on x with these weights; h is the frozen layer's output where it was computed."""


@dataclass(frozen=True, eq=False)
class ModelCall:
    """One call of the host model, as the host knows it; made by the host, and valid for the length of the call.

    Args:
        images: rows of the batch, where the host may split an image over several rows of a layer's input; 0: every row is
            an image.
        sigma: the noise level, a number or a tensor of one.
        extras: what else the host says, for those who know the host.
        find_roles: tells the roles of the batch's equal parts ("positive", "negative", ...), in order, when asked.
        listeners: who steers and records; the first to steer is the first asked.
        tokens: where the image's tokens are; None where there are no others, or nobody knows.
        prompt: the text conditioning of every row averaged over its tokens (`averaged`), (B, c); None where there is none.
    """

    images: int = 0
    sigma: float | Tensor = math.nan
    extras: Mapping[str, Any] = field(default_factory=dict)
    find_roles: Callable[[], tuple[str, ...]] = lambda: (EVERYWHERE,)
    listeners: tuple[Listener, ...] = ()
    tokens: Tokens | None = None
    prompt: Tensor | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """The role of each equal part of the batch."""
        return self.find_roles()


def averaged(text: Tensor, mask: Tensor | None = None) -> Tensor:
    """What routers read of a prompt: text conditioning (B, L, c) averaged over its tokens -> (B, c), in at least float32.

    Args:
        mask: (B, L), true or above 0 where a token counts; None where all do. One of no tokens at all counts all.
    """
    if mask is None or mask.shape != text.shape[:2]:
        return text.mean(1, dtype=statistics_dtype(text))
    counts = (mask > 0).to(statistics_dtype(text))
    counts = torch.where(counts.sum(1, keepdim=True) > 0, counts, 1.0)
    return torch.bmm(counts[:, None], text.to(counts.dtype))[:, 0] / counts.sum(1, keepdim=True)


class CurrentCall:
    """The call that an adapter's layers are in; the layers of one adapter on one host share it.

    `ran` is set when one of them is called; who wants to know sets it to False before.
    """

    def __init__(self) -> None:
        self.call = ModelCall()
        self.ran = False

    @contextmanager
    def during(self, call: ModelCall, rows: Sequence[int] | None = None) -> Iterator[ModelCall]:
        """Make `call` the current one for the length of a with block; blocks nest, and listeners outside hear on.

        Args:
            rows: of the batch that listeners outside know, which the call is of; None for all.
        """
        former = self.call
        outside = former.listeners if rows is None else tuple(listener.of(rows) for listener in former.listeners)
        self.call = replace(call, listeners=(*outside, *call.listeners))
        try:
            yield self.call
        finally:
            self.call = former

    @contextmanager
    def exactly(self, call: ModelCall) -> Iterator[None]:
        """Another call, with its own listeners alone: where a block runs again, or nobody is to hear."""
        former, self.call = self.call, call
        try:
            yield
        finally:
            self.call = former

    @contextmanager
    def listened(self, *listeners: Listener) -> Iterator[ModelCall]:
        """The current call with more listeners."""
        with self.during(replace(self.call, listeners=listeners)) as call:
            yield call
