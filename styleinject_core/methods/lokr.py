"""LoKr (LyCORIS): P = w1 ⊗ w2, where either factor may be a product itself: w1_a · w1_b, w2_a · w2_b, w2_a · t2 · w2_b.

With two full factors and nothing else it is DiffuseKronA (`methods/kronecker.py`), which is also trained. In files: `lokr_*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..functional.update import Change
from .fixed import EXTRA_SUFFIXES, FixedConfig, FixedLayer, describe, layer_of, not_trained, shape_of_numbers, stored, tucker
from .kronecker import KroneckerChange
from .method import Method, Problem

_PRODUCT = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")


class LoKrLayer(FixedLayer):
    """Shapes: w1 (a1, a2), w1_a (a1, r), w1_b (r, a2); w2 (b1, b2[, kh, kw]), w2_a (b1, r), w2_b (r, b2·kh·kw); with a core
    t2 (r, r, kh, kw): w2_a (r, b1), w2_b (r, b2)."""

    PRODUCT = _PRODUCT
    w1: Tensor | None
    w1_b: Tensor | None
    w2_b: Tensor | None

    @property
    def rank(self) -> int | None:
        """Of w2's product where it is one, else of w1's."""
        factor = self.w1_b if self.w2_b is None else self.w2_b
        return None if factor is None else factor.shape[0]

    def product(self, parts: Mapping[str, Tensor]) -> Tensor:
        first, second = self._factors(parts)
        return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second)

    def _factors(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        first = parts["w1"] if "w1" in parts else parts["w1_a"] @ parts["w1_b"]
        if "w2" in parts:
            return first, parts["w2"].contiguous()
        if "t2" in parts:
            return first, tucker(parts["t2"], parts["w2_a"], parts["w2_b"]).contiguous()
        return first, parts["w2_a"] @ parts["w2_b"]

    def calls(self, parts: Mapping[str, Tensor], strength: float) -> Change | None:
        """As two thin products, where the second factor has the kernel's shape; else as the whole matrix."""
        first, second = self._factors(parts)
        whole = (first.shape[0] * second.shape[0], first.shape[1] * second.shape[1], *second.shape[2:])
        if whole == self.shape.weight:
            return KroneckerChange(first * (strength * self.scale), second, permuted=False)
        return super().calls(parts, strength)


def read(parts: dict[str, Tensor], _stated: Any, problem: Problem) -> LoKrLayer:
    """A layer from a file's tensors."""
    for n in "12":
        whole, pair = f"w{n}" in parts, [f"w{n}_{side}" in parts for side in "ab"]
        if whole and any(pair):
            raise problem(f"it has both lokr_w{n} and lokr_w{n}_{'a' if pair[0] else 'b'}")
        if not whole and not all(pair):
            raise problem(f"lokr_w{n}{'' if not any(pair) else '_b' if pair[0] else '_a'} is missing")
    if "t2" in parts and "w2" in parts:
        raise problem("it has both lokr_w2 and lokr_t2")
    for part in _PRODUCT:
        value, least = parts.get(part), 3 if part == "t2" else 2
        if value is not None and (0 in value.shape or value.ndim < least or (value.ndim > 2 and part not in ("w2", "t2"))):
            raise problem(f"lokr_{part} has shape {tuple(value.shape)}")
    first = _size(parts, "1", problem)
    second = _size(parts, "2", problem)
    shape = shape_of_numbers(first[0] * second[0], (first[1] * second[1], *second[2:]))
    return layer_of(LoKrLayer, METHOD.name, shape, parts, problem)


def _size(parts: Mapping[str, Tensor], n: str, problem: Problem) -> tuple[int, ...]:
    """The sizes of one factor."""
    if f"w{n}" in parts:
        return tuple(parts[f"w{n}"].shape)
    a, b, core = parts[f"w{n}_a"], parts[f"w{n}_b"], parts.get("t2") if n == "2" else None
    fits = a.shape[1] == b.shape[0] if core is None else tuple(core.shape[:2]) == (a.shape[0], b.shape[0])
    if not fits:
        raise problem(
            f"LoKr's ranks disagree: lokr_w{n}_a {tuple(a.shape)}, lokr_w{n}_b {tuple(b.shape)}"
            + ("" if core is None else f", lokr_t2 {tuple(core.shape)}")
        )
    return (a.shape[0], b.shape[1]) if core is None else (a.shape[1], b.shape[1], *core.shape[2:])


METHOD = Method(
    name="lokr",
    title="LoKr",
    layer=LoKrLayer,
    config=FixedConfig,
    choices={},
    configure=not_trained,
    suffixes={**{part: f".lokr_{part}" for part in _PRODUCT}, "alpha": ".alpha", **EXTRA_SUFFIXES},
    lora_names=True,
    read=read,
    describe=describe,
    tensors=stored,
)
