"""What a method adds to a layer in one call, as one value that the forms work out without knowing the method.

    h* = h + (G + g / σ) ⊙ (h - μ) + Σ ΔW x + shift          (method, sections 2 and 3)

μ and σ are the mean and standard deviation of every channel of h over the positions of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .host import HostLayer, per_image_conv


class Change(Protocol):
    """A linear map ΔW of the layer's input, the same for all images of a call or one for each."""

    @property
    def folds(self) -> bool:
        """Whether it is one matrix per image, which can be added to W0: not so where positions differ."""

    def beside(self, out: Tensor, x: Tensor, host: HostLayer, owned: bool) -> Tensor:
        """out + ΔW x, beside the frozen layer; in place where `out` is `owned` and no gradient needs it."""

    def onto(self, weight: Tensor, owned: bool) -> Tensor:
        """weight + ΔW; weight is (d, k·kh·kw) for all images or (B, d, k·kh·kw)."""


@dataclass(eq=False, slots=True)  # made in every call, and frozen ones take three times as long to make
class Update:
    """One layer's update in one call. Each part is None, or empty, where there is none of it.

    Args:
        gain: G, (B, d), or (B, L, d) where it differs by token; at least float32.
        sigma_gain: g, what is divided by σ, in the same shapes; σ is clamped to at least `eps`.
        changes: the ΔW.
        shift: (d,), added to every position.
        mask: (B or 1, 1 or d, positions...) to broadcast over h: where the update applies, between 0 and 1.
    """

    gain: Tensor | None = None
    sigma_gain: Tensor | None = None
    eps: float = 0.0
    changes: tuple[Change, ...] = ()
    shift: Tensor | None = None
    mask: Tensor | None = None


Hear = Callable[[Any, Tensor], Tensor]  # (weights of a layer, s) -> the s to use: how a call listens to routers, and steers


@dataclass(frozen=True, eq=False, slots=True)
class Head:
    """An update that is a gain G and one change of low rank for each image, both known from the mean of x alone.

    Args:
        of: how many rows x has, over how many positions of each it is summed, x's dtype, and who listens -> a function of
            that sum (B, k), in at least float32, which gives G (B, d), in at least float32, and down (B, R, k·kh·kw) in
            x's dtype.
        up: (d, R).
        scale: of the change.
    """

    of: Callable[[int, int, torch.dtype, Hear | None], Callable[[Tensor], tuple[Tensor, Tensor]]]
    up: Tensor
    scale: float


class Prepared(Protocol):
    """Some layers' weights, of one method, ready for calls in one dtype on one device."""

    @property
    def folds(self) -> bool:
        """Whether every update of it can be folded into W0 before h is known."""

    @property
    def needs_mean(self) -> bool:
        """Whether `update` wants the mean of x."""

    @property
    def live(self) -> Sequence[Tensor]:
        """Those of the layers' tensors that it reads in each call as they are then, and has neither copies nor views of."""

    def update(self, x: Tensor, host: HostLayer, mean: Tensor | None, hear: Hear | None) -> Update:
        """The update for one call.

        Args:
            x: (B, L, k) or (B, k, H, W).
            mean: x averaged over positions, (B, k) in at least float32, where any of a layer's adapters needs it.
            hear: who listens to routers; None for nobody.
        """


class LayerWeights(Protocol):
    """One layer's tensors, cast for calls of one dtype and device, with the strengths of its two parts."""

    @property
    def owner(self) -> Hashable:
        """What the caller recognizes them by."""

    @property
    def active(self) -> bool:
        """Whether it changes anything at its strengths."""

    def cast(self, dtype: torch.dtype) -> LayerWeights:
        """The same with its tensors in another dtype."""

    def increment(self, x: Tensor, h: Tensor, host: HostLayer, hear: Hear | None) -> Tensor:
        """What it adds to h, by the method's equations, plainly: for `functional.reference`."""

    @classmethod
    def prepare(cls, several: Sequence[Any]) -> Sequence[Prepared]:
        """The layers of this method on one host layer, ready for calls."""


class Together:
    """Everything on one host layer, ready for calls. An iterable of what `LayerWeights.prepare` gave.

    Args:
        prepared: in any order.
    """

    def __init__(self, prepared: Iterable[Prepared]):
        self.prepared = tuple(prepared)
        self.folds = all(one.folds for one in self.prepared)
        self.needs_mean = any(one.needs_mean for one in self.prepared)
        self.live = [tensor for one in self.prepared for tensor in one.live]

    def __iter__(self) -> Iterator[Prepared]:
        return iter(self.prepared)

    @property
    def head(self) -> Head | None:
        """What there is where it is all of one kind, and that kind is simple enough for a straight line."""
        return getattr(self.prepared[0], "head", None) if len(self.prepared) == 1 else None

    def updates(self, x: Tensor, host: HostLayer, mean: Tensor | None, hear: Hear | None) -> list[Update]:
        """The updates for one call; arguments as those of `Prepared.update`."""
        return [one.update(x, host, mean, hear) for one in self.prepared]


def prepare(adapters: Iterable[LayerWeights]) -> Together:
    """Weights of one host layer, method by method."""
    kinds: dict[type, list[LayerWeights]] = {}
    for weights in adapters:
        kinds.setdefault(type(weights), []).append(weights)
    return Together([one for kind, several in kinds.items() for one in kind.prepare(several)])  # type: ignore[attr-defined]


@dataclass(eq=False, slots=True)
class LowRank:
    """ΔW = scale · up · down, with down (B, R, k[, kh, kw]) for each image or (R, k[, kh, kw]) for all, and up (d, R)."""

    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def folds(self) -> bool:
        return True

    @property
    def per_image(self) -> bool:
        return self.down.ndim in (3, 5)

    def beside(self, out: Tensor, x: Tensor, host: HostLayer, owned: bool) -> Tensor:
        batch = x.shape[0]
        if host.shape.is_conv:
            low = per_image_conv(x, host, self.down) if self.per_image else host.conv(x, self.down)
            flat, first, second = out.flatten(2), self.up.expand(batch, *self.up.shape), low.flatten(2)  # low is (B, R, H'W')
        elif self.per_image:
            flat, first, second = out, torch.bmm(x, self.down.mT), self.up.mT.expand(batch, -1, -1)  # low is (B, L, R)
        else:
            return raised(out, x @ self.down.mT, self.up, self.scale, owned)
        if owned and not torch.is_grad_enabled() and flat.is_contiguous():
            return flat.baddbmm_(first, second, alpha=self.scale).view_as(out)
        return torch.baddbmm(flat, first, second, alpha=self.scale).view_as(out)

    def onto(self, weight: Tensor, owned: bool) -> Tensor:
        down, per_image = self.down, self.per_image
        if down.ndim > 3 or (down.ndim == 3) != per_image:
            down = down.flatten(2 if per_image else 1)  # (B, R, k·kh·kw) or (R, k·kh·kw)
        if not per_image:
            if weight.ndim == 2:
                return torch.addmm(weight, self.up, down, alpha=self.scale)
            down = down.expand(weight.shape[0], -1, -1)
        batch = down.shape[0]
        if weight.ndim == 2:
            weight = weight.expand(batch, -1, -1)
        add = Tensor.baddbmm_ if owned else torch.baddbmm  # in place where `weight` is ours: it is W0's size per image
        return add(weight, self.up.expand(batch, -1, -1), down, alpha=self.scale)


def raised(out: Tensor, low: Tensor, up: Tensor, scale: float, owned: bool) -> Tensor:
    """out + scale · up low for tokens, out (B, L, d), low (B, L, R), up (d, R); in place as `Change.beside`."""
    flat = out.flatten(0, 1)
    add = Tensor.addmm_ if owned and not torch.is_grad_enabled() and flat.is_contiguous() else torch.addmm
    return add(flat, low.flatten(0, 1), up.mT, alpha=scale).view_as(out)


def gathered(updates: Sequence[Update]) -> Sequence[Change]:
    """The changes of some updates, with those of low rank that differ by image side by side in one."""
    if len(updates) == 1 and len(updates[0].changes) < 2:
        return updates[0].changes
    changes = [change for update in updates for change in update.changes]
    low = [change for change in changes if isinstance(change, LowRank) and change.per_image]
    if len(low) < 2:
        return changes
    ups = [change.up if change.scale == 1 else change.up * change.scale for change in low]
    whole = LowRank(torch.cat([change.down for change in low], 1), torch.cat(ups, 1))
    return [*(change for change in changes if change not in low), whole]
