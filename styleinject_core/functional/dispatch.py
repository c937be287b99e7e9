"""Which form for which layer: chosen by shape, by what the adapters need, and by what the host allows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers import LayerWeights
from . import fold, stack
from .host import HostLayer
from .stack import is_pointwise

# From how many output positions of an image per output channel fold is the faster one, measured with rank 32: where the
# layer is a matrix product, and for larger kernels, whose low-rank part costs less beside them.
_PRODUCT_RATIO, _KERNEL_RATIO = 0.5, 2


def prefers_fold(x: Tensor, host: HostLayer, adapters: list[LayerWeights]) -> bool:
    """Fold pays where an image has many positions for the layer's channels, and W0 need not be trained."""
    if torch.is_grad_enabled() or not fold.can_fold(host, adapters):
        return False
    if not host.shape.is_conv:
        return x.shape[1] > _PRODUCT_RATIO * host.shape.out_features
    ratio = _PRODUCT_RATIO if is_pointwise(host) else _KERNEL_RATIO
    stride = host.module.stride
    return x.shape[2] * x.shape[3] > ratio * host.shape.out_features * stride[0] * stride[1]


def forward(x: Tensor, host: HostLayer, adapters: list[LayerWeights]) -> Tensor:
    """Arguments and result as in `reference.forward`. Adapters whose strengths are 0 are left out: without any other
    the result is the frozen layer's own, bit for bit."""
    active = [w for w in adapters if w.dma != 0 or w.adapts_statistics]
    if not active:
        return host(x)
    form = fold if prefers_fold(x, host, active) else stack
    return form.forward(x, host, active)
