"""The fold form: h* = W_eff x + c, one product per image with everything folded into the frozen weight (method, section 3).

    W_eff = (1 + G) ⊙ W0 + Σ ΔW        c = b - G ⊙ (μ - b) + shift

No pass over h at all: μ is W0 applied to the mean input, for a convolution to the mean of what each of its taps sees.
Exact, but it reads W0, needs G to be known without σ, and costs a product of the size of W0 per image (once for all images
where nothing depends on them): for many positions. In training it spares keeping h: the gradient of W_eff is one product
per image, and every other gradient comes from that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .host import HostLayer, is_pointwise, per_image_conv, rounded, statistics_dtype
from .update import Hear, LayerWeights, Together, gathered, prepare


def can_fold(host: HostLayer, prepared: Together) -> bool:
    """Whether fold is exact here: W0 readable, all positions alike, no update that needs σ, a zero-padded convolution."""
    if host.weight is None or host.tokens is not None or not prepared.folds:
        return False
    module = host.module
    return host.shape.kernel is None or (module.padding_mode == "zeros" and not isinstance(module.padding, str))


def forward(x: Tensor, host: HostLayer, adapters: Sequence[LayerWeights], hear: Hear | None = None) -> Tensor:
    """Arguments and result as in `reference.forward`; needs `can_fold`."""
    return run(x, host, prepare(adapters), hear)


def run(x: Tensor, host: HostLayer, prepared: Together, hear: Hear | None = None) -> Tensor:
    """The same with adapters that are ready for calls."""
    is_conv, weight, bias, dtype = host.shape.kernel is not None, host.weight, host.bias, x.dtype
    mean = taps = gain = None
    if prepared.needs_mean:
        mean, taps = _tap_means(x, host) if is_conv else (host.mean(x),) * 2
    updates = prepared.updates(x, host, mean, hear)
    for update in updates:
        if update.gain is not None:
            gain = update.gain if gain is None else gain + update.gain
    if is_conv:
        weight = weight.flatten(1)  # W0 as (d, k·kh·kw)
    folded, sign = weight, 1.0
    if gain is not None:
        if taps is None:
            taps = _tap_means(x, host)[1] if is_conv else host.mean(x)
        precise = weight if weight.dtype == taps.dtype else weight.to(taps.dtype)
        center = F.linear(taps.flatten(1) if is_conv else taps, precise)  # μ - b, (B, d)
        folded = _rescaled(weight, gain.unsqueeze(2))  # (B, d, k·kh·kw)
        if bias is None:
            bias, sign = rounded(torch.mul, gain, dtype, gain, center), -1.0  # (B, d)
        else:
            bias = rounded(torch.addcmul, gain, dtype, bias, gain, center, value=-1)
    for change in gathered(updates):
        folded = change.onto(folded, owned=folded is not weight)
    for update in updates:
        if update.shift is not None:
            bias, sign = update.shift if bias is None else sign * bias + update.shift, 1.0
    return _product(x, host, folded, bias, sign)


def straight(x: Tensor, host: HostLayer, prepared: Together, hear: Hear | None = None) -> Callable[[Tensor], Tensor] | None:
    """`run` for inputs of x's shape, dtype and device, without its choices and without gradients; None where it has to
    choose."""
    head = prepared.head
    if head is None or not can_fold(host, prepared):
        return None
    batch, dtype, is_conv, weight = x.shape[0], x.dtype, host.shape.is_conv, host.weight
    bias = x.new_zeros(weight.shape[0]) if host.bias is None else host.bias
    precise, kernel = statistics_dtype(x), is_conv and not is_pointwise(host)
    # sums do for means: what they are too large by goes into factors of what comes next
    positions = 1 if kernel else host.count(x)
    of, up, same = head.of(batch, positions, dtype, hear), head.up.expand(batch, -1, -1), dtype == precise
    share, scaled = -1 / positions, {} if head.scale == 1 else {"alpha": head.scale}
    linear, addcmul, baddbmm = F.linear, torch.addcmul, torch.baddbmm

    def folded(total: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
        """W_eff (B, d, k·kh·kw) and c (B, d)."""
        gain, down = of(total)
        W = weight.flatten(1) if is_conv else weight
        if same:
            shift = addcmul(bias, gain, linear(taps, W), value=share)
            scaled_weight = addcmul(W, W, gain.unsqueeze(2))
        else:
            shift = rounded(addcmul, gain, dtype, bias, gain, linear(taps, W.to(precise)), value=share)
            scaled_weight = _rescaled(W, gain.unsqueeze(2))
        return scaled_weight.baddbmm_(up, down, **scaled), shift

    def line(x: Tensor) -> Tensor:
        total = x.sum(1, dtype=precise)
        W, shift = folded(total, total)
        return baddbmm(shift.unsqueeze(1), x, W.mT)

    def pointwise(x: Tensor) -> Tensor:
        total = x.sum((2, 3), dtype=precise)
        W, shift = folded(total, total)
        return baddbmm(shift.unsqueeze(2), W, x.flatten(2)).unflatten(2, x.shape[2:])

    def convolution(x: Tensor) -> Tensor:
        mean, taps = _tap_means(x, host)
        W, shift = folded(mean, taps.flatten(1))
        return per_image_conv(x, host, W.unflatten(2, weight.shape[1:]), shift)

    return convolution if kernel else pointwise if is_conv else line


def _rescaled(weight: Tensor, gain: Tensor) -> Tensor:
    """(1 + G) ⊙ W0."""
    if gain.dtype == weight.dtype:
        return torch.addcmul(weight, weight, gain)
    return weight * rounded(torch.add, gain, weight.dtype, gain, 1)


def _product(x: Tensor, host: HostLayer, weight: Tensor, bias: Tensor | None, sign: float) -> Tensor:
    """x through a weight (d, k·kh·kw) for all images or (B, d, k·kh·kw), and `sign` times a bias (d,) or (B, d)."""
    is_conv = host.shape.is_conv
    if is_conv and sign != 1:
        bias = sign * bias
    if weight.ndim == 2 and (bias is None or bias.ndim == 1):
        whole = weight.view(host.weight.shape)
        return host.conv(x, whole, bias) if is_conv else F.linear(x, whole, bias)
    if weight.ndim == 2:
        weight = weight.expand(x.shape[0], -1, -1)
    if bias is not None and bias.ndim == 1:
        bias = bias.expand(x.shape[0], -1)
    if is_conv:
        return per_image_conv(x, host, weight.unflatten(2, host.weight.shape[1:]), bias)
    if bias is None:
        return torch.bmm(x, weight.mT)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT, beta=sign)


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
    masks = _tap_masks(x, host, precise)
    sums = masks[0] @ (x.to(precise) @ masks[1])  # (B, k, kh + 1, kw + 1): x is read once
    return sums[:, :, -1, -1], sums[:, :, :-1, :-1]


def _tap_masks(x: Tensor, host: HostLayer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What is to be multiplied with an image from the left (kh + 1, H) and from the right (W, kw + 1) for `_tap_means`."""
    if host.constants is None:
        return _taps_along(x, host, 0, dtype), _taps_along(x, host, 1, dtype).mT
    module = host.module
    key = ("taps", x.shape[2:], x.device, dtype, module.stride, module.padding, module.dilation)
    if key not in host.constants:
        with torch.inference_mode(False):  # they may be met again with gradients
            host.constants[key] = _taps_along(x, host, 0, dtype), _taps_along(x, host, 1, dtype).mT
    return host.constants[key]


def _taps_along(x: Tensor, host: HostLayer, axis: int, dtype: torch.dtype) -> Tensor:
    """One over the number of outputs where a tap of that axis meets an entry of x, one row per tap; then a row of one over
    the number of entries."""
    size, taps, module = x.shape[2 + axis], host.shape.kernel[axis], host.module
    stride, padding, dilation = module.stride[axis], module.padding[axis], module.dilation[axis]
    positions = (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
    offset = torch.arange(size, device=x.device) + padding - dilation * torch.arange(taps, device=x.device)[:, None]
    masks = (offset >= 0) & (offset < positions * stride) & (offset % stride == 0)
    everywhere = torch.ones(1, size, dtype=dtype, device=x.device)
    return torch.cat([masks.to(dtype) / positions, everywhere / size])
