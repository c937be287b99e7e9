"""The style router: s = softmax(pool(router(x))), shared by every form (method, section 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers import LayerWeights
from .host import HostLayer, statistics_dtype


def route(x: Tensor, weights: LayerWeights, host: HostLayer, mean: Tensor | None = None) -> Tensor:
    """Style probabilities of one adapter on one layer.

    The router is linear, so pooled logits need only the pooled input.

    Args:
        x: (B, L, k) or (B, k, H, W).
        mean: x averaged over positions (B, k), where the caller has it already.

    Returns:
        (B, n), or (B, L, n) with router_pool "token"; in x's dtype, computed in at least float32.
    """
    if weights.router_weight is None:
        return x.new_ones(x.shape[0], 1)
    precise = statistics_dtype(x)
    router_weight, router_bias = weights.router_weight.to(precise), weights.router_bias.to(precise)
    if weights.by_token:
        logits = x.to(precise) @ router_weight.mT + router_bias  # (B, L, n)
    else:
        if mean is None:
            mean = x.mean(host.positions, dtype=precise)  # (B, k)
        logits = mean @ router_weight.mT + router_bias  # (B, n)
        if weights.router_pool == "sum":
            logits = logits * (x[0].numel() // x.shape[1 if host.shape.is_conv else 2])
    s = torch.softmax(logits, -1)
    if weights.on_route is not None:
        s = weights.on_route(s)
    return s.to(x.dtype)
