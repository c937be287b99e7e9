"""DiffuseKronA (arXiv 2402.17412): ΔW = A ⊗ B, two small factors, the same for every image.

    (A ⊗ B)[i·b1 + r, j·b2 + c] = A[i, j] · B[r, c]        A (a1, a2), B (b1, b2[, kh, kw]), a1·b1 = d, a2·b2 = k

With x as X (a2, b2), (A ⊗ B) x is A X Bᵀ: two thin products per token, in the cheaper order: k·b1 + a2·d or k·a1 + b2·d
multiplications instead of k·d. In training they keep x alone for the backward pass. In files these are the full factors of
LyCORIS' LoKr. The authors' released program computes the same with its rows permuted (`permuted`):
ΔW[r·a1 + i, j·b2 + c] = A[i, j] · B[r, c].
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..config import LayerConfig
from ..functional.host import HostLayer
from ..functional.update import Hear, Prepared, Update
from ..layers import LayerShape
from . import difference
from .method import AdapterLayer, AdapterSettings, Cast, Method, Problem

FACTORS = (64, 4)  # the paper's best, in its program's order


@dataclass(frozen=True)
class KroneckerConfig(LayerConfig):
    """Hyperparameters of a Kronecker adapter.

    Args:
        factors: (a1, a2), A's sizes. A layer whose sizes they do not divide takes the largest divisors not above them.
        permuted: rows in the order of the authors' released program.
        target_modules, layers: see `LayerConfig`.

    Raises:
        ValueError: a value out of range, naming the field.
    """

    factors: tuple[int, int] = FACTORS
    permuted: bool = False
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def default_targets(cls) -> tuple[str, ...]:
        """The selector's words for the paper's four projections, by whatever names the model has them."""
        return ("queries", "keys", "values", "outputs")

    def __post_init__(self) -> None:
        whole = isinstance(self.factors, (list, tuple)) and len(self.factors) == 2
        if not whole or any(isinstance(f, bool) or not isinstance(f, int) or f < 1 for f in self.factors):
            raise ValueError(f"factors: expected two integers of at least 1, found {self.factors!r}")
        if not isinstance(self.permuted, bool):
            raise ValueError(f"permuted: expected true or false, found {self.permuted!r}")
        object.__setattr__(self, "factors", tuple(self.factors))
        self.check_layers()

    @property
    def method(self) -> str:
        return METHOD.name

    def resolved(self, shape: LayerShape) -> tuple[int, int]:
        """(a1, a2) on a layer: the largest divisors of d and k that are not above the config's factors."""
        return _divisor(shape.out_features, self.factors[0]), _divisor(shape.in_features, self.factors[1])


def _divisor(size: int, wanted: int) -> int:
    return next(f for f in range(min(size, wanted), 0, -1) if size % f == 0)


class KroneckerLayer(AdapterLayer):
    """One layer; new, B is 0. Shapes: A (a1, a2), B (b1, b2[, kh, kw])."""

    PARTS = ("A", "B")
    config: KroneckerConfig
    A: Tensor
    B: Tensor

    def initial(self) -> dict[str, Tensor]:
        a1, a2 = self.config.resolved(self.shape)
        b1, b2 = self.shape.out_features // a1, self.shape.in_features // a2
        return {"A": torch.randn(a1, a2) * a1**-0.5, "B": torch.zeros(b1, b2, *(self.shape.kernel or ()))}

    @property
    def note(self) -> str:
        resolved = self.config.resolved(self.shape)
        return "" if resolved == self.config.factors else f"factors {list(self.config.factors)} became {list(resolved)}"

    def delta(self) -> Tensor:
        return _product(self.A.float(), self.B.float(), self.config.permuted)

    def fitted(self, shape: LayerShape) -> AdapterLayer | None:
        """A convolution's factors that are stored as matrices, or the other way round; whole, for another kind of layer."""
        if shape.other:
            return difference.difference_of(self, lambda rows: rows).on(shape)
        (a1, a2), (b1, *_) = self.A.shape, self.B.shape
        inputs, *kernel = shape.weight[1:]
        fits = a1 * b1 == shape.out_features and a2 * self.B[0].numel() == math.prod(shape.weight[1:])
        if not fits or inputs % a2:
            return None
        B = self.B.detach().reshape(b1, inputs // a2, *kernel)
        return KroneckerLayer(shape, self.config, {"A": self.A.detach(), "B": B})

    def weights(
        self, cast: Cast, *, dma: float, sta: float, owner: Hashable = None, precise: Cast | None = None
    ) -> KroneckerWeights:
        return KroneckerWeights(cast(self.A), cast(self.B), dma, self.config.permuted, owner)


@dataclass(frozen=True, eq=False)
class KroneckerWeights:
    """The factors of one layer, cast for calls, and their strength."""

    A: Tensor
    B: Tensor
    dma: float
    permuted: bool
    owner: Hashable = None

    @property
    def active(self) -> bool:
        return self.dma != 0

    def cast(self, dtype: torch.dtype) -> KroneckerWeights:
        return replace(self, A=self.A.to(dtype), B=self.B.to(dtype))

    @classmethod
    def prepare(cls, several: Sequence[KroneckerWeights]) -> Sequence[Prepared]:
        return [KroneckerChange(w.A * w.dma, w.B, w.permuted) for w in several]

    def increment(self, x: Tensor, h: Tensor, host: HostLayer, hear: Hear | None) -> Tensor:
        """ΔW x with ΔW as the definition has it, entry by entry."""
        (a1, a2), (b1, b2) = self.A.shape, self.B.shape[:2]
        weight = self.B.new_zeros(a1 * b1, a2 * b2, *self.B.shape[2:])
        for i in range(a1):
            for j in range(a2):
                rows = slice(i, None, a1) if self.permuted else slice(i * b1, (i + 1) * b1)
                weight[rows, j * b2 : (j + 1) * b2] = self.A[i, j] * self.B
        return self.dma * host.down(x, weight)


@dataclass(frozen=True, eq=False)
class KroneckerChange:
    """A ⊗ B as a change of a layer, and the whole update of it."""

    A: Tensor
    B: Tensor
    permuted: bool
    needs_mean = False

    @property
    def live(self) -> Sequence[Tensor]:
        return (self.B,)

    @property
    def folds(self) -> bool:
        """Not in training: the gradient of A ⊗ B is as large as the layer's own."""
        return not torch.is_grad_enabled()

    def update(self, x: Tensor, host: HostLayer, mean: Tensor | None, hear: Hear | None) -> Update:
        return Update(changes=(self,))

    def beside(self, out: Tensor, x: Tensor, host: HostLayer, owned: bool) -> Tensor:
        return out + (self._conv(x, host) if host.shape.is_conv else self._linear(x))

    def _linear(self, x: Tensor) -> Tensor:
        (a1, a2), (b1, b2) = self.A.shape, self.B.shape
        X = x.unflatten(-1, (a2, b2))  # (..., a2, b2)
        if a2 * b1 * (a1 + b2) <= a1 * b2 * (a2 + b1):
            y = _thin(X, self.A, self.B)
        else:  # (A X) Bᵀ = (B (Xᵀ Aᵀ))ᵀ
            y = _thin(X.mT, self.B, self.A).mT
        return (y.mT if self.permuted else y).flatten(-2)

    def _conv(self, x: Tensor, host: HostLayer) -> Tensor:
        """B mixes b2 channels to b1 and knows the kernel, A mixes a2 groups of channels to a1, in either order."""
        (a1, a2), (b1, b2), batch = self.A.shape, self.B.shape[:2], x.shape[0]
        taps, stride = self.B[0, 0].numel(), host.module.stride
        at_input = stride[0] * stride[1]  # input positions per output position
        if a2 * b1 * (a1 + b2 * taps) <= a1 * b2 * (a2 * at_input + b1 * taps):
            low = host.conv(x.reshape(batch * a2, b2, *x.shape[2:]), self.B)  # (batch·a2, b1, H', W')
            y = (self.A @ low.reshape(batch, a2, -1)).reshape(batch, a1, b1, *low.shape[2:])
        else:
            mixed = (self.A @ x.reshape(batch, a2, -1)).reshape(batch * a1, b2, *x.shape[2:])
            low = host.conv(mixed, self.B)  # (batch·a1, b1, H', W')
            y = low.reshape(batch, a1, b1, *low.shape[2:])
        return (y.transpose(1, 2) if self.permuted else y).flatten(1, 2)

    def onto(self, weight: Tensor, owned: bool) -> Tensor:
        return weight + _product(self.A, self.B, self.permuted).flatten(1)


class _Thin(torch.autograd.Function):
    """P (X Qᵀ) for X (..., p2, q2), P (p1, p2), Q (q1, q2), as autograd has it but that X is all it keeps."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, P: Tensor, Q: Tensor) -> Tensor:
        ctx.save_for_backward(X, P, Q)
        return P @ (X @ Q.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        X, P, Q = ctx.saved_tensors
        wants_X, wants_P, wants_Q = ctx.needs_input_grad
        of_Z = P.mT @ gradient  # Z = X Qᵀ, (..., p2, q1)
        of_P = torch.einsum("...ir,...jr->ij", gradient, X @ Q.mT) if wants_P else None
        of_Q = torch.einsum("...jr,...jc->rc", of_Z, X) if wants_Q else None
        return of_Z @ Q if wants_X else None, of_P, of_Q


def _thin(X: Tensor, P: Tensor, Q: Tensor) -> Tensor:
    return _Thin.apply(X, P, Q) if torch.is_grad_enabled() else P @ (X @ Q.mT)


def _product(A: Tensor, B: Tensor, permuted: bool) -> Tensor:
    """A ⊗ B, (d, k[, kh, kw])."""
    product = torch.kron(A if B.ndim == 2 else A[:, :, None, None], B)
    if permuted:
        product = product.unflatten(0, (A.shape[0], B.shape[0])).transpose(0, 1).flatten(0, 1)
    return product


def configure(settings: AdapterSettings, special: Mapping[str, Any]) -> KroneckerConfig:
    """The config of a new adapter; rank, styles and alpha mean nothing here."""
    targets = settings.targets or KroneckerConfig.default_targets()
    return KroneckerConfig(**{"factors": settings.factors or FACTORS, **special}, target_modules=targets)


def parse_factors(text: str) -> tuple[int, ...]:
    """Factors as a person writes them, "64, 4". Raises ValueError."""
    try:
        first, second = map(int, text.split(","))
    except ValueError:
        raise ValueError(f'factors: expected two whole numbers, as in "64, 4", found {text!r}') from None
    return first, second


def read(parts: dict[str, Tensor], stated: KroneckerConfig | None, problem: Problem) -> KroneckerLayer:
    """A layer from a file's factors; the shapes are the truth, a config that contradicts them is an error."""
    permuted = not parts.keys().isdisjoint({"A_permuted", "B_permuted"})
    if permuted and not parts.keys().isdisjoint(KroneckerLayer.PARTS):
        raise problem("it has Kronecker factors in both orders of rows (lokr_w1, lokr_w2 and kronecker_permuted_A, _B)")
    A, B = (parts.get(part + ("_permuted" if permuted else "")) for part in KroneckerLayer.PARTS)
    if A is None or B is None:
        part = "A" if A is None else "B"
        raise problem(
            f"the Kronecker factor {part} ({METHOD.suffixes[part + ('_permuted' if permuted else '')][1:]}) is missing"
        )
    if A.ndim != 2 or B.ndim not in (2, 4) or 0 in A.shape or 0 in B.shape:
        raise problem(f"factors have shapes {tuple(A.shape)} and {tuple(B.shape)}, expected (a1, a2) and (b1, b2[, kh, kw])")
    shape = LayerShape(A.shape[1] * B.shape[1], A.shape[0] * B.shape[0], (B.shape[2], B.shape[3]) if B.ndim == 4 else None)
    config = replace(stated or KroneckerConfig((A.shape[0], A.shape[1])), permuted=permuted)
    if (resolved := config.resolved(shape)) != tuple(A.shape):
        raise problem(f"A is {tuple(A.shape)}, but the config's factors {config.factors} give {resolved} on a {shape}")
    return KroneckerLayer(shape, config, {"A": A, "B": B})


def tensors(layer: KroneckerLayer) -> Mapping[str, Tensor]:
    """The full factors of a LoKr; in the authors' order of rows, which LoKr cannot say, under names no other program reads."""
    suffix = "_permuted" if layer.config.permuted else ""
    return {part + suffix: value for part, value in layer.tensors().items()}


def describe(layers: Sequence[KroneckerLayer]) -> dict[str, str]:
    """The factors, for people."""
    found = dict.fromkeys(tuple(layer.A.shape) for layer in layers)
    return {"factors": ", ".join(f"{a1} x {a2}" for a1, a2 in found)}


METHOD = Method(
    name="kronecker",
    title="DiffuseKronA",
    layer=KroneckerLayer,
    config=KroneckerConfig,
    choices={"kronecker": {}},
    configure=configure,
    suffixes={
        "A": ".lokr_w1",
        "B": ".lokr_w2",
        "A_permuted": ".kronecker_permuted_A",
        "B_permuted": ".kronecker_permuted_B",
    },
    read=read,
    describe=describe,
    paper="https://arxiv.org/abs/2402.17412",
    lora_names=True,
    tensors=tensors,
)
