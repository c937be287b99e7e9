"""The frozen layer as the functional forms see it: Linear and Conv2d behind one small interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers import LayerShape

REPLACED = "_conv_forward"  # in a module's own attributes: (x, weight, bias) -> h


@dataclass(eq=False, slots=True)  # torch.compile asks for the hash of what is called, before its fields are there
class HostLayer:
    """A frozen layer and how to call it.

    Args:
        shape: Linear or convolution, and its sizes.
        forward: x -> h, whatever the host program made of the layer.
        weight, bias: W0 and b where they can be read as plain tensors in x's dtype and device, else None: only then
            may a form compute h by itself.
        module: the layer, asked for stride, padding and dilation of a convolution.
        constants: what is worked out once for inputs of a size, and kept by whoever made this; None to keep nothing.
        read: gives W0 as a plain tensor for an x, wherever it lies, for changes that depend on it; it may cost.
        tokens: which of x's and h's tokens are the image's, where others share a sequence with them; None for all. Routers and
            statistics look at these alone, and these alone are rescaled.
        frames: how many of x's rows, one after the other, are frames of one image.
        prompt: what routers read of the prompt, (B, c), where any does.
    """

    shape: LayerShape
    forward: Callable[[Tensor], Tensor]
    weight: Tensor | None
    bias: Tensor | None
    module: Any
    constants: dict[Any, Any] | None = None
    read: Callable[[Tensor], Tensor] | None = None
    tokens: slice | None = None
    frames: int = 1
    prompt: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def part(self, rows: slice, h: Tensor) -> HostLayer:
        """Some of the layer's output channels as a layer of its own, on the input for which their output is `h`."""
        weight, bias = (None if t is None else t[rows] for t in (self.weight, self.bias))
        shape = LayerShape(self.shape.in_features, rows.stop - rows.start, self.shape.kernel)
        read = lambda x: self.frozen_weight(x)[rows]  # noqa: E731
        kept: Any = {"tokens": self.tokens, "frames": self.frames, "prompt": self.prompt}
        return HostLayer(shape, lambda _: h, weight, bias, self.module, read=read, **kept)

    def prompt_of(self, x: Tensor) -> Tensor:
        """`prompt` for each row of x, which may hold several of one image. Raises ValueError: there is none."""
        if self.prompt is None:
            raise ValueError("a router reads the prompt, and the layer's caller has none")
        rows, prompts = x.shape[0], self.prompt.shape[0]
        if rows % prompts:
            raise ValueError(f"a router reads the prompt: {prompts} prompts for {rows} rows of its layer's input")
        return self.prompt if rows == prompts else self.prompt.repeat_interleave(rows // prompts, 0)

    def frozen_weight(self, x: Tensor) -> Tensor:
        """W0, in W0's shape and x's dtype and device. Raises ValueError: nobody can say what it is."""
        if self.weight is not None:
            return self.weight
        if self.read is None:
            raise ValueError(f"the frozen weight of {self.shape} cannot be read, and a decomposed change (DoRA) needs it")
        return self.read(x)

    @property
    def positions(self) -> tuple[int, ...]:
        """The dimensions of x and h that a channel's statistics run over."""
        return (2, 3) if self.shape.is_conv else (1,)

    def seen(self, values: Tensor) -> Tensor:
        """What statistics look at: all of x or h, or the image's tokens."""
        return values if self.tokens is None else values[:, self.tokens]

    def joined(self, values: Tensor) -> Tensor:
        """The rows of all frames of an image as tokens of one: (B·frames, L, c) or (B·frames, c) to (B, frames[·L], c)."""
        return values.reshape(values.shape[0] // self.frames, -1, values.shape[-1]) if self.frames > 1 else values

    def mean(self, x: Tensor) -> Tensor:
        """x averaged over the positions that are looked at, (B, k), in at least float32."""
        where = 1 if self.shape.kernel is None else (2, 3)
        if self.tokens is not None:
            x = x[:, self.tokens]
        return x.mean(where, dtype=statistics_dtype(x))

    def count(self, x: Tensor) -> int:
        """How many positions of an image of x are looked at."""
        return x.shape[2] * x.shape[3] if self.shape.is_conv else self.seen(x).shape[1]

    def per_channel(self, values: Tensor) -> Tensor:
        """Values (B, d) shaped to broadcast over positions; values by token (B, L, d) are left as they are."""
        if values.ndim == 3:
            return values
        return values[:, :, None, None] if self.shape.is_conv else values[:, None, :]

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """x through one down-projection A (r, k[, kh, kw]), with the convolution's own stride, padding, dilation."""
        return self.conv(x, A) if self.shape.is_conv else x @ A.mT

    def up(self, low: Tensor, B: Tensor) -> Tensor:
        """(.., r) tokens or (B, r, H', W') pixels through the shared up-projection B (d, r)."""
        return F.conv2d(low, B[:, :, None, None]) if self.shape.is_conv else low @ B.mT

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
        """F.conv2d as the host convolution does it: its stride, padding (any mode) and dilation. A convolution that somebody
        has replaced is asked itself, and takes one group."""
        if (own := self.replaced) is not None:
            return own(x, weight, bias)
        x, padding = self.pad(x)
        return F.conv2d(x, weight, bias, self.module.stride, padding, self.module.dilation, groups)

    @property
    def replaced(self) -> Callable[..., Tensor] | None:
        """What is in the place of the module's own convolution: nodes for seamless textures wrap images around with it."""
        return self.module.__dict__.get(REPLACED)

    def pad(self, x: Tensor) -> tuple[Tensor, Any]:
        """x with circular, reflect or replicate padding applied, and the zero padding that is left to do."""
        mode = getattr(self.module, "padding_mode", "zeros")
        if mode == "zeros":
            return x, self.module.padding
        return F.pad(x, self.module._reversed_padding_repeated_twice, mode=mode), 0


def rounded(operation: Callable[..., Tensor], like: Tensor, dtype: torch.dtype, *args: Any, **settings: Any) -> Tensor:
    """operation(*args), whose result has the shape and dtype of `like`, in another dtype: in one kernel where no gradient
    needs to see both."""
    if like.dtype == dtype:
        return operation(*args, **settings)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return operation(*args, **settings).to(dtype)
    return operation(*args, **settings, out=torch.empty_like(like, dtype=dtype))


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Router, softmax and statistics run in at least float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def per_image_conv(x: Tensor, host: HostLayer, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Image b of x (B, k, H, W) through its own kernel weight[b] (B, c, k, kh, kw), plus bias (B, c).

    A 1x1 kernel is a matrix product. Otherwise one grouped convolution; on a CPU, where that is slow for large images,
    one convolution per image.
    """
    if is_pointwise(host):
        weight, pixels = weight.flatten(2), x.flatten(2)
        out = torch.bmm(weight, pixels) if bias is None else torch.baddbmm(bias.unsqueeze(2), weight, pixels)
        return out.unflatten(2, x.shape[2:])
    if bias is not None and torch.compiler.is_compiling():  # inductor takes no view as the bias of a convolution on a CPU
        return per_image_conv(x, host, weight) + bias[:, :, None, None]
    batch, channels = weight.shape[:2]
    if host.replaced is not None or (x.device.type == "cpu" and x.shape[2] * x.shape[3] >= 1024):
        biases = [None] * batch if bias is None else bias.unbind()
        return torch.cat([host.conv(*image) for image in zip(x.split(1), weight.unbind(), biases, strict=True)])
    bias = None if bias is None else bias.reshape(-1)
    out = host.conv(x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), bias, groups=batch)
    return out.view(batch, channels, *out.shape[2:])


def is_pointwise(host: HostLayer) -> bool:
    """Whether a convolution is a matrix product at each pixel."""
    module = host.module
    return host.shape.kernel == (1, 1) and tuple(module.stride) == (1, 1) and module.padding in ((0, 0), "valid", "same")


def as_tokens(x: Tensor, samples: int) -> Tensor:
    """A Linear's input (..., k) as (B, L, k) with B the images: undoes what splits one image into rows of the batch."""
    images = samples if samples and x.shape[0] % samples == 0 else x.shape[0]
    return x if x.ndim == 3 and images == x.shape[0] else x.reshape(images, -1, x.shape[-1])
