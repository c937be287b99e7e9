"""One adapted layer: what the host layer looks like, and the parameters StyleInject adds to it (method, section 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import AdapterConfig


class UnsupportedLayerError(ValueError):
    """The host layer is of a kind StyleInject cannot adapt; the message says which and why."""


@dataclass(frozen=True)
class LayerShape:
    """The host layer as an adapter sees it. `kernel` is None for a Linear: the one place that tells the two apart.

    Stride, padding and dilation belong to the host and are read from it at each forward.
    """

    in_features: int
    out_features: int
    kernel: tuple[int, int] | None = None

    @property
    def is_conv(self) -> bool:
        return self.kernel is not None

    def __str__(self) -> str:
        kind = f"Conv2d {self.kernel[0]}x{self.kernel[1]}" if self.kernel else "Linear"
        return f"{kind} {self.in_features}->{self.out_features}"

    @classmethod
    def of(cls, module: Any) -> LayerShape | None:
        """The shape of a Linear- or Conv2d-like module, or None for anything else.

        Layers are recognised by what they have, not by class: quantised Linears are not nn.Linear.

        Raises:
            UnsupportedLayerError: a grouped convolution.
        """
        kernel = getattr(module, "kernel_size", None)
        if isinstance(kernel, tuple) and len(kernel) == 2 and hasattr(module, "in_channels"):
            if module.groups != 1:
                raise UnsupportedLayerError(f"convolution with groups={module.groups}: only groups=1 is supported")
            return cls(module.in_channels, module.out_channels, kernel)
        if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
            return cls(module.in_features, module.out_features)
        return None


@dataclass(frozen=True)
class LayerWeights:
    """One adapter's tensors on one layer, cast for one call, with the strengths of its two parts.

    Shapes as in method.md: A (n, r, k[, kh, kw]), B (d, r), router_weight (n, k), router_bias (n,), hyper_weight
    (d, n), hyper_bias (d,). No router means one style; no hypernetwork means no AdaIN step. `dma` already holds the
    factor alpha / r; `sta` is the strength of the AdaIN step. `on_route`, where given, receives the style probabilities
    (B, n) or (B, L, n) of the call in at least float32 and returns those to use: for recording and for steering.
    """

    A: Tensor
    B: Tensor
    router_weight: Tensor | None
    router_bias: Tensor | None
    hyper_weight: Tensor | None
    hyper_bias: Tensor | None
    router_pool: str
    sta_form: str
    eps: float
    dma: float
    sta: float
    on_route: Callable[[Tensor], Tensor] | None = None

    @property
    def by_token(self) -> bool:
        return self.router_pool == "token" and self.router_weight is not None

    @property
    def adapts_statistics(self) -> bool:
        return self.hyper_weight is not None and self.sta != 0


PARTS = ("A", "B", "router_weight", "router_bias", "hyper_weight", "hyper_bias")


class LayerAdapter(nn.Module):
    """The trainable parameters of one adapted layer; an exact identity when new (B = 0, hyper = 0).

    Args:
        shape: the host layer.
        config: this layer's config (`AdapterConfig.for_layer`).

    Raises:
        UnsupportedLayerError: router_pool "token" on a convolution.
    """

    def __init__(self, shape: LayerShape, config: AdapterConfig):
        super().__init__()
        if shape.is_conv and config.router_pool == "token" and config.has_router:
            raise UnsupportedLayerError(f"router_pool 'token' needs a Linear layer, found {shape}")
        self.shape, self.config = shape, config
        n, r, k, d = config.n_styles, config.r, shape.in_features, shape.out_features
        self.A = nn.Parameter(torch.empty(n, r, k, *(shape.kernel or ())))
        self.B = nn.Parameter(torch.zeros(d, r))
        for style in self.A.data:
            nn.init.kaiming_uniform_(style, a=math.sqrt(5))
        has_hyper = config.sta != "none"
        self.router_weight = nn.Parameter(torch.zeros(n, k)) if config.has_router else None
        self.router_bias = nn.Parameter(torch.zeros(n)) if config.has_router else None
        self.hyper_weight = nn.Parameter(torch.zeros(d, n)) if has_hyper else None
        self.hyper_bias = nn.Parameter(torch.zeros(d)) if has_hyper else None

    @classmethod
    def from_tensors(cls, shape: LayerShape, config: AdapterConfig, parts: Mapping[str, Tensor | None]) -> LayerAdapter:
        """A layer with given tensors, in their own dtype; parts that are None are absent. Shapes are the caller's to check."""
        with torch.device("meta"):
            layer = cls(shape, config)
        for part in PARTS:
            value = parts.get(part)
            setattr(layer, part, None if value is None else nn.Parameter(value))
        return layer

    def tensors(self) -> dict[str, nn.Parameter]:
        """The parameters this layer has, by part name."""
        return {part: value for part in PARTS if (value := getattr(self, part)) is not None}

    def weights(
        self,
        cast: Callable[[Tensor], Tensor],
        *,
        dma: float,
        sta: float,
        on_route: Callable[[Tensor], Tensor] | None = None,
    ) -> LayerWeights:
        """This layer's tensors for one call.

        Args:
            cast: maps a parameter to a tensor on the device and in the dtype of the call.
            dma, sta: strengths of the low-rank increment and of the AdaIN step.
        """
        parts: dict[str, Any] = {part: None if (p := getattr(self, part)) is None else cast(p) for part in PARTS}
        c = self.config
        return LayerWeights(
            **parts, router_pool=c.router_pool, sta_form=c.sta, eps=c.eps, dma=dma * c.scale, sta=sta, on_route=on_route
        )

    def extra_repr(self) -> str:
        return f"{self.shape}, r={self.config.r}, n_styles={self.config.n_styles}"
