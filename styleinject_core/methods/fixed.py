"""What LoHa, LoKr, differences and decomposed LoRAs have in common: a fixed change of a layer, as LyCORIS files hold it.

    W* = W0 + s · (alpha / r) · P                                  P: the method's product of its tensors, in W0's numbers
    W* = W0 + s · ((W0 + (alpha / r) · P) · m / |W| - W0)          with magnitudes m (DoRA, arXiv 2402.09353)
    b* = b + s · bias

|W| is the norm along the axis that m stands for: of rows or of columns. ComfyUI's loader, whose results these files are
meant to have, takes the norms of rows from W0 and those of columns from W0 + (alpha / r) · P; PEFT takes the norms of rows
from the latter (`peft_magnitude`).

Files keep the same numbers in several shapes, a convolution's as a matrix and a matrix' as a 1x1 convolution. A layer
keeps them as they came and brings them into W0's shape when it is used, so that it fits every layer of as many numbers.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..config import LayerConfig, is_finite
from ..functional.host import HostLayer
from ..functional.update import Change, Hear, Prepared, Update
from ..layers import LayerShape, UnsupportedLayerError
from .method import AdapterLayer, AdapterSettings, Cast, Problem

Layer = TypeVar("Layer", bound="FixedLayer")
EXTRAS = ("bias", "magnitude", "peft_magnitude")
EXTRA_SUFFIXES = {"bias": ".diff_b", "magnitude": ".dora_scale", "peft_magnitude": ".lora_magnitude_vector.weight"}


@dataclass(frozen=True)
class FixedConfig(LayerConfig):
    """What a file of fixed changes says beside its tensors.

    Args:
        kind: the method's name.
        alpha: the product is scaled by alpha / r; None means not at all.
        target_modules, layers: see `LayerConfig`.

    Raises:
        ValueError: a value out of range, naming the field.
    """

    kind: str = "difference"
    alpha: float | None = None
    target_modules: tuple[str, ...] = ()
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.alpha is not None and not is_finite(self.alpha):
            raise ValueError(f"alpha: expected a finite number, found {self.alpha!r}")
        self.check_layers()

    @property
    def method(self) -> str:
        return self.kind


class FixedLayer(AdapterLayer):
    """One layer; a subclass names its tensors and multiplies them.

    Tensors beside the product's: bias (d,), magnitude (d, 1[, 1, 1]) or (1, k[, 1, 1]), peft_magnitude (d,) or (1, d, 1, 1).
    """

    config: FixedConfig
    bias: Tensor | None
    magnitude: Tensor | None
    peft_magnitude: Tensor | None
    PRODUCT: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls.PARTS = (*cls.PRODUCT, *EXTRAS)

    def initial(self) -> dict[str, Tensor]:
        raise UnsupportedLayerError("this kind of adapter is read from files, not trained")

    def product(self, parts: Mapping[str, Tensor]) -> Tensor | None:
        """P in any shape of W0's numbers; None where only the bias changes."""
        raise NotImplementedError

    @property
    def rank(self) -> int | None:
        """r, what alpha is divided by; None where alpha has no effect."""
        return None

    @property
    def scale(self) -> float:
        """alpha / r."""
        return 1.0 if self.config.alpha is None or self.rank is None else self.config.alpha / self.rank

    def calls(self, parts: Mapping[str, Tensor], strength: float) -> Change | None:
        """The change in a call, where no magnitudes are; a subclass that can do without the whole matrix says how."""
        product = self.product(parts)
        return None if product is None else Dense((product * (strength * self.scale)).reshape(self.shape.weight))

    @property
    def decomposed(self) -> bool:
        """Whether it has magnitudes, and so depends on W0."""
        return self.magnitude is not None or self.peft_magnitude is not None

    def delta(self) -> Tensor:
        """ΔW in W0's shape and float32. Raises ValueError: it depends on W0."""
        if self.decomposed:
            raise ValueError("a decomposed change (DoRA) depends on the frozen weight: ask for change(weight)")
        return self.undecomposed()

    def change(self, weight: Tensor) -> Tensor:
        """ΔW at strength 1 of a layer with that W0, in W0's shape and float32."""
        product = self.undecomposed(weight.device)
        if not self.decomposed:
            return product
        parts = {part: value.detach().to(weight.device) for part, value in self.tensors().items() if part in EXTRAS}
        return decomposed(weight.float(), product, parts)

    def undecomposed(self, device: torch.device | None = None) -> Tensor:
        """(alpha / r) · P in W0's shape and float32: the change without what magnitudes make of it."""
        parts = {part: value.detach().to(device, torch.float32) for part, value in self.tensors().items()}
        product = self.product(parts)
        zeros = next(iter(parts.values())).new_zeros
        return zeros(self.shape.weight) if product is None else (product * self.scale).reshape(self.shape.weight)

    def shift(self) -> Tensor | None:
        """The change of the bias at strength 1, (d,) in float32; None where there is none."""
        return None if self.bias is None else self.bias.detach().float().flatten()

    def weights(
        self, cast: Cast, *, dma: float, sta: float, owner: Hashable = None, precise: Cast | None = None
    ) -> FixedWeights:
        return FixedWeights(self, {part: cast(value) for part, value in self.tensors().items()}, dma, owner)

    def fitted(self, shape: LayerShape) -> AdapterLayer | None:
        """The same parameters on a layer of that shape; None where they are not its numbers."""
        rows, numbers = self.shape.weight[0], math.prod(self.shape.weight)
        only_bias = not any(getattr(self, part) is not None for part in self.PRODUCT)
        if rows != shape.weight[0] or not self._magnitude_fits(shape) or (numbers != math.prod(shape.weight) and not only_bias):
            return None
        layer = type(self)(shape, self.config, {})
        for part, value in self.tensors().items():
            layer.register_parameter(part, value)  # the same, not a copy: what moves one moves the other
        return layer

    def on(self, shape: LayerShape) -> AdapterLayer | None:
        """See `AdapterLayer.on`."""
        return super().on(shape) if self._magnitude_fits(shape) else None

    def _magnitude_fits(self, shape: LayerShape) -> bool:
        if self.magnitude is None or self.magnitude.shape[0] == shape.weight[0]:
            return True
        return len(shape.weight) > 1 and self.magnitude.numel() == shape.weight[1]

    def without_bias(self) -> AdapterLayer | None:
        """The same without the change of the bias; None where nothing is left."""
        layer = self.fitted(self.shape)
        if layer is None or not any(getattr(self, part) is not None for part in self.PRODUCT):
            return None
        layer.register_parameter("bias", None)
        return layer


@dataclass(frozen=True, eq=False)
class FixedWeights:
    """A layer's tensors, cast for calls, and their strength."""

    layer: FixedLayer
    parts: Mapping[str, Tensor]
    dma: float
    owner: Hashable = None

    @property
    def active(self) -> bool:
        return self.dma != 0

    def cast(self, dtype: torch.dtype) -> FixedWeights:
        return replace(self, parts={part: value.to(dtype) for part, value in self.parts.items()})

    @classmethod
    def prepare(cls, several: Sequence[FixedWeights]) -> Sequence[Prepared]:
        return [_Fixed(weights) for weights in several]

    def increment(self, x: Tensor, h: Tensor, host: HostLayer, hear: Hear | None) -> Tensor:
        """ΔW x, with ΔW whole."""
        weight = self._change(x, host)
        out = x.new_zeros(h.shape) if weight is None else host.down(x, weight)
        if (bias := self.parts.get("bias")) is not None:
            out = out + (bias.flatten()[:, None, None] if host.shape.is_conv else bias.flatten())
        return self.dma * out

    def _change(self, x: Tensor, host: HostLayer) -> Tensor | None:
        """ΔW at strength 1."""
        layer = self.layer
        product = layer.product(self.parts)
        if product is not None:
            product = (product * layer.scale).reshape(layer.shape.weight)
        if not layer.decomposed:
            return product
        weight = host.frozen_weight(x)
        change = torch.zeros_like(weight) if product is None else product
        return decomposed(weight.float(), change.float(), self.parts).to(change.dtype)

    def change(self, x: Tensor, host: HostLayer) -> Change | None:
        """ΔW at this strength."""
        if not self.layer.decomposed:
            return self.layer.calls(self.parts, self.dma)
        whole = self._change(x, host)
        return None if whole is None else Dense(whole * self.dma)


@dataclass(frozen=True, eq=False)
class _Fixed:
    """A layer ready for calls."""

    weights: FixedWeights
    needs_mean = False

    @property
    def live(self) -> Sequence[Tensor]:
        return tuple(self.weights.parts.values())

    @property
    def folds(self) -> bool:
        return not torch.is_grad_enabled()

    def update(self, x: Tensor, host: HostLayer, mean: Tensor | None, hear: Hear | None) -> Update:
        change, bias = self.weights.change(x, host), self.weights.parts.get("bias")
        shift = None if bias is None else bias.flatten() * self.weights.dma
        return Update(changes=() if change is None else (change,), shift=shift)


@dataclass(frozen=True, eq=False)
class Dense:
    """A change given as its whole matrix, in W0's shape."""

    weight: Tensor
    folds = True

    def beside(self, out: Tensor, x: Tensor, host: HostLayer, owned: bool) -> Tensor:
        return out + host.down(x, self.weight)

    def onto(self, weight: Tensor, owned: bool) -> Tensor:
        return weight + self.weight.flatten(1)


def decomposed(weight: Tensor, product: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """ΔW of a change with magnitudes.

    Args:
        weight: W0; product: (alpha / r) · P. Both float32 and of one shape.
        parts: holds the magnitudes.
    """
    changed = weight + product
    flat = changed.flatten(1) if changed.ndim > 1 else changed[:, None]
    tiny = torch.finfo(weight.dtype).eps
    if (peft := parts.get("peft_magnitude")) is not None:
        factor = peft.float().flatten() / flat.norm(dim=1)
        return changed * factor.reshape(-1, *[1] * (weight.ndim - 1)) - weight
    magnitude = parts["magnitude"].float()
    if magnitude.shape[0] == weight.shape[0]:  # rows; their norms from W0, as ComfyUI's loader has it
        norm = weight.reshape(weight.shape[0], -1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    else:
        columns = changed.transpose(0, 1).reshape(changed.shape[1], -1).norm(dim=1)
        norm = columns.reshape(1, -1, *[1] * (weight.ndim - 2))
    return changed * (_like(magnitude, weight.ndim) / (norm + tiny)) - weight


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """core · a · b, LyCORIS' Tucker product: core (r, r, ...), a (r, p), b (r, q) -> (p, q, ...)."""
    return torch.einsum("ij...,jr,ip->pr...", core, b, a)


def _like(magnitude: Tensor, dimensions: int) -> Tensor:
    """Magnitudes with as many dimensions as W0: the 1x1 of a convolution's may be there or not."""
    extra = dimensions - magnitude.ndim
    return magnitude.reshape(*magnitude.shape, *[1] * extra) if extra >= 0 else magnitude.reshape(magnitude.shape[:dimensions])


def alpha_of(parts: Mapping[str, Tensor], problem: Problem) -> float | None:
    """The number in a file's alpha tensor; None where there is none."""
    if (alpha := parts.get("alpha")) is None:
        return None
    value = float(alpha) if alpha.numel() == 1 and not alpha.is_complex() else math.nan
    if not is_finite(value):
        raise problem(f"alpha is {_shown(alpha)}, expected one finite number")
    return value


def check_extras(parts: Mapping[str, Tensor], shape: LayerShape, problem: Problem) -> None:
    """Raise where a bias or magnitudes do not belong to a layer of that shape."""
    d = shape.weight[0]
    bias = parts.get("bias")
    if bias is not None and bias.numel() != d:
        raise problem(f"the change of the bias has shape {tuple(bias.shape)} beside {shape}")
    peft = parts.get("peft_magnitude")
    if peft is not None and peft.numel() != d:
        raise problem(f"magnitudes have shape {tuple(peft.shape)} beside {shape}")
    magnitude = parts.get("magnitude")
    if magnitude is None:
        return
    if "peft_magnitude" in parts:
        raise problem("it has both dora_scale and lora_magnitude_vector")
    rows = magnitude.shape[:1] == (d,)  # of columns there may be as many as the layer's, or as a convolution's channels
    if magnitude.ndim < 2 or (magnitude.numel() != d if rows else magnitude.shape[0] != 1 or not magnitude.numel()):
        raise problem(f"dora_scale has shape {tuple(magnitude.shape)} beside {shape}, expected (d, 1) or (1, k)")


def layer_of(kind: type[Layer], name: str, shape: LayerShape, parts: Mapping[str, Tensor], problem: Problem) -> Layer:
    """A layer as a file holds it, after its product's tensors have been checked."""
    check_extras(parts, shape, problem)
    return kind(shape, FixedConfig(name, alpha_of(parts, problem)), {part: parts.get(part) for part in kind.PARTS})


def not_trained(settings: AdapterSettings, _special: Mapping[str, Any]) -> FixedConfig:
    """For the methods that are only read."""
    raise ValueError(f"method: {settings.method!r} is read from files, not trained")


def stored(layer: FixedLayer) -> dict[str, Tensor]:
    """A layer's tensors as files keep them: its own, and alpha."""
    tensors: dict[str, Tensor] = dict(layer.tensors())
    if layer.config.alpha is not None and layer.rank is not None:
        tensors["alpha"] = torch.tensor(float(layer.config.alpha))
    return tensors


def describe(layers: Sequence[FixedLayer]) -> dict[str, str]:
    """Ranks, and what else the layers have, for people."""
    ranks = sorted({layer.rank for layer in layers if layer.rank is not None})
    found = {"rank": ", ".join(map(str, ranks))} if ranks else {}
    if count := sum(layer.decomposed for layer in layers):
        found["magnitudes"] = f"DoRA on {count} layers"
    if count := sum(layer.bias is not None for layer in layers):
        found["biases"] = f"{count} layers"
    return found


def shape_of_numbers(d: int, rest: Sequence[int]) -> LayerShape:
    """The layer that a weight (d, *rest) is of, as far as it can be told: Linear, Conv2d, or another."""
    if len(rest) == 1:
        return LayerShape(rest[0], d)
    if len(rest) == 3:
        return LayerShape(rest[0], d, (rest[1], rest[2]))
    return LayerShape(rest[0] if rest else d, d, other=(d, *rest))


def _shown(alpha: Tensor) -> str:
    return str(alpha.tolist()) if alpha.numel() < 5 else f"{alpha.numel()} numbers"
