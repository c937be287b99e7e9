"""The paper's equations, written as in the paper: slow, plain, and the oracle of every test.

The other forms (`stack`, `fold`) take the same arguments and must give the same result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers import LayerWeights
from .host import HostLayer


def route(x: Tensor, weights: LayerWeights, host: HostLayer) -> Tensor:
    """s = softmax(pool(router(x))): logits at every position first, pooled after. Returns (B, n), or (B, L, n) by token."""
    if weights.router_weight is None:
        return x.new_ones(x.shape[0], 1)
    tokens = x.flatten(2).mT if host.shape.is_conv else x  # (B, positions, k)
    logits = tokens @ weights.router_weight.mT + weights.router_bias  # (B, positions, n)
    if weights.router_pool == "mean":
        logits = logits.mean(1)
    elif weights.router_pool == "sum":
        logits = logits.sum(1)
    s = torch.softmax(logits, -1)
    return s if weights.on_route is None else weights.on_route(s)


def forward(x: Tensor, host: HostLayer, adapters: list[LayerWeights]) -> Tensor:
    """One adapted layer, adapters summed as increments (method, sections 1 and 2).

    Args:
        x: input of the layer, (B, L, k) for a Linear, (B, k, H, W) for a convolution.
        host: the frozen layer.
        adapters: the adapters on it; each with its strengths.

    Returns:
        h* in the shape of the frozen layer's output h.
    """
    h = host(x)
    mean = h.mean(host.positions, keepdim=True)  # μ, eq. 3
    std = h.std(host.positions, correction=0, keepdim=True)  # σ, eq. 3
    out = h
    for weights in adapters:
        s = route(x, weights, host)
        if weights.adapts_statistics:
            sigma = std.clamp(min=weights.eps)
            hyper = host.per_channel(s @ weights.hyper_weight.mT + weights.hyper_bias)
            f_s = sigma * (1 + hyper) if weights.sta_form == "multiplicative" else sigma + hyper
            normalized = (h - mean) / sigma  # ĥ
            stylized = normalized * f_s + mean  # eq. 4 without Δh
            out = out + weights.sta * (stylized - h)
        if weights.dma != 0:
            delta = 0.0  # Δh, eq. 2
            for i in range(weights.A.shape[0]):
                share = host.per_channel(s[..., i : i + 1])  # (B, 1, 1), (B, L, 1) or (B, 1, 1, 1)
                delta = delta + share * host.up(host.down(x, weights.A[i]), weights.B)
            out = out + weights.dma * delta
    return out
