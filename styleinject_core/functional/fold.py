"""The fold form: h* = W_eff x + c, one product per image with the frozen weight folded in (method, section 3).

    W_eff = (1 + G) ⊙ W0 + (alpha/r) B A_eff        c = b - G ⊙ (μ - b)

No pass over h at all: μ is W0 applied to the mean input, for a convolution to the mean of what each of its taps sees.
Exact, but it reads W0, needs G to be known without σ, and costs a product of the size of W0 per image: for many
positions, inference, multiplicative STA and a router that works per image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers import LayerWeights
from .collapse import collapse
from .host import HostLayer, statistics_dtype
from .router import route
from .stack import per_image_conv


def can_fold(host: HostLayer, adapters: list[LayerWeights]) -> bool:
    """Whether fold is exact here: W0 readable, every router per image, no adapter that needs σ, zero-padded convolution."""
    if host.weight is None or getattr(host.module, "padding_mode", "zeros") != "zeros":
        return False
    if host.shape.is_conv and isinstance(host.module.padding, str):
        return False
    return not any(w.by_token or (w.adapts_statistics and w.sta_form == "additive") for w in adapters)


def forward(x: Tensor, host: HostLayer, adapters: list[LayerWeights]) -> Tensor:
    """Arguments and result as in `reference.forward`; needs `can_fold`."""
    precise = statistics_dtype(x)
    is_conv = host.shape.is_conv
    mean = None if is_conv else x.mean(1, dtype=precise)  # (B, k)
    collapsed = collapse([(w, route(x, w, host, mean)) for w in adapters])
    weight = host.weight.unsqueeze(0)  # (1, d, k[, kh, kw])
    bias = host.bias
    if collapsed.gain is not None:
        gain = collapsed.gain  # (B, d)
        taps = _mean_per_tap(x, host) if is_conv else mean  # (B, k[, kh, kw])
        centre = taps.flatten(1) @ host.weight.to(precise).flatten(1).mT  # μ - b, (B, d)
        bias = (-gain * centre if bias is None else bias - gain * centre).to(x.dtype)  # (B, d)
        weight = weight * (1 + gain).to(x.dtype).view(*gain.shape, *(1,) * (weight.ndim - 2))  # (B, d, k[, kh, kw])
    batch = x.shape[0]
    flat = weight.flatten(2).expand(batch, -1, -1)  # (B, d, k·kh·kw)
    if collapsed.down is not None:
        up = collapsed.up.expand(batch, *collapsed.up.shape)
        flat = torch.baddbmm(flat, up, collapsed.down.flatten(2))
    if is_conv:
        if bias is not None:
            bias = bias.expand(batch, -1).reshape(-1)
        return per_image_conv(x, host, flat.unflatten(2, host.weight.shape[1:]), bias)
    if bias is None:
        return torch.bmm(x, flat.mT)
    return torch.baddbmm(bias.expand(batch, -1).unsqueeze(1), x, flat.mT)


def _mean_per_tap(x: Tensor, host: HostLayer) -> Tensor:
    """What every tap of a zero-padded convolution sees, averaged over output positions.

    W0 applied to it is exactly the mean of W0 x over output positions, border included.

    Returns:
        (B, k, kh, kw) in at least float32.
    """
    sums = x.to(statistics_dtype(x))
    count = 1
    for axis in (0, 1):  # rows, then columns of what is left: (B, k, H, W) -> (B, k, kh, W) -> (B, k, kh, kw)
        dim = 2 + axis
        sums, positions = _tap_sums(sums, dim, host, axis)
        count *= positions
    return sums / count


def _tap_sums(x: Tensor, dim: int, host: HostLayer, axis: int) -> tuple[Tensor, int]:
    """Sums along `dim` of the entries each tap of that axis meets; returns (x with `dim` of size taps, output positions)."""
    taps, stride = host.shape.kernel[axis], host.module.stride[axis]
    padding, dilation = host.module.padding[axis], host.module.dilation[axis]
    size = x.shape[dim]
    positions = (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
    seen = []
    for tap in range(taps):
        first = tap * dilation - padding
        skipped = max(0, -(first // stride))  # output positions whose tap lies in the padding before the image
        begin = first + skipped * stride
        end = min(size, first + (positions - 1) * stride + 1)
        seen.append(x.narrow(dim, begin, end - begin)[(slice(None),) * dim + (slice(None, None, stride),)].sum(dim)
                    if begin < end else x.new_zeros(x.shape[:dim] + x.shape[dim + 1 :]))  # fmt: skip
    return torch.stack(seen, dim), positions
