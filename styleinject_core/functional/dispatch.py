"""Which form for which layer: chosen by shape, by what the adapters need, and by what the host allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import fold, stack
from .host import HostLayer, is_pointwise
from .update import Hear, LayerWeights, Together, prepare

# From how many output positions of an image per output channel fold is the faster one, measured with rank 32: where the
# layer is a matrix product, and for larger kernels, whose low-rank part costs less beside them.
_PRODUCT_RATIO, _KERNEL_RATIO = 0.5, 2
# Under autograd, for matrix products: from here on fold takes about stack's time, and keeps little more than x for the
# backward pass, where stack keeps h too. For larger kernels the gradient of W_eff costs more than it saves.
_TRAINING_RATIO = 3


def prefers_fold(x: Tensor, host: HostLayer, prepared: Together) -> bool:
    """Fold pays where an image has many positions for the layer's channels, and W0 need not be trained."""
    if not fold.can_fold(host, prepared):
        return False
    linear, training = host.shape.kernel is None, torch.is_grad_enabled()
    product = linear or is_pointwise(host)
    if training and (host.weight.requires_grad or not product):
        return False
    ratio = _TRAINING_RATIO if training else _PRODUCT_RATIO if product else _KERNEL_RATIO
    if linear:
        return x.shape[1] > ratio * host.shape.out_features
    stride = host.module.stride
    return host.count(x) > ratio * host.shape.out_features * stride[0] * stride[1]


def forward(x: Tensor, host: HostLayer, adapters: Sequence[LayerWeights], hear: Hear | None = None) -> Tensor:
    """Arguments and result as in `reference.forward`. Adapters whose strengths are 0 are left out: without any other
    the result is the frozen layer's own, bit for bit."""
    active = [weights for weights in adapters if weights.active]
    if not active:
        return host(x)
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # torch knows no autocast for meta tensors
        return _under_autocast(x, host, active, hear)
    return run(x, host, prepare(active), hear)


def run(x: Tensor, host: HostLayer, prepared: Together, hear: Hear | None = None) -> Tensor:
    """The same with adapters that are ready for calls, outside of autocast."""
    if not prepared.prepared:
        return host(x)
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        line = straight(x, host, prepared, hear)
        if line is not None:
            return line(x)
    return (fold if prefers_fold(x, host, prepared) else stack).run(x, host, prepared, hear)


def straight(x: Tensor, host: HostLayer, prepared: Together, hear: Hear | None = None) -> Callable[[Tensor], Tensor] | None:
    """`run` for inputs of x's shape, dtype and device as one function of x with nothing left to choose, for calls without
    gradients and autocast, uncompiled; None where there is none."""
    return (fold if prefers_fold(x, host, prepared) else stack).straight(x, host, prepared, hear)


def _under_autocast(x: Tensor, host: HostLayer, adapters: Sequence[LayerWeights], hear: Hear | None) -> Tensor:
    """The frozen layer as autocast runs it, and around it the forms as on a model in autocast's dtype.

    They choose the precision of each step themselves: autocast would take router and softmax down to half precision.
    """
    device, low = x.device.type, torch.get_autocast_dtype(x.device.type)
    lowered = x.to(low)

    def frozen(y: Tensor) -> Tensor:
        with torch.autocast(device, low):
            return host.forward(x if y is lowered else y)

    readable = host.weight is not None and host.weight.dtype == low
    weight, bias = (host.weight, host.bias) if readable else (None, None)
    with torch.autocast(device, enabled=False):
        lowered_host = replace(host, forward=frozen, weight=weight, bias=bias)
        return forward(lowered, lowered_host, [weights.cast(low) for weights in adapters], hear)
