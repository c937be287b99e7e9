"""The stack form: h* = (1 + G) ⊙ h - G ⊙ μ + Σ ΔW x, beside the frozen layer (method, section 3).

Handles every case: training, statistics that need σ, routing by token, masks, frozen weights that cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .host import HostLayer, rounded, statistics_dtype
from .update import Hear, LayerWeights, LowRank, Together, Update, gathered, prepare


def forward(x: Tensor, host: HostLayer, adapters: Sequence[LayerWeights], hear: Hear | None = None) -> Tensor:
    """Arguments and result as in `reference.forward`."""
    return run(x, host, prepare(adapters), hear)


def run(x: Tensor, host: HostLayer, prepared: Together, hear: Hear | None = None) -> Tensor:
    """The same with adapters that are ready for calls."""
    h = host(x)
    updates = prepared.updates(x, host, host.mean(x) if prepared.needs_mean else None, hear)
    masked = [update for update in updates if update.mask is not None]
    out = add([update for update in updates if update.mask is None] if masked else updates, x, h, host)
    for update in masked:
        out = out + update.mask * (add([update], x, h, host) - h)
    return out


def straight(x: Tensor, host: HostLayer, prepared: Together, hear: Hear | None = None) -> Callable[[Tensor], Tensor] | None:
    """`run` for inputs of x's shape, dtype and device, without its choices and without gradients; None where it has to
    choose."""
    head, is_conv, where, batch, dtype = prepared.head, host.shape.is_conv, host.positions, x.shape[0], x.dtype
    if head is None or host.tokens is not None:
        return None
    precise, positions = statistics_dtype(x), host.count(x)
    of, up, scale, frozen = head.of(batch, positions, dtype, hear), head.up, head.scale, host.forward
    if host.weight is not None and not is_conv and getattr(frozen, "__self__", None) is host.module:  # h is not given
        frozen = partial(_linear, host.weight, host.bias)
    same, raising = dtype == precise, up.mT.expand(batch, -1, -1)
    scaled = {} if scale == 1 else {"alpha": scale}
    sub, addcmul, bmm = torch.sub, torch.addcmul, torch.bmm

    def line(x: Tensor) -> Tensor:
        h = frozen(x)
        gain, down = of(x.sum(where, dtype=precise))
        gain = gain[:, :, None, None] if is_conv else gain.unsqueeze(1)
        if same:
            seen = h.shape[2] * h.shape[3] if is_conv else positions
            out = addcmul(h, gain, sub(h, h.sum(where, keepdim=True), alpha=1 / seen))
        else:  # as in `_rescaled_image`
            mean = h.mean(where, keepdim=True, dtype=precise)
            factor = rounded(torch.add, gain, dtype, gain, 1)
            out = addcmul(rounded(addcmul, gain, dtype, mean, factor, mean, value=-1), h, factor)
        if is_conv:
            return LowRank(down.unflatten(2, host.shape.weight[1:]), up, scale).beside(out, x, host, owned=True)
        return out.baddbmm_(bmm(x, down.mT), raising, **scaled)

    return line


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def add(updates: Sequence[Update], x: Tensor, h: Tensor, host: HostLayer) -> Tensor:
    """h with updates on it; their masks are not looked at."""
    out = _rescaled(updates, h, host)
    for change in gathered(updates):
        out = change.beside(out, x, host, owned=out is not h)
    for update in updates:
        if update.shift is not None:
            out = out + (update.shift[:, None, None] if host.shape.is_conv else update.shift)
    return out


def _rescaled(updates: Sequence[Update], h: Tensor, host: HostLayer) -> Tensor:
    """h + (G + g / σ) ⊙ (h - μ), of the image's tokens where there are others."""
    if host.tokens is None:
        return _rescaled_image(updates, h, host)
    seen = h[:, host.tokens]
    image = _rescaled_image(updates, seen, host)
    return h if image is seen else torch.cat((h[:, : host.tokens.start], image, h[:, host.tokens.stop :]), 1)


def _rescaled_image(updates: Sequence[Update], h: Tensor, host: HostLayer) -> Tensor:
    gain, needs_sigma = None, False
    for update in updates:
        for values in (update.gain, update.sigma_gain):
            if values is None:
                continue
            own = host.per_channel(host.seen(values) if values.ndim == 3 else values)
            if values is update.sigma_gain:
                precise = h.to(statistics_dtype(h))
                own = own / precise.std(host.positions, correction=0, keepdim=True).clamp(min=update.eps)
                needs_sigma = True
            gain = own if gain is None else gain + own
    if gain is None:
        return h
    mean = h.mean(host.positions, keepdim=True, dtype=statistics_dtype(h))
    if gain.dtype == h.dtype:
        return torch.addcmul(h, gain, h - mean)
    if needs_sigma:  # G is huge where σ is small: keep h - μ whole, and both precise
        return h + (gain * (h - mean)).to(h.dtype)
    factor = rounded(torch.add, gain, h.dtype, gain, 1)  # (B, 1, d), (B, L, d) by token, (B, d, 1, 1)
    # μ scaled by what rounding has left of 1 + G: else a half-precision channel would shift
    shift = rounded(torch.addcmul, torch.broadcast_tensors(gain, mean)[0], h.dtype, mean, factor, mean, value=-1)
    return torch.addcmul(shift, h, factor)
