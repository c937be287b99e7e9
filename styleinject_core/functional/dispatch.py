"""Which form for which layer: chosen by shape, by what the adapters need, and by what the host allows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers import LayerWeights
from . import fold, stack
from .host import HostLayer


# Fold pays above this many output positions of an image per output channel (measured: benchmarks/README.md).
_LINEAR_RATIO, _CONV_RATIO = 1, 4


def prefers_fold(x: Tensor, host: HostLayer, adapters: list[LayerWeights]) -> bool:
    """Fold pays where an image has many positions for the layer's channels, and W0 need not be trained."""
    if torch.is_grad_enabled() or not fold.can_fold(host, adapters):
        return False
    if not host.shape.is_conv:
        return x.shape[1] > _LINEAR_RATIO * host.shape.out_features
    stride = host.module.stride
    return x.shape[2] * x.shape[3] > _CONV_RATIO * host.shape.out_features * stride[0] * stride[1]


def forward(x: Tensor, host: HostLayer, adapters: list[LayerWeights]) -> Tensor:
    """Arguments and result as in `reference.forward`. Adapters whose strengths are 0 are left out: without any other
    the result is the frozen layer's own, bit for bit."""
    active = [w for w in adapters if w.dma != 0 or w.adapts_statistics]
    if not active:
        return host(x)
    form = fold if prefers_fold(x, host, active) else stack
    return form.forward(x, host, active)
