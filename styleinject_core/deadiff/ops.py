"""Layers whose parameters may be stored in another dtype than they compute in: files hold float16, norms need float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class LayerOps:
    """Where layers come from: classes with torch's arguments that cast their parameters to the input's dtype at each use."""

    linear: Callable[..., nn.Module]
    layer_norm: Callable[..., nn.Module]


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class _LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight.to(input.dtype), self.bias.to(input.dtype), self.eps)


CASTING = LayerOps(_Linear, _LayerNorm)
