"""One adapter's layer on one module of a host, and what the core must know about the host program."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .call import CurrentCall, averaged
from .functional.host import REPLACED
from .layer_names import parse
from .methods.method import AdapterLayer


class PromptError(ValueError):
    """A router reads the prompt, and the model has none that it can read. The message names the adapter."""


class HostProgram:
    """What the core must know about a host program; these defaults fit any torch module.

    A host overrides them to move weights its own way, to say where a frozen weight can be read, or to undo a
    reshaping of the batch.
    """

    def cast(self, parameter: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A parameter of the adapter on the device of the layer's input x and in a dtype; itself where it is so already."""
        return parameter.to(x.device, dtype)

    def readable(self, module: nn.Module, x: Tensor) -> bool:
        """Whether module.weight and module.bias are what module.forward applies to x, as plain tensors."""
        attributes = module.__dict__
        if type(module) not in (nn.Linear, nn.Conv2d) or attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]:
            return False
        weight = attributes["_parameters"]["weight"]
        return REPLACED not in attributes and weight.dtype == x.dtype and weight.device == x.device

    def frozen_weight(self, module: nn.Module, x: Tensor) -> Tensor:
        """W0 as a plain tensor on the device and in the dtype of x, for changes that depend on it; it may cost."""
        weight: Any = module.weight
        return (weight.dequantize() if weight.is_quantized else weight).detach().to(x.device, x.dtype)

    def samples(self, x: Tensor, layer: str, images: int) -> int:
        """How many images the first dimension of a Linear's input x holds.

        Args:
            layer: its name in the adapter.
            images: `ModelCall.images`.
        """
        return x.shape[0]

    def text(self, args: Sequence[Any], named: Mapping[str, Any]) -> Tensor | None:
        """What routers read of the prompt, (B, c), from what the host is called with: diffusers' `encoder_hidden_states`.
        None where there is none, or where whoever calls says it (`ModelCall.prompt`)."""
        text = named.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        if not isinstance(text, Tensor) or text.ndim != 3:
            return None
        mask = named.get("encoder_attention_mask")
        return averaged(text, mask if isinstance(mask, Tensor) else None)


@dataclass(frozen=True)
class Rows:
    """Rows of a layer's weight, and so channels of its output: where a fused layer holds what an adapter names apart."""

    start: int
    size: int

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.size)


@dataclass(eq=False)
class Site:
    """One adapter's layer on one module, or on some rows of it, with the strengths of its two parts (0 where it is off)."""

    name: str
    layer: AdapterLayer
    program: HostProgram
    current: CurrentCall
    rows: Rows | None = None
    dma: float = 1.0
    sta: float = 1.0
    adapter: str = ""  # its name
    said: bool = False  # that it is left out
    parameter: str = "weight"  # which of the module's it changes, where the module is neither Linear nor Conv2d

    def tokens(self, length: int) -> tuple[slice, int] | None:
        """Where in a sequence of that length the image's tokens are, and how many frames they are of; None where all it holds
        is looked at, as in layers that see the prompt alone."""
        tokens = self.current.call.tokens
        if tokens is None or parse(self.name).stream in ("text", "reference"):
            return None
        where = tokens.within(length)
        if where is None or (where == slice(0, length) and tokens.frames == 1):
            return None
        return where, tokens.frames

    def prompt(self) -> Tensor:
        """What the router reads of the prompt of the current call. Raises PromptError: there is none, or of another width."""
        prompt, features = self.current.call.prompt, self.layer.prompt_features
        if prompt is None:
            raise PromptError(
                f"{self.adapter}: its router reads the prompt, and this model is called without text conditioning"
            )
        if prompt.shape[1] != features:
            raise PromptError(
                f"{self.adapter}: its router was made for text conditioning of {features} features, this model's has "
                f"{prompt.shape[1]}"
            )
        return prompt

    @torch.compiler.disable
    def leave_out(self, inputs: int, outputs: int) -> None:
        """Say once that the layer cannot be adapted: it has fewer channels now than the adapter was made for."""
        if not self.said:
            self.said = True
            logging.getLogger(__name__).warning(
                "%s: %s is left out: the adapter was made for %s, the layer has %d input and %d output channels now",
                *(self.adapter, self.name, self.layer.shape, inputs, outputs),
            )
