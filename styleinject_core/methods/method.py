"""What every method offers: a layer's parameters and what they do, a config, and a place in files.

A method is one file in this folder and one line in `methods.METHODS`; only the reading of other programs' files knows
some by their names. CONTRIBUTING.md, "How to add a method", walks through one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..config import LayerConfig
from ..functional.update import LayerWeights
from ..layers import LayerShape

Cast = Callable[[Tensor], Tensor]


class AdapterLayer(nn.Module):
    """The parameters that a method adds to one host layer; an exact identity when new.

    Args:
        shape: the host layer.
        config: this layer's config (`config.for_layer(name)`).
        parts: the parameters, by the names in PARTS, in their own dtype; those that are None or missing are absent. None for
            an untrained layer. Their shapes are the caller's to check.

    Raises:
        UnsupportedLayerError: the method cannot adapt such a layer.
    """

    PARTS: ClassVar[tuple[str, ...]]
    PRECISE: ClassVar[frozenset[str]] = frozenset()  # those that are computed with in at least float32
    alternative: ClassVar[AdapterLayer | None] = None  # of a layer: what a file's tensors may be as well

    def __init__(self, shape: LayerShape, config: LayerConfig, parts: Mapping[str, Tensor | None] | None = None):
        super().__init__()
        self.shape, self.config = shape, config
        self.check()
        values = self.initial() if parts is None else parts
        for part in self.PARTS:
            value = values.get(part)
            self.register_parameter(part, None if value is None else nn.Parameter(value))

    def check(self) -> None:
        """Raise UnsupportedLayerError where `config` cannot be had on a layer of this shape."""

    def initial(self) -> dict[str, Tensor]:
        """The parameters of an untrained layer, by part."""
        raise NotImplementedError

    def weights(
        self, cast: Cast, *, dma: float, sta: float, owner: Hashable = None, precise: Cast | None = None
    ) -> LayerWeights:
        """This layer's tensors for calls of one dtype and device.

        Args:
            cast: maps a parameter to a tensor on the device and in the dtype of the call.
            dma, sta: strengths of the change of the weight, and of the rescaling of statistics where the method has one.
            owner: what the caller recognizes them by.
            precise: the same for the parts in PRECISE, in at least float32; None for `cast`.
        """
        raise NotImplementedError

    def delta(self) -> Tensor:
        """ΔW of a layer whose change is `fixed`, in W0's shape and at least float32, at strength 1."""
        raise NotImplementedError

    def change(self, weight: Tensor) -> Tensor:
        """ΔW on a layer whose W0 is `weight`, worked out where that is: `delta`, but for a change that depends on W0."""
        here = next(self.parameters()).device == weight.device
        return (self if here else self.with_tensors(lambda value: value.to(weight.device))).delta()

    def shift(self) -> Tensor | None:
        """What a `fixed` change adds to the layer's bias, (d,) in float32; None where there is nothing."""
        return None

    def without_bias(self) -> AdapterLayer | None:
        """The same without `shift`, for a layer that has no bias; None where nothing is left."""
        return self

    def fitted(self, shape: LayerShape) -> AdapterLayer | None:
        """This layer for a host layer of another shape, where its numbers are the same in that shape; None where not."""
        return None

    def or_else(self, alternative: AdapterLayer) -> None:
        """Say what the layer is where the host's is not of its shape: files of two methods may look the same."""
        self.__dict__["alternative"] = alternative  # not as a part of this module

    def on(self, shape: LayerShape) -> AdapterLayer | None:
        """This layer for a host layer of that shape, whatever it takes; None where it does not fit."""
        if self.shape == shape:
            return self
        return self.fitted(shape) or (None if self.alternative is None else self.alternative.on(shape))

    @property
    def fixed(self) -> bool:
        """Whether what it adds is `delta`, whatever the image: then it can be added to W0 once."""
        return True

    @property
    def tokens(self) -> str:
        """What of a sequence it looks at to decide what to do, one of `config.TOKENS`: "all" also where it looks at nothing."""
        return "all"

    @property
    def styles(self) -> int:
        """How many styles a router chooses from; 0 for a layer without router."""
        return 0

    @property
    def prompt_features(self) -> int:
        """The width of the text conditioning that its router reads; 0 where it reads none."""
        return 0

    @property
    def note(self) -> str:
        """What a person should know of this layer when it is made; empty for nothing."""
        return ""

    def tensors(self) -> dict[str, nn.Parameter]:
        """The parameters this layer has, by part."""
        return {part: value for part in self.PARTS if (value := getattr(self, part)) is not None}

    def converted(self, device: torch.device, dtype: torch.dtype) -> AdapterLayer:
        """The same layer on another device and in another dtype, parts in PRECISE in at least float32; what has them already
        is shared, not copied."""
        precise = torch.promote_types(dtype, torch.float32)
        parts = {
            part: value.detach().to(device, precise if part in self.PRECISE else dtype)
            for part, value in self.tensors().items()
        }
        return type(self)(self.shape, self.config, parts)

    def extra_repr(self) -> str:
        return f"{self.shape}, {self.config}"


class AdapterSettings(Protocol):
    """What a person chooses for a new adapter, the same for all methods; a method reads what concerns it."""

    @property
    def method(self) -> str:
        """One of `methods.choices()`."""

    @property
    def rank(self) -> int: ...
    @property
    def styles(self) -> int: ...
    @property
    def alpha(self) -> float:
        """0 means the rank."""

    @property
    def factors(self) -> tuple[int, ...]: ...
    @property
    def router_pool(self) -> str: ...
    @property
    def router_input(self) -> str: ...
    @property
    def sta(self) -> str: ...
    @property
    def tokens(self) -> str: ...
    @property
    def targets(self) -> tuple[str, ...]:
        """A layer selector's terms; none for what the method's paper adapts."""


Problem = Callable[[str], Exception]  # what is wrong with a layer in a file -> the error to raise


@dataclass(frozen=True)
class Method:
    """A method, as the rest of the core sees it.

    Args:
        name: in files and messages.
        title: for people.
        layer: its layers.
        config: the config of an adapter of this method.
        choices: what a person may ask for -> what is special about it: {"lora": {...}}; one entry, its name, as a rule.
        configure: (settings, what is special about the choice) -> config.
        suffixes: part -> how its key in a file ends, after the module's name.
        lora_names: whether files name modules as LoRA files do, for other programs, or by their diffusers names.
        read: (tensors by part, the layer's config where the file states one, what makes an error) -> the layer.
        describe: (layers) -> {label: value} for `styleinject info`.
        paper: its address, for the files of those that can be trained.
        tensors: (layer) -> its tensors by part, as files keep them, where that is not what the layer holds.
    """

    name: str
    title: str
    layer: type[AdapterLayer]
    config: type[LayerConfig]
    choices: Mapping[str, Mapping[str, Any]]
    configure: Callable[[AdapterSettings, Mapping[str, Any]], LayerConfig]
    suffixes: Mapping[str, str]
    read: Callable[[dict[str, Tensor], Any, Problem], AdapterLayer]
    describe: Callable[[Sequence[Any]], dict[str, str]]
    paper: str = ""
    lora_names: bool = False
    tensors: Callable[[Any], Mapping[str, Tensor]] = field(default=lambda layer: layer.tensors())
