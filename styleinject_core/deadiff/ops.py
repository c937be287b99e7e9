"""Layers whose parameters may be stored in another dtype than they compute in: files hold float16, norms need float32."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Casting:
    """Linear and LayerNorm that cast their parameters to the input's dtype at each use, like ComfyUI's manual_cast."""

    class Linear(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            bias = None if self.bias is None else self.bias.to(input.dtype)
            return F.linear(input, self.weight.to(input.dtype), bias)

    class LayerNorm(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
