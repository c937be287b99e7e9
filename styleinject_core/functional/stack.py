"""The stack form: h* = (1 + G) ⊙ h - G ⊙ μ + Σ ΔW x, beside the frozen layer (method, section 3).

Handles every case: training, statistics that need σ, routing by token, masks, frozen weights that cannot be read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .host import HostLayer, statistics_dtype
from .update import Hear, LayerWeights, Update, appended, gathered, prepare


def forward(x: Tensor, host: HostLayer, adapters: Sequence[LayerWeights], hear: Hear | None = None) -> Tensor:
    """Arguments and result as in `reference.forward`."""
    h = host(x)
    updates = [prepared.update(x, host, None, hear) for prepared in prepare(adapters)]
    out = add([update for update in updates if update.mask is None], x, h, host)
    for update in updates:
        if update.mask is not None:
            out = out + update.mask * (add([update], x, h, host) - h)
    return appended(out, updates)


def add(updates: Sequence[Update], x: Tensor, h: Tensor, host: HostLayer) -> Tensor:
    """h with updates on it; their masks and rows are not looked at."""
    out = _rescaled(updates, h, host)
    for change in gathered([change for update in updates for change in update.changes]):
        out = change.beside(out, x, host, owned=out is not h)
    for update in updates:
        if update.shift is not None:
            out = out + (update.shift[:, None, None] if host.shape.is_conv else update.shift)
    return out


def _rescaled(updates: Sequence[Update], h: Tensor, host: HostLayer) -> Tensor:
    """h + (G + g / σ) ⊙ (h - μ)."""
    gain, needs_sigma = None, False
    for update in updates:
        for values in (update.gain, update.sigma_gain):
            if values is None:
                continue
            own = host.per_channel(values)
            if values is update.sigma_gain:
                precise = h.to(statistics_dtype(h))
                own = own / precise.std(host.positions, correction=0, keepdim=True).clamp(min=update.eps)
                needs_sigma = True
            gain = own if gain is None else gain + own
    if gain is None:
        return h
    mean = h.mean(host.positions, keepdim=True, dtype=statistics_dtype(h))
    if needs_sigma:  # G is huge where σ is small: keep h - μ whole, and both precise
        return h + (gain * (h - mean)).to(h.dtype)
    factor = (1 + gain).to(h.dtype)
    gain = factor.to(mean.dtype) - 1  # what is left of it by rounding: else a half-precision channel would shift
    return torch.addcmul((-gain * mean).to(h.dtype), h, factor)
