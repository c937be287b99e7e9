"""The fold form: h* = W_eff x + c, one product per image with the frozen weight folded in (method, section 3).

    W_eff = (1 + G) ⊙ W0 + (alpha/r) B A_eff        c = b - G ⊙ (μ - b)

No pass over h at all: μ is W0 applied to the mean input, for a convolution to the mean of what each of its taps sees.
Exact, but it reads W0, needs G to be known without σ, and costs a product of the size of W0 per image: for many
positions, multiplicative STA and a router that works per image. In training it spares keeping h: the gradient of W_eff
is one product per image, and every other gradient comes from that.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers import LayerWeights
from .collapse import collapse
from .host import HostLayer, statistics_dtype
from .router import route
from .stack import is_pointwise, per_image_conv


def can_fold(host: HostLayer, adapters: list[LayerWeights]) -> bool:
    """Whether fold is exact here: W0 readable, every router per image, no adapter that needs σ, zero-padded convolution."""
    if host.weight is None or getattr(host.module, "padding_mode", "zeros") != "zeros":
        return False
    if host.shape.is_conv and isinstance(host.module.padding, str):
        return False
    return not any(w.by_token or (w.adapts_statistics and w.sta_form == "additive") for w in adapters)


def forward(x: Tensor, host: HostLayer, adapters: list[LayerWeights]) -> Tensor:
    """Arguments and result as in `reference.forward`; needs `can_fold`."""
    is_conv = host.shape.is_conv
    mean, taps = _tap_means(x, host) if is_conv else (x.mean(1, dtype=statistics_dtype(x)),) * 2
    collapsed = collapse([(w, route(x, w, host, mean)) for w in adapters])
    weight, bias, gain = host.weight.flatten(1), host.bias, collapsed.gain  # W0 as (d, k·kh·kw)
    if gain is None:
        folded = weight.expand(x.shape[0], *weight.shape)
    else:
        centre = taps.flatten(1) @ weight.to(taps.dtype).mT  # μ - b, (B, d)
        bias = (-gain * centre if bias is None else bias - gain * centre).to(x.dtype)  # (B, d)
        folded = weight * (1 + gain).to(x.dtype).unsqueeze(2)  # (B, d, k·kh·kw)
    if collapsed.down is not None:
        up = collapsed.up.expand(x.shape[0], *collapsed.up.shape)
        add = torch.baddbmm if gain is None else Tensor.baddbmm_  # in place where `folded` is ours: it is W0's size per image
        folded = add(folded, up, collapsed.down.flatten(2))
    if bias is not None:
        bias = bias.expand(x.shape[0], -1)
    if is_conv:
        return per_image_conv(x, host, folded.unflatten(2, host.weight.shape[1:]), bias)
    if bias is None:
        return torch.bmm(x, folded.mT)
    return torch.baddbmm(bias.unsqueeze(1), x, folded.mT)


def _tap_means(x: Tensor, host: HostLayer) -> tuple[Tensor, Tensor]:
    """The mean of a zero-padded convolution's input, and what every tap of its kernel sees, averaged over output positions.

    W0 applied to the latter is exactly the mean of W0 x over output positions, border included.

    Returns:
        (B, k) and (B, k, kh, kw), in at least float32.
    """
    precise = statistics_dtype(x)
    if is_pointwise(host):
        mean = x.mean((2, 3), dtype=precise)
        return mean, mean[:, :, None, None]
    x = x.to(precise)
    rows, height = _tap_masks(x, host, 0)  # (kh + 1, H)
    columns, width = _tap_masks(x, host, 1)  # (kw + 1, W)
    sums = rows @ (x @ columns.mT)  # (B, k, kh + 1, kw + 1): x is read once
    return sums[:, :, -1, -1] / (x.shape[2] * x.shape[3]), sums[:, :, :-1, :-1] / (height * width)


def _tap_masks(x: Tensor, host: HostLayer, axis: int) -> tuple[Tensor, int]:
    """1 where a tap of that axis meets an entry of x, one row per tap and one of ones; and the output's size there."""
    size, taps, module = x.shape[2 + axis], host.shape.kernel[axis], host.module
    stride, padding, dilation = module.stride[axis], module.padding[axis], module.dilation[axis]
    positions = (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
    offset = torch.arange(size, device=x.device) + padding - dilation * torch.arange(taps, device=x.device)[:, None]
    masks = (offset >= 0) & (offset < positions * stride) & (offset % stride == 0)
    return F.pad(masks.to(x.dtype), (0, 0, 0, 1), value=1.0), positions
