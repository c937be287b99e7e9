"""Differences: a weight's or a bias' change as it is (`diff`, `diff_b`; LyCORIS' norms: `w_norm`, `b_norm`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .fixed import EXTRA_SUFFIXES, FixedConfig, FixedLayer, describe, layer_of, not_trained, shape_of_numbers, stored
from .method import AdapterLayer, Method, Problem


class DifferenceLayer(FixedLayer):
    """Shapes: weight as W0, of a Linear, a convolution, a norm or anything else; bias (d,). One of them may be absent."""

    PRODUCT = ("weight",)
    weight: Tensor | None

    def product(self, parts: Mapping[str, Tensor]) -> Tensor | None:
        return parts.get("weight")


def difference_of(layer: AdapterLayer, reorder: Callable[[Tensor], Tensor]) -> DifferenceLayer:
    """A fixed layer as a difference, with its rows in another order; magnitudes stay as they are, as in ComfyUI's loader.

    Args:
        reorder: of the rows of a weight (d, ...) or a bias (d,).
    """
    shift, parts = layer.shift(), dict[str, Tensor | None](layer.tensors() if isinstance(layer, FixedLayer) else {})
    product = layer.undecomposed() if isinstance(layer, FixedLayer) else layer.delta()
    parts |= {"weight": reorder(product), "bias": None if shift is None else reorder(shift)}
    return DifferenceLayer(layer.shape, FixedConfig(METHOD.name), parts)


def read(parts: dict[str, Tensor], _stated: Any, problem: Problem) -> DifferenceLayer:
    """A layer from a file's tensors."""
    weight, bias = parts.get("weight"), parts.get("bias")
    known = weight if weight is not None else bias
    if known is None:
        raise problem(f"{', '.join(parts)} without the difference it belongs to")
    if known.ndim == 0 or 0 in known.shape or known.ndim > 5:
        raise problem(f"the difference has shape {tuple(known.shape)}")
    return layer_of(DifferenceLayer, METHOD.name, shape_of_numbers(known.shape[0], known.shape[1:]), parts, problem)


METHOD = Method(
    name="difference",
    title="difference",
    layer=DifferenceLayer,
    config=FixedConfig,
    choices={},
    configure=not_trained,
    suffixes={"weight": ".diff", **EXTRA_SUFFIXES},
    lora_names=True,
    read=read,
    describe=describe,
    tensors=stored,
)
