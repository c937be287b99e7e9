"""The fold form: h* = W_eff x + c, one product per image with everything folded into the frozen weight (method, section 3).

    W_eff = (1 + G) ⊙ W0 + Σ ΔW        c = b - G ⊙ (μ - b) + shift

No pass over h at all: μ is W0 applied to the mean input, for a convolution to the mean of what each of its taps sees.
Exact, but it reads W0, needs G to be known without σ, and costs a product of the size of W0 per image (once for all images
where nothing depends on them): for many positions. In training it spares keeping h: the gradient of W_eff is one product
per image, and every other gradient comes from that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .host import HostLayer, is_pointwise, per_image_conv, statistics_dtype
from .update import Hear, LayerWeights, Prepared, appended, gathered, prepare


def can_fold(host: HostLayer, prepared: Sequence[Prepared]) -> bool:
    """Whether fold is exact here: W0 readable, no update by position or that needs σ, a zero-padded convolution."""
    if host.weight is None or getattr(host.module, "padding_mode", "zeros") != "zeros":
        return False
    if host.shape.is_conv and isinstance(host.module.padding, str):
        return False
    return all(one.folds for one in prepared)


def forward(x: Tensor, host: HostLayer, adapters: Sequence[LayerWeights], hear: Hear | None = None) -> Tensor:
    """Arguments and result as in `reference.forward`; needs `can_fold`."""
    is_conv = host.shape.is_conv
    mean, taps = _tap_means(x, host) if is_conv else (x.mean(1, dtype=statistics_dtype(x)),) * 2
    updates = [prepared.update(x, host, mean, hear) for prepared in prepare(adapters)]
    gains = [update.gain for update in updates if update.gain is not None]
    weight, bias = host.weight.flatten(1), host.bias  # W0 as (d, k·kh·kw)
    folded = weight
    if gains:
        gain = sum(gains[1:], start=gains[0])
        center = taps.flatten(1) @ weight.to(taps.dtype).mT  # μ - b, (B, d)
        bias = (-gain * center if bias is None else bias - gain * center).to(x.dtype)  # (B, d)
        folded = weight * (1 + gain).to(x.dtype).unsqueeze(2)  # (B, d, k·kh·kw)
    for change in gathered([change for update in updates for change in update.changes]):
        folded = change.onto(folded, owned=folded is not weight)
    for update in updates:
        if update.shift is not None:
            bias = update.shift if bias is None else bias + update.shift
    return appended(_product(x, host, folded, bias), updates)


def _product(x: Tensor, host: HostLayer, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x through a weight (d, k·kh·kw) for all images or (B, d, k·kh·kw), and a bias (d,) or (B, d)."""
    if weight.ndim == 2:
        whole = weight.view(host.weight.shape)
        return host.conv(x, whole, bias) if host.shape.is_conv else F.linear(x, whole, bias)
    if bias is not None:
        bias = bias.expand(x.shape[0], -1)
    if host.shape.is_conv:
        return per_image_conv(x, host, weight.unflatten(2, host.weight.shape[1:]), bias)
    if bias is None:
        return torch.bmm(x, weight.mT)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


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
