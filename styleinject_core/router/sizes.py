"""How large an adapter's two increments are, beside the frozen layer's own output.

For an image, with root mean squares over channels and positions:

    size of Δh  = rms(dma · Δh) / rms(h)            size of STA = rms(sta · G ⊙ (h - μ)) / rms(h)

Neither is known to the layer: fold never computes h, and neither form holds the increments apart. They are estimated from
a few positions of each image, up to 16 spread evenly, exact where the layer has no more. (On noise, 16 positions of 320
channels are within a few per cent.) A convolution's positions are those where its kernel lies inside the image, if any.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..functional.host import HostLayer
from ..methods.styleinject import StyleInjectWeights
from ..methods.styleinject_calls import hyper

POSITIONS = 16


@dataclass(frozen=True)
class Sample:
    """What one call of one layer looked like at a few positions; all the rest can be worked out later.

    projected: x through all n down-projections, (B, P, n·r). h: the frozen layer's output, (B, P, d).
    s: (B, n), or (B, P, n) by token. weights: the call's, but for A, which is large and no longer needed.
    """

    projected: Tensor
    h: Tensor
    s: Tensor
    weights: StyleInjectWeights

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.projected, self.h, self.s))


def sample(x: Tensor, h: Tensor | None, s: Tensor, host: HostLayer, weights: StyleInjectWeights) -> Sample | None:
    """Take a call's sample: three small operations, nothing that waits for the device.

    Args:
        x: the layer's input, (B, L, k) or (B, k, H, W).
        h: the frozen layer's output where the form computed it, else W0 is applied to the sampled positions.
        s: the probabilities used, (B, n) or (B, L, n).

    Returns:
        None where the convolution has no output, or neither h nor W0 can be had.
    """
    if host.shape.is_conv:
        taken = _windows(x, h, host)
        if taken is None:
            return None
        x, h = taken
    else:
        chosen = _spread(x.shape[1], POSITIONS)
        x, h = x[:, chosen], None if h is None else h[:, chosen]
        if s.ndim == 3:
            s = s[:, chosen]
    if h is None:
        if host.weight is None:
            return None
        h = x @ host.weight.flatten(1).mT
        h = h if host.bias is None else h + host.bias
    projected = x @ weights.A.flatten(2).flatten(0, 1).mT  # (B, P, n·r)
    # Clones: views would keep whole activations alive.
    return Sample(projected.detach(), h.detach().clone(), s.detach(), replace(weights, A=h.new_empty(0), owner=None))


def measure(samples: list[Sample]) -> Tensor:
    """The sizes of the increments of some calls of one layer, (calls, B, 2): Δh, STA; in float32, on the calls' device."""
    first = samples[0]
    weights, device = first.weights, first.h.device
    projected, h, s = (
        torch.stack([getattr(one, part).to(device, torch.float32) for one in samples]) for part in ("projected", "h", "s")
    )
    per_position = s if s.ndim == 4 else s.unsqueeze(2)  # (calls, B, P or 1, n)
    styles = s.shape[-1]
    low = (projected.unflatten(-1, (styles, -1)) * per_position.unsqueeze(-1)).sum(-2)  # (calls, B, P, r)
    delta = low @ weights.B.to(device, torch.float32).mT
    size_h = _rms(h)
    dma, sta = (torch.tensor([abs(getattr(one.weights, part)) for one in samples], device=device) for part in ("dma", "sta"))
    sizes = [dma[:, None] * _rms(delta) / size_h, torch.zeros_like(size_h)]
    positions = h.shape[2]
    if weights.hyper_weight is not None and positions > 1:
        centered = h - h.mean(2, keepdim=True)
        gain = hyper(per_position, weights)  # (calls, B, P or 1, d)
        if weights.sta_form == "additive":
            gain = gain / centered.std(2, correction=0, keepdim=True).clamp(min=weights.eps)
        # the mean of the sample is nearer to it than the mean of all positions would be
        unbiased = (positions / (positions - 1)) ** 0.5
        sizes[1] = sta[:, None] * unbiased * _rms(gain * centered) / size_h
    return torch.stack(sizes, -1)


def _rms(values: Tensor) -> Tensor:
    return values.square().mean((-2, -1)).sqrt()


def _spread(length: int, count: int) -> slice:
    """Up to `count` entries of `length`, evenly."""
    step = -(-length // count)
    return slice((length - 1) % step // 2, None, step)


def _windows(x: Tensor, h: Tensor | None, host: HostLayer) -> tuple[Tensor, Tensor | None] | None:
    """What the kernel sees at a few positions, (B, P, k·kh·kw), and h there, (B, P, d); None for no position at all.

    Only positions whose window lies inside the image, which spares copying the image to pad it; on images too small for
    that it is padded.
    """
    module, kernel = host.module, host.shape.kernel or (1, 1)
    extents = [module.dilation[axis] * (kernel[axis] - 1) + 1 for axis in (0, 1)]
    if isinstance(module.padding, str):
        margins = [(extent - 1) // 2 if module.padding == "same" else 0 for extent in extents]
    else:
        margins = list(module.padding)
    firsts = [-(-margins[axis] // module.stride[axis]) for axis in (0, 1)]  # the first output position inside
    begins = [firsts[axis] * module.stride[axis] - margins[axis] for axis in (0, 1)]
    if any(x.shape[2 + axis] < begins[axis] + extents[axis] for axis in (0, 1)):
        padded, left = host.pad(x)
        x = padded if not left else F.pad(x, (margins[1], margins[1], margins[0], margins[0]))
        firsts = begins = [0, 0]
    windows, at = x, []
    for axis in (0, 1):
        size, stride = x.shape[2 + axis] - begins[axis], module.stride[axis]
        count = (size - extents[axis]) // stride + 1
        if count < 1:
            return None
        chosen = _spread(count, int(POSITIONS**0.5))
        windows = windows.narrow(2 + axis, begins[axis], size).unfold(2 + axis, extents[axis], stride)
        windows = windows[..., :: module.dilation[axis]]
        windows = windows[:, :, chosen] if axis == 0 else windows[:, :, :, chosen]
        at.append(slice(firsts[axis] + chosen.start, firsts[axis] + count, chosen.step))
    windows = windows.permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)  # (B, k, py, px, kh, kw) -> (B, P, k·kh·kw)
    return windows, None if h is None else h[:, :, at[0], at[1]].flatten(2).mT
