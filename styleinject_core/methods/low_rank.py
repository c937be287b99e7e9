"""LoRA as `methods/lora.py` cannot hold it: with magnitudes (DoRA), with a change of the bias, on other layers than Linear
and Conv2d.

A bias of the up matrix (PEFT's `lora_bias`) is scaled like the product; a difference of the bias (`diff_b`) is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..functional.update import Change, LowRank
from ..layers import LayerShape
from .fixed import EXTRA_SUFFIXES, FixedConfig, FixedLayer, describe, layer_of, not_trained, shape_of_numbers, stored
from .method import Method, Problem

_PRODUCT = ("down", "up", "mid")


class LowRankLayer(FixedLayer):
    """Shapes: down (r, k[, kernel]), up (d, r[, 1, 1]), mid (r, r, kernel) with a 1x1 down."""

    PRODUCT = _PRODUCT
    down: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def product(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["up"].flatten(1) @ _kernel(parts).flatten(1)

    def calls(self, parts: Mapping[str, Tensor], strength: float) -> Change:
        down = _kernel(parts).reshape(-1, *self.shape.weight[1:])
        return LowRank(down * (strength * self.scale), parts["up"].flatten(1))


def _kernel(parts: Mapping[str, Tensor]) -> Tensor:
    """The down-projection with a mid matrix worked into it."""
    down, mid = parts["down"], parts.get("mid")
    return down if mid is None else torch.einsum("rs...,sk->rk...", mid, down.flatten(1))


def plain(shape: LayerShape, down: Tensor, up: Tensor, alpha: float | None) -> LowRankLayer:
    """A LoRA on a layer of any kind: down (r, ...), up (d, r)."""
    return LowRankLayer(shape, FixedConfig(METHOD.name, alpha), {"down": down, "up": up})


def check(parts: Mapping[str, Tensor], problem: Problem) -> tuple[int, ...]:
    """The sizes of the weight that down, up and mid are for. Raises where they contradict each other."""
    for part in ("down", "up"):
        if part not in parts:
            raise problem(f"LoRA {part} matrix is missing")
    down, up, mid = parts["down"], parts["up"], parts.get("mid")
    if 0 in down.shape or 0 in up.shape:
        raise problem(f"LoRA of rank 0 or on no channels: down {tuple(down.shape)}, up {tuple(up.shape)}")
    if not 2 <= down.ndim <= 5 or not 2 <= up.ndim <= 5 or down.shape[0] != up.shape[1]:
        raise problem(f"LoRA ranks disagree: down {tuple(down.shape)}, up {tuple(up.shape)}")
    if up.shape[2:].numel() != 1:
        raise problem(f"LoRA up matrix has shape {tuple(up.shape)}, expected (d, r) or a 1x1 convolution")
    if mid is None:
        return up.shape[0], *down.shape[1:]
    rank = down.shape[0]
    if mid.ndim < 3 or 0 in mid.shape or tuple(mid.shape[:2]) != (rank, rank) or down.shape[2:].numel() != 1:
        raise problem(f"LoRA mid matrix has shape {tuple(mid.shape)}, beside down {tuple(down.shape)}, up {tuple(up.shape)}")
    return up.shape[0], down.shape[1], *mid.shape[2:]


def read(parts: dict[str, Tensor], _stated: Any, problem: Problem) -> LowRankLayer:
    """A layer from a file's tensors."""
    d, *rest = check(parts, problem)
    return layer_of(LowRankLayer, METHOD.name, shape_of_numbers(d, rest), parts, problem)


METHOD = Method(
    name="low_rank",
    title="LoRA",
    layer=LowRankLayer,
    config=FixedConfig,
    choices={},
    configure=not_trained,
    suffixes={**{part: f".lora_{part}.weight" for part in _PRODUCT}, "alpha": ".alpha", **EXTRA_SUFFIXES},
    lora_names=True,
    read=read,
    describe=describe,
    tensors=stored,
)
