"""The forward override of one module: how adapters, and rows to append, get between a host layer and its caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .call import CurrentCall, ModelCall
from .functional import dispatch
from .functional.host import REPLACED, HostLayer
from .functional.update import LayerWeights
from .layers import LayerShape
from .methods.method import AdapterLayer

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

    def weights(self, x: Tensor) -> LayerWeights:
        return self.layer.weights(lambda parameter: self.program.cast(parameter, x), dma=self.dma, sta=self.sta, owner=self)


@dataclass(eq=False)
class Tail:
    """Rows that are appended to what one module returns, as tokens of a reference image are to keys and values.

    Args:
        rows: given the module's input (B, L, k), its output (B, L, d) and the call, the rows (B, S, d), or None for none.
        current: the call that the module is in.
    """

    rows: Callable[[Tensor, Tensor, ModelCall], Tensor | None]
    current: CurrentCall


class Override:
    """The instance-level `forward` that a module has while sites are installed on it.

    One override serves every attachment on the module, so that their increments add up and they can leave in any
    order; with the last one the module is as it was before. Adapters come first and see the module's own rows alone,
    whatever is appended to them. The module's `forward` is the override itself: one object
    for its whole life, which spares compiled models a recompilation, and no reference cycle, which would keep a model's
    weights in memory until Python's collector comes by.
    """

    def __init__(self, module: nn.Module, shape: LayerShape):
        self.module: Any = module
        self.shape = shape
        self.sites: list[Site] = []
        self.tails: list[Tail] = []
        self._class_forward = type(module).forward.__get__(module)
        self._former: Callable[..., Tensor] | None = None  # an instance-level forward somebody set before us

    def install(self, part: Site | Tail) -> None:
        """Add a site or a tail to the module's active override, this one where there is none yet."""
        attributes = self.module.__dict__
        active: Any = attributes.get(_ACTIVE)
        if active is None:
            self._former = attributes.get("forward")
            attributes[_ACTIVE] = attributes["forward"] = self
            active = self
        (active.tails if isinstance(part, Tail) else active.sites).append(part)

    @staticmethod
    def remove(module: nn.Module, part: Site | Tail) -> None:
        """Take a site or a tail off the module; with the last one, restore the module's forward.

        Where somebody else has put a forward over ours in the meantime, ours stays below it and passes through.
        """
        attributes = module.__dict__
        active = attributes.get(_ACTIVE)
        if not isinstance(active, Override):
            return
        active.sites[:] = [site for site in active.sites if site is not part]
        active.tails[:] = [tail for tail in active.tails if tail is not part]
        on_top = attributes.get("forward") is active
        if active.sites or active.tails or not on_top:
            return
        del attributes[_ACTIVE]
        if active._former is None:
            del attributes["forward"]
        else:
            attributes["forward"] = active._former
        active._former = None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """h* of the module (or h, bit for bit, where every strength is 0), with the rows that are appended to it."""
        out = self._adapted(x, *args, **kwargs)
        if not self.tails:
            return out
        found = (tail.rows(x, out, tail.current.call) for tail in self.tails)
        return torch.cat([out, *(rows for rows in found if rows is not None)], 1)

    def _adapted(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        original = self._class_forward if self._former is None else self._former
        sites = [site for site in self.sites if site.dma != 0 or site.sta != 0]
        if not sites:
            return original(x, *args, **kwargs)
        if self.shape.other:
            with _changed(self.module, sites):
                return original(x, *args, **kwargs)
        first = sites[0]
        tokens = x if self.shape.is_conv else as_tokens(x, first.program.samples(x, first.name, first.current.call.images))

        def frozen(y: Tensor) -> Tensor:
            if y is not tokens:
                return original(y, *args, **kwargs)
            out = original(x, *args, **kwargs)
            return out if tokens.shape == x.shape else out.reshape(*tokens.shape[:-1], -1)

        readable = self._former is None and first.program.readable(self.module, x)
        weight, bias = (self.module.weight, self.module.bias) if readable else (None, None)
        host = HostLayer(
            self.shape, frozen, weight, bias, self.module, read=lambda: first.program.frozen_weight(self.module, x)
        )
        if all(site.rows is None for site in sites):
            out = _adapted(tokens, host, sites)
        else:
            out = _sliced(tokens, host, sites)
        return out if tokens.shape == x.shape else out.reshape(*x.shape[:-1], -1)


def _sliced(x: Tensor, host: HostLayer, sites: Sequence[Site]) -> Tensor:
    """A fused layer: first what adapts it whole, then, on the channels of each slice, what adapts that slice."""
    whole = [site for site in sites if site.rows is None]
    h = _adapted(x, host, whole) if whole else host(x)
    places = sorted({site.rows for site in sites if site.rows is not None}, key=lambda rows: (rows.start, rows.size))
    while places:  # slices that overlap, one after the other
        apart: list[Rows] = []
        later: list[Rows] = []
        end = 0
        for rows in places:
            (apart if rows.start >= end else later).append(rows)
            end = apart[-1].start + apart[-1].size
        h = _in_slices(x, h, host, apart, sites)
        places = later
    return h


def _in_slices(x: Tensor, h: Tensor, host: HostLayer, places: Sequence[Rows], sites: Sequence[Site]) -> Tensor:
    """h with the channels of some slices adapted; the slices are in order and do not overlap."""
    dim = 1 if host.shape.is_conv else -1
    pieces, end = [], 0
    for rows in places:
        pieces.append(h.narrow(dim, end, rows.start - end))
        end = rows.start + rows.size
        part = host.part(rows.slice, h.narrow(dim, rows.start, rows.size))
        pieces.append(_adapted(x, part, [site for site in sites if site.rows == rows]))
    pieces.append(h.narrow(dim, end, h.shape[dim] - end))
    return torch.cat(pieces, dim)


@contextmanager
def _changed(module: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """Other parameters for the length of a with block: how a fixed change gets onto what is neither Linear nor Conv2d."""
    own = module._parameters
    kept: dict[str, Any] = {name: own[name] for name in ("weight", "bias") if own.get(name) is not None}
    try:
        for name, parameter in kept.items():
            changed = parameter.detach().float()
            for site in sites:
                change = site.layer.change(parameter.detach()) if name == "weight" else site.layer.shift()
                if change is not None:
                    changed = changed + site.dma * change.to(changed.device)
            module._parameters[name] = changed.to(parameter.dtype)  # type: ignore[assignment]
        yield
    finally:
        module._parameters.update(kept)


def _adapted(x: Tensor, host: HostLayer, sites: Sequence[Site]) -> Tensor:
    weights = [site.weights(x) for site in sites]
    if not any(site.current.call.listeners for site in sites):
        return dispatch.forward(x, host, weights)
    hearing, h = _Hearing(sites), None

    def frozen(y: Tensor) -> Tensor:
        nonlocal h
        out = host.forward(y)
        if y is x:
            h = out
        return out

    out = dispatch.forward(x, replace(host, forward=frozen), weights, hearing)
    for site, s in hearing.used.items():
        _measure(site, s, x, h, host, weights[sites.index(site)])
    return out


class _Hearing:
    """What the listeners of the current call make of the probabilities of some sites."""

    def __init__(self, sites: Sequence[Site]):
        self.sites = sites
        self.used: dict[Site, Tensor] = {}

    @torch.compiler.disable
    def __call__(self, weights: LayerWeights, s: Tensor) -> Tensor:
        site = next(site for site in self.sites if site is weights.owner)
        listeners = site.current.call.listeners
        for listener in listeners:
            s = listener.steer(site.name, s)
        for listener in listeners:
            listener.record(site.name, s.detach())
        self.used[site] = s.detach()
        return s


@torch.compiler.disable
def _measure(site: Site, s: Tensor, x: Tensor, h: Tensor | None, host: HostLayer, weights: LayerWeights) -> None:
    with torch.no_grad():
        for listener in site.current.call.listeners:
            if listener.measures(site.name):
                listener.measure(site.name, s, x, h, host, weights)


def as_tokens(x: Tensor, samples: int) -> Tensor:
    """A Linear's input (..., k) as (B, L, k) with B the images: undoes what splits one image into rows of the batch."""
    images = samples if samples and x.shape[0] % samples == 0 else x.shape[0]
    return x.reshape(images, -1, x.shape[-1])
