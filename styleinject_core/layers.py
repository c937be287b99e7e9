"""What a host layer looks like to an adapter: Linear or Conv2d, and its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class UnsupportedLayerError(ValueError):
    """The host layer is of a kind an adapter's method cannot adapt; the message says which and why."""


@dataclass(frozen=True)
class LayerShape:
    """The host layer as an adapter sees it. `kernel` is None for a Linear: the one place that tells the two apart.

    Stride, padding and dilation belong to the host and are read from it at each forward. What is neither Linear nor Conv2d
    (a norm, an embedding, a Conv3d) has the shape of its weight in `other`: only fixed changes can be put on such a layer.
    """

    in_features: int
    out_features: int
    kernel: tuple[int, int] | None = None
    other: tuple[int, ...] = ()

    @property
    def is_conv(self) -> bool:
        return self.kernel is not None

    @property
    def weight(self) -> tuple[int, ...]:
        """The shape of W0, (d, k) or (d, k, kh, kw)."""
        return self.other or (self.out_features, self.in_features, *(self.kernel or ()))

    def __str__(self) -> str:
        if self.other:
            return f"weight of {' x '.join(map(str, self.other))}"
        kind = f"Conv2d {self.kernel[0]}x{self.kernel[1]}" if self.kernel else "Linear"
        return f"{kind} {self.in_features}->{self.out_features}"

    @classmethod
    def of(cls, module: Any) -> LayerShape | None:
        """The shape of a Linear- or Conv2d-like module, or None for anything else.

        Layers are recognized by what they have, not by class: quantized Linears are not nn.Linear.

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

    @classmethod
    def of_other(cls, module: Any, parameter: str = "weight") -> LayerShape | None:
        """The shape of a module that is neither, but has a weight, or another parameter; None where none can be changed."""
        weight = getattr(module, parameter, None)
        shape = tuple(getattr(weight, "shape", ()))
        if not shape or getattr(module, "groups", 1) != 1:
            return None
        return cls(shape[1] if len(shape) > 1 else shape[0], shape[0], other=shape)
