"""LoRA (arXiv 2106.09685): ΔW = (alpha / r) · B A, a StyleInject layer with one style, no router and no hypernetwork.

A method of its own because of its file: the one that every program reads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import AdapterConfig
from ..layers import LayerShape
from .fixed import alpha_of
from .low_rank import check
from .method import Method, Problem
from .styleinject import StyleInjectLayer, configure, describe


def read(parts: dict[str, Tensor], stated: AdapterConfig | None, problem: Problem) -> StyleInjectLayer:
    """A layer from down (r, k[, kh, kw]), up (d, r[, 1, 1]) and alpha (a number; absent: the rank)."""
    d, k, *kernel = check({side: parts[part] for side, part in (("down", "A"), ("up", "B")) if part in parts}, problem)
    A, B = parts["A"], parts["B"]
    if len(kernel) not in (0, 2):
        raise problem(f"LoRA down matrix has shape {tuple(A.shape)}, expected (r, k) or (r, k, kh, kw)")
    if A.shape[2:] == (1, 1) and B.ndim == 2:
        A, kernel = A.flatten(1), []
    config = stated or AdapterConfig(r=A.shape[0], n_styles=1, alpha=alpha_of(parts, problem), sta="none")
    if config.r != A.shape[0]:
        raise problem(f"file has rank {A.shape[0]}, config says {config.r}")
    shape = LayerShape(k, d, (kernel[0], kernel[1]) if kernel else None)
    return StyleInjectLayer(shape, config, {"A": A.unsqueeze(0), "B": B.flatten(1)})


def tensors(layer: StyleInjectLayer) -> Mapping[str, Tensor]:
    """Down (r, k[, kh, kw]), up (d, r[, 1, 1]) and alpha."""
    up = layer.B[:, :, None, None] if layer.shape.is_conv else layer.B
    config = layer.config
    return {"A": layer.A[0], "B": up, "alpha": torch.tensor(float(config.r if config.alpha is None else config.alpha))}


METHOD = Method(
    name="lora",
    title="LoRA",
    layer=StyleInjectLayer,
    config=AdapterConfig,
    choices={"lora": {"n_styles": 1, "sta": "none", "router_pool": "mean", "router_input": "layer"}},
    configure=configure,
    suffixes={"A": ".lora_down.weight", "B": ".lora_up.weight", "alpha": ".alpha"},
    read=read,
    describe=describe,
    paper="https://arxiv.org/abs/2106.09685",
    lora_names=True,
    tensors=tensors,
)
