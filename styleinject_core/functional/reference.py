"""One adapted layer as the papers write it: slow, plain, and the oracle of every test.

Each method adds its increment, by its own equations, to the frozen layer's output (`methods/`; StyleInject's equations 2
to 4 are in `methods/styleinject.py`). The other forms (`stack`, `fold`) take the same arguments and must give the same
result.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .host import HostLayer
from .update import Hear, LayerWeights


def forward(x: Tensor, host: HostLayer, adapters: Sequence[LayerWeights], hear: Hear | None = None) -> Tensor:
    """One adapted layer, adapters summed as increments (method, sections 1 and 2).

    Args:
        x: input of the layer, (B, L, k) for a Linear, (B, k, H, W) for a convolution.
        host: the frozen layer.
        adapters: the adapters on it; each with its strengths.
        hear: who listens to routers; None for nobody.

    Returns:
        h* in the shape of the frozen layer's output h.
    """
    h = host(x)
    out = h
    for weights in adapters:
        out = out + weights.increment(x, h, host, hear)
    return out
