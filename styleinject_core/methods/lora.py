"""LoRA (arXiv 2106.09685): ΔW = (alpha / r) · B A, a StyleInject layer with one style, no router and no hypernetwork.

A method of its own because of its file: the one that every program reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import AdapterConfig, is_finite
from ..layers import LayerShape
from .method import Method, Problem
from .styleinject import StyleInjectLayer, configure, describe


def read(parts: dict[str, Tensor], stated: AdapterConfig | None, problem: Problem) -> StyleInjectLayer:
    """A layer from down (r, k[, kh, kw]), up (d, r[, 1, 1]), alpha (a number; absent: the rank) and mid (r, r, kh, kw).

    A mid matrix (CP decomposition: up · mid · down, with down and up 1x1) is worked into the down-projection, exactly.
    """
    for side in ("A", "B"):
        if side not in parts:
            raise problem(f"LoRA {'down' if side == 'A' else 'up'} matrix is missing")
    A, B, mid = parts["A"], parts["B"], parts.get("mid")
    if B.ndim == 4 and B.shape[2:] != (1, 1):
        raise problem(f"LoRA up matrix has shape {tuple(B.shape)}, expected a 1x1 convolution")
    if A.ndim not in (2, 4) or B.ndim not in (2, 4) or 0 in A.shape or 0 in B.shape or A.shape[0] != B.shape[1]:
        raise problem(f"LoRA ranks contradict: down {tuple(A.shape)}, up {tuple(B.shape)}")
    if mid is not None:
        if mid.ndim != 4 or mid.shape[1] != A.shape[0] or mid.shape[0] != B.shape[1] or A.shape[2:].numel() != 1:
            raise problem(f"LoRA mid matrix has shape {tuple(mid.shape)}, beside down {tuple(A.shape)}, up {tuple(B.shape)}")
        A = torch.einsum("rshw,sk->rkhw", mid.float(), A.flatten(1).float()).to(A.dtype)
    elif A.ndim == 4 and A.shape[2:] == (1, 1) and B.ndim == 2:
        A = A.flatten(1)
    alpha = None if "alpha" not in parts else _number(parts["alpha"], problem)
    config = stated or AdapterConfig(r=A.shape[0], n_styles=1, alpha=alpha, sta="none")
    if config.r != A.shape[0]:
        raise problem(f"file has rank {A.shape[0]}, config says {config.r}")
    kernel = (A.shape[2], A.shape[3]) if A.ndim == 4 else None
    return StyleInjectLayer(LayerShape(A.shape[1], B.shape[0], kernel), config, {"A": A.unsqueeze(0), "B": B.flatten(1)})


def _number(alpha: Tensor, problem: Problem) -> float:
    value = float(alpha) if alpha.numel() == 1 and not alpha.is_complex() else math.nan
    if not is_finite(value):
        raise problem(f"alpha is {alpha.tolist()}, expected one finite number")
    return value


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
    choices={"lora": {"n_styles": 1, "sta": "none", "router_pool": "mean"}},
    configure=configure,
    suffixes={"A": ".lora_down.weight", "B": ".lora_up.weight", "alpha": ".alpha", "mid": ".lora_mid.weight"},
    read=read,
    describe=describe,
    paper="https://arxiv.org/abs/2106.09685",
    lora_names=True,
    tensors=tensors,
)
