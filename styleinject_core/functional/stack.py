"""The stack form: h* = (1 + G) ⊙ h - G ⊙ μ + (alpha/r) B (A_eff x), beside the frozen layer (method, section 3).

Handles every case: training, additive STA, routing by token, frozen weights that cannot be read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers import LayerWeights
from .collapse import collapse, hyper
from .host import HostLayer, statistics_dtype
from .router import route


def forward(x: Tensor, host: HostLayer, adapters: list[LayerWeights]) -> Tensor:
    """Arguments and result as in `reference.forward`."""
    h = host(x)
    routed = [(w, route(x, w, host)) for w in adapters]
    collapsed = collapse([(w, s) for w, s in routed if not w.by_token])
    out = h
    gain = None if collapsed.gain is None else host.per_channel(collapsed.gain)
    for weights, s in routed:
        if weights.adapts_statistics and (weights.by_token or weights.sta_form == "additive"):
            own = _positionwise_gain(h, host, weights, s)
            gain = own if gain is None else gain + own
    if gain is not None:
        mean = h.mean(host.positions, keepdim=True, dtype=statistics_dtype(h))
        if any(w.sta_form == "additive" for w in adapters):  # G is huge where σ is small: keep h - μ whole, and both precise
            out = h + (gain * (h - mean)).to(h.dtype)
        else:
            factor = (1 + gain).to(h.dtype)
            gain = factor.to(mean.dtype) - 1  # what is left of it by rounding: else a half-precision channel would shift
            out = torch.addcmul((-gain * mean).to(h.dtype), h, factor)
    if collapsed.down is not None:
        out = _add_low_rank(out, x, host, collapsed.down, collapsed.up, owned=out is not h)
    for weights, s in routed:
        if weights.by_token and weights.dma != 0:
            every = torch.einsum("blk,nrk->blnr", x, weights.A)
            low = (s.unsqueeze(-2) @ every).squeeze(-2)  # (B, L, 1, n) @ (B, L, n, r) -> (B, L, r)
            out = out + low @ (weights.B * weights.dma).mT
    return out


def _positionwise_gain(h: Tensor, host: HostLayer, weights: LayerWeights, s: Tensor) -> Tensor:
    """sta · G of an adapter whose G needs σ (additive STA) or varies by token."""
    gain = host.per_channel(hyper(s, weights) * weights.sta)
    if weights.sta_form == "additive":
        precise = h.to(statistics_dtype(h))
        gain = gain / precise.std(host.positions, correction=0, keepdim=True).clamp(min=weights.eps)
    return gain


def _add_low_rank(out: Tensor, x: Tensor, host: HostLayer, down: Tensor, up: Tensor, owned: bool) -> Tensor:
    """out + up (down_b x_b) for every image b; in place where `out` is ours and no gradient needs it."""
    batch = x.shape[0]
    up = up.expand(batch, *up.shape)  # (B, d, R)
    if host.shape.is_conv:
        low = per_image_conv(x, host, down).flatten(2)  # (B, R, H'W')
        flat, first, second = out.flatten(2), up, low
    else:
        flat, first, second = out, torch.bmm(x, down.mT), up.mT  # low is (B, L, R)
    if owned and not torch.is_grad_enabled() and flat.is_contiguous():
        return flat.baddbmm_(first, second).view_as(out)
    return torch.baddbmm(flat, first, second).view_as(out)


def per_image_conv(x: Tensor, host: HostLayer, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Image b of x (B, k, H, W) through its own kernel weight[b] (B, c, k, kh, kw), plus bias (B, c).

    A 1x1 kernel is a matrix product. Otherwise one grouped convolution; on a CPU, where that is slow for large images,
    one convolution per image.
    """
    if is_pointwise(host):
        weight, pixels = weight.flatten(2), x.flatten(2)
        out = torch.bmm(weight, pixels) if bias is None else torch.baddbmm(bias.unsqueeze(2), weight, pixels)
        return out.unflatten(2, x.shape[2:])
    batch, channels = weight.shape[:2]
    if host.replaced is not None or (x.device.type == "cpu" and x.shape[2] * x.shape[3] >= 1024):
        biases = [None] * batch if bias is None else bias.unbind()
        return torch.cat([host.conv(*image) for image in zip(x.split(1), weight.unbind(), biases, strict=True)])
    bias = None if bias is None else bias.reshape(-1)
    out = host.conv(x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), bias, groups=batch)
    return out.view(batch, channels, *out.shape[2:])


def is_pointwise(host: HostLayer) -> bool:
    """Whether a convolution is a matrix product at each pixel."""
    module = host.module
    return host.shape.kernel == (1, 1) and tuple(module.stride) == (1, 1) and module.padding in ((0, 0), "valid", "same")
