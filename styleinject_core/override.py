"""The forward override of one module: how an adapter gets between a host layer and its caller, and out again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .functional import dispatch
from .functional.host import REPLACED, HostLayer
from .layers import LayerAdapter, LayerShape, LayerWeights

_ACTIVE = "_styleinject_override"


class HostProgram:
    """What the core must know about a host program; these defaults fit any torch module.

    A host overrides them to move weights its own way, to say where a frozen weight can be read, or to undo a
    reshaping of the batch.
    """

    def cast(self, parameter: Tensor, x: Tensor) -> Tensor:
        """A parameter of the adapter on the device and in the dtype of the layer's input x."""
        return parameter.to(x.device, x.dtype)

    def readable(self, module: nn.Module, x: Tensor) -> bool:
        """Whether module.weight and module.bias are what module.forward applies to x, as plain tensors."""
        if type(module) not in (nn.Linear, nn.Conv2d) or module._forward_hooks or module._forward_pre_hooks:
            return False
        if REPLACED in module.__dict__:
            return False
        return module.weight.dtype == x.dtype and module.weight.device == x.device

    def samples(self, x: Tensor, layer: str) -> int:
        """How many images the first dimension of a Linear's input x holds; `layer` is its name in the adapter."""
        return x.shape[0]


@dataclass
class Site:
    """One adapter on one module, with the strengths of its two parts (0 where it is switched off).

    `on_route`, where set, is given the style probabilities (B, n) or (B, L, n) of each call and returns those to use;
    `on_call`, where set, is given the input as tokens or image, the frozen layer's output where the form in use computed
    it, the frozen layer and the call's weights, after the call. `tap` keeps the `router.tap.Tap` that serves both.
    """

    name: str
    layer: LayerAdapter
    program: HostProgram
    dma: float = 1.0
    sta: float = 1.0
    on_route: Callable[[Tensor], Tensor] | None = None
    on_call: Callable[[Tensor, Tensor | None, HostLayer, LayerWeights], None] | None = None
    tap: Any = None

    def weights(self, x: Tensor) -> LayerWeights:
        return self.layer.weights(
            lambda parameter: self.program.cast(parameter, x), dma=self.dma, sta=self.sta, on_route=self.on_route
        )


class Override:
    """The instance-level `forward` that a module has while sites are installed on it.

    One override serves every attachment on the module, so that their increments add up and they can leave in any
    order; with the last one the module is as it was before. The module's `forward` is the override itself: one object
    for its whole life, which spares compiled models a recompilation, and no reference cycle, which would keep a model's
    weights in memory until Python's collector comes by.
    """

    def __init__(self, module: nn.Module, shape: LayerShape):
        self.module: Any = module
        self.shape = shape
        self.sites: list[Site] = []
        self._class_forward = type(module).forward.__get__(module)
        self._former: Callable[..., Tensor] | None = None  # an instance-level forward somebody set before us

    def install(self, site: Site) -> None:
        """Add a site to the module's active override, this one where there is none yet."""
        attributes = self.module.__dict__
        active: Any = attributes.get(_ACTIVE)
        if active is None:
            self._former = attributes.get("forward")
            attributes[_ACTIVE] = attributes["forward"] = self
            active = self
        active.sites.append(site)

    @staticmethod
    def remove(module: nn.Module, site: Site) -> None:
        """Take a site off the module; with the last one, restore the module's forward.

        Where somebody else has put a forward over ours in the meantime, ours stays below it and passes through.
        """
        attributes = module.__dict__
        active = attributes.get(_ACTIVE)
        if not isinstance(active, Override):
            return
        active.sites[:] = [s for s in active.sites if s is not site]
        on_top = attributes.get("forward") is active
        if active.sites or not on_top:
            return
        del attributes[_ACTIVE]
        if active._former is None:
            del attributes["forward"]
        else:
            attributes["forward"] = active._former
        active._former = None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """h* of the module (or h, bit for bit, where every strength is 0)."""
        original = self._class_forward if self._former is None else self._former
        sites = [site for site in self.sites if site.dma != 0 or site.sta != 0]
        if not sites:
            return original(x, *args, **kwargs)
        program = sites[0].program
        tokens = x if self.shape.is_conv else as_tokens(x, program.samples(x, sites[0].name))
        watched, h = any(site.on_call is not None for site in sites), None

        def frozen(y: Tensor) -> Tensor:
            nonlocal h
            if y is not tokens:
                return original(y, *args, **kwargs)
            out = original(x, *args, **kwargs)
            if tokens.shape != x.shape:
                out = out.reshape(*tokens.shape[:-1], -1)
            h = out if watched else None
            return out

        readable = self._former is None and program.readable(self.module, x)
        weight, bias = (self.module.weight, self.module.bias) if readable else (None, None)
        host = HostLayer(self.shape, frozen, weight, bias, self.module)
        weights = [site.weights(x) for site in sites]
        out = dispatch.forward(tokens, host, weights)
        if watched:
            for site, own in zip(sites, weights, strict=True):
                if site.on_call is not None:
                    site.on_call(tokens, h, host, own)
        return out if tokens.shape == x.shape else out.reshape(*x.shape[:-1], -1)


def as_tokens(x: Tensor, samples: int) -> Tensor:
    """A Linear's input (..., k) as (B, L, k) with B the images: undoes what splits one image into rows of the batch."""
    images = samples if samples and x.shape[0] % samples == 0 else x.shape[0]
    return x.reshape(images, -1, x.shape[-1])
