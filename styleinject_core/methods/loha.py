"""LoHa (LyCORIS): P = (w1_a · w1_b) ⊙ (w2_a · w2_b), the Hadamard product of two low-rank matrices.

A convolution's may have Tucker cores: each factor is then t · w_a · w_b with a core (r, r, kh, kw). In files: `hada_*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .fixed import EXTRA_SUFFIXES, FixedConfig, FixedLayer, describe, layer_of, not_trained, shape_of_numbers, stored, tucker
from .method import Method, Problem

_PRODUCT = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")


class LoHaLayer(FixedLayer):
    """Shapes: w1_a, w2_a (d, r), w1_b, w2_b (r, k·kh·kw); with cores t1, t2 (r, r, kh, kw): w_a (r, d), w_b (r, k)."""

    PRODUCT = _PRODUCT
    w1_b: Tensor

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    def product(self, parts: Mapping[str, Tensor]) -> Tensor:
        return _factor(parts, "1") * _factor(parts, "2")


def _factor(parts: Mapping[str, Tensor], n: str) -> Tensor:
    a, b, core = parts[f"w{n}_a"], parts[f"w{n}_b"], parts.get(f"t{n}")
    return a @ b if core is None else tucker(core, a, b)


def read(parts: dict[str, Tensor], _stated: Any, problem: Problem) -> LoHaLayer:
    """A layer from a file's tensors."""
    for part in _PRODUCT[:4]:
        if part not in parts:
            raise problem(f"hada_{part} is missing")
    if ("t1" in parts) != ("t2" in parts):
        raise problem(f"hada_{'t2' if 't1' in parts else 't1'} is missing")
    tucker = "t1" in parts
    sizes = []
    for n in "12":
        a, b = parts[f"w{n}_a"], parts[f"w{n}_b"]
        if a.ndim != 2 or b.ndim != 2 or 0 in (*a.shape, *b.shape):
            raise problem(f"hada_w{n}_a has shape {tuple(a.shape)}, hada_w{n}_b {tuple(b.shape)}, expected two matrices")
        if not tucker:
            fits = a.shape[1] == b.shape[0]
            sizes.append((a.shape[0], b.shape[1]))
        else:
            core = parts[f"t{n}"]
            fits = core.ndim >= 3 and 0 not in core.shape and tuple(core.shape[:2]) == (a.shape[0], b.shape[0])
            sizes.append((a.shape[1], b.shape[1], *core.shape[2:]))
        if not fits:
            core = f", hada_t{n} {tuple(parts[f't{n}'].shape)}" if tucker else ""
            raise problem(f"LoHa's ranks disagree: hada_w{n}_a {tuple(a.shape)}, hada_w{n}_b {tuple(b.shape)}{core}")
    if sizes[0] != sizes[1]:
        raise problem(f"LoHa's two factors are of {sizes[0]} and {sizes[1]}")
    return layer_of(LoHaLayer, METHOD.name, shape_of_numbers(sizes[0][0], sizes[0][1:]), parts, problem)


METHOD = Method(
    name="loha",
    title="LoHa",
    layer=LoHaLayer,
    config=FixedConfig,
    choices={},
    configure=not_trained,
    suffixes={**{part: f".hada_{part}" for part in _PRODUCT}, "alpha": ".alpha", **EXTRA_SUFFIXES},
    lora_names=True,
    read=read,
    describe=describe,
    tensors=stored,
)
