"""What the adapters on one module need that does not depend on the layer's input: prepared once, not in each call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .functional import dispatch
from .functional.host import HostLayer, statistics_dtype
from .functional.update import Hear, LayerWeights, prepare
from .layers import LayerShape
from .site import Rows, Site

_data_ptr, _version = Tensor.data_ptr, attrgetter("_version")


class Plan:
    """The active sites of a module, ready for inputs of one dtype on one device.

    A plan is kept only where every large tensor in it is the adapter's own parameter, and no gradient is wanted: what is
    copied are routers, hypernetworks and, of several adapters side by side, up-projections. `holds` compares all it was made
    of (the layer, the sites, their strengths, their parameters with storage and version), so that a stale one is never used.

    Args:
        sites: everything on the module, in order.
        x: an input.
        host: the layer by itself.
        keep: whether it is to be asked later if it still `holds`; not while compiling, for all of it belongs into the graph.
    """

    def __init__(self, sites: Sequence[Site], x: Tensor, host: HostLayer, keep: bool = False):
        self.host, self._sites, self._dtype, self._device = host, list(sites), x.dtype, x.device
        self.active = [site for site in sites if site.dma != 0 or site.sta != 0]
        self.current = list({site.current: None for site in self.active})
        known = {site.layer.shape.in_features for site in self.active}
        self._known = known.pop() if len(known) == 1 else -1
        if host.weight is not None and host.weight.shape[0] != host.shape.out_features:
            self._known = -1
        # what they look at, where the image's tokens share a sequence with others; "all" where it makes no difference
        self.looks = {site.layer.tokens for site in self.active} - {"all"}
        self.reading = [site for site in self.active if site.layer.prompt_features]  # the prompt
        places = dict.fromkeys(site.rows for site in self.active)
        self.groups = {rows: _Group([site for site in self.active if site.rows == rows], x, host) for rows in places}
        self.whole = self.groups[None] if list(self.groups) == [None] else None  # nothing but adapters of the whole layer
        self.kept = keep and not torch.is_grad_enabled() and all(group.lasting for group in self.groups.values())
        if self.kept:
            self._strengths = [(site, site.dma, site.sta) for site in sites]
            self._tables = [site.layer._parameters for site in self.active]
            parameters = [p for table in self._tables for p in table.values()]
            # no other has these ids while `_tensors` keeps them
            self._parameters = [list(map(id, table.values())) for table in self._tables]
            self._tensors = [p for p in parameters if p is not None]
            self._pointers = list(map(_data_ptr, self._tensors))
            # those made in inference mode, as ComfyUI makes them, have no count of changes, and are changed by nobody
            self._counted = [p for p in self._tensors if not p.is_inference()]
            self._versions = list(map(_version, self._counted))

    def holds(self, sites: Sequence[Site], x: Tensor, host: HostLayer) -> bool:
        """Whether it is what would be prepared now."""
        if self.host is not host or self._sites != sites or self._dtype != x.dtype or self._device != x.device:
            return False
        for site, dma, sta in self._strengths:
            if site.dma != dma or site.sta != sta:
                return False
        for table, ids in zip(self._tables, self._parameters, strict=True):
            if list(map(id, table.values())) != ids:
                return False
        return list(map(_data_ptr, self._tensors)) == self._pointers and list(map(_version, self._counted)) == self._versions

    def run(self, x: Tensor, host: HostLayer) -> Tensor:
        """h* of the layer. Slices of a fused layer are adapted on their own channels, after what adapts it whole.

        Args:
            x: (B, L, k) or (B, k, H, W).
            host: the layer as it is called this time.
        """
        if x.shape[-1 if host.shape.kernel is None else 1] != self._known:
            return self._on_known_channels(x, host)
        if self.whole is not None:
            return self.whole.run(x, host)
        h = self.groups[None].run(x, host) if None in self.groups else host(x)
        places = sorted((rows for rows in self.groups if rows is not None), key=lambda rows: (rows.start, rows.size))
        while places:  # slices that overlap, one after the other
            apart: list[Rows] = []
            later: list[Rows] = []
            end = 0
            for rows in places:
                (apart if rows.start >= end else later).append(rows)
                end = rows.start + rows.size if rows is apart[-1] else end
            h = self._in_slices(x, h, host, apart)
            places = later
        return h

    def run_on(self, x: Tensor, host: HostLayer, tokens: slice, frames: int) -> Tensor:
        """h* where the image's tokens are some of a sequence's, or those of several frames; every site looks at its own.

        Args:
            tokens: which of x's (B, L, k) are the image's.
            frames: how many frames they are of.
        """
        looks = {site.layer.tokens for site in self.active}
        if len(looks) > 1:
            h = host(x)
            fixed = replace(host, forward=lambda _: h)
            plans = [Plan([s for s in self.active if s.layer.tokens == kind], x, fixed) for kind in sorted(looks)]
            return torch.stack([plan.run_on(x, fixed, tokens, frames) - h for plan in plans]).sum(0) + h
        if looks == {"all"}:
            return self.run(x, host)
        if looks == {"frame"} and frames > 1:
            return self._run_on_frames(x, host, tokens, frames)
        whole = tokens == slice(0, x.shape[1])
        return self.run(x, host if whole else replace(host, tokens=tokens))

    def _run_on_frames(self, x: Tensor, host: HostLayer, tokens: slice, frames: int) -> Tensor:
        """h* with each frame an image of its own. Tokens of no frame get what the whole clip gives them."""

        def split(values: Tensor) -> Tensor:
            return values[:, tokens].unflatten(1, (frames, -1)).flatten(0, 1)  # (B, L, k) -> (B·frames, L / frames, k)

        h = host(x)
        part = replace(host, forward=lambda _: split(h), frames=frames)
        image = self.run(split(x), part).unflatten(0, (x.shape[0], frames)).flatten(1, 2)
        if tokens == slice(0, x.shape[1]):
            return image
        with ExitStack() as stack:
            for current in {site.current for site in self.active}:
                stack.enter_context(current.exactly(replace(current.call, listeners=())))  # they have heard the frames
            rest = self.run(x, replace(host, forward=lambda _: h, tokens=tokens))
        return torch.cat((rest[:, : tokens.start], image, rest[:, tokens.stop :]), 1)

    def _on_known_channels(self, x: Tensor, host: HostLayer) -> Tensor:
        """h* of a layer with more channels than adapters were made for, or fewer: they change what they know of it.

        Inpainting and edit models, and nodes that widen a layer of a model that is loaded, put what they add after the
        channels that were there. An adapter that needs more than there are is left out.
        """
        dim, h = 1 if host.shape.is_conv else -1, host(x)
        by_channels: dict[tuple[int, int], list[Site]] = {}
        for site in self.active:
            k = site.layer.shape.in_features
            d = host.shape.out_features if site.rows is not None else site.layer.shape.out_features
            if k > x.shape[dim] or d > h.shape[dim]:
                site.leave_out(x.shape[dim], h.shape[dim])
            else:
                by_channels.setdefault((k, d), []).append(site)
        out = h
        for (k, d), sites in by_channels.items():
            own = h.narrow(dim, 0, d)
            part = _first_channels(host, own, k)
            change = Plan(sites, x, part).run(x.narrow(dim, 0, k), part) - own
            rest = h.shape[dim] - d
            if rest:
                change = torch.cat([change, torch.zeros_like(h.narrow(dim, d, rest))], dim)
            out = out + change
        return out

    def _in_slices(self, x: Tensor, h: Tensor, host: HostLayer, places: Sequence[Rows]) -> Tensor:
        """h with the channels of some slices adapted; the slices are in order and do not overlap."""
        dim = 1 if host.shape.is_conv else -1
        pieces, end = [], 0
        for rows in places:
            pieces.append(h.narrow(dim, end, rows.start - end))
            end = rows.start + rows.size
            part = host.part(rows.slice, h.narrow(dim, rows.start, rows.size))
            pieces.append(self.groups[rows].run(x, part))
        pieces.append(h.narrow(dim, end, h.shape[dim] - end))
        return torch.cat(pieces, dim)


def _first_channels(host: HostLayer, h: Tensor, inputs: int) -> HostLayer:
    """The first channels of a layer as one of its own, on the input for which they are `h`."""
    outputs = h.shape[1 if host.shape.is_conv else -1]
    shape = LayerShape(inputs, outputs, host.shape.kernel)
    read = lambda x: host.frozen_weight(x)[:outputs, :inputs]  # noqa: E731
    kept: Any = {"tokens": host.tokens, "frames": host.frames, "prompt": host.prompt}
    return HostLayer(shape, lambda _: h, None, None, host.module, read=read, **kept)


class _Group:
    """The sites that adapt the same channels."""

    def __init__(self, sites: Sequence[Site], x: Tensor, host: HostLayer):
        self.sites, self.lasting, self._host = list(sites), True, host
        self.current = list({site.current: None for site in sites})
        # torch knows no autocast for meta tensors
        self._device = None if x.device.type == "meta" else x.device.type
        precise = statistics_dtype(x)
        self.weights = [self._weights(site, x, precise) for site in sites]
        self.prepared = prepare([weights for weights in self.weights if weights.active])
        self._straight: tuple[torch.Size, Callable[[Tensor], Tensor] | None] | None = None

    def _weights(self, site: Site, x: Tensor, precise: torch.dtype) -> LayerWeights:
        def cast(parameter: Tensor) -> Tensor:
            out = site.program.cast(parameter, x, x.dtype)
            self.lasting = self.lasting and out is parameter
            return out

        def cast_precise(parameter: Tensor) -> Tensor:
            self.lasting = self.lasting and parameter.device == x.device
            return site.program.cast(parameter, x, precise)

        return site.layer.weights(cast, dma=site.dma, sta=site.sta, owner=site, precise=cast_precise)

    def run(self, x: Tensor, host: HostLayer) -> Tensor:
        for current in self.current:
            if current.call.listeners:
                return self._heard(x, host)
        return self._forward(x, host)

    def _forward(self, x: Tensor, host: HostLayer, hear: Hear | None = None) -> Tensor:
        if self._device is not None and torch.is_autocast_enabled(self._device):
            return dispatch.forward(x, host, self.weights, hear)
        # the layer by itself: another host belongs to one call, and may hold its input
        if hear is None and host is self._host and host.constants is not None and not torch.is_grad_enabled():
            known = self._straight  # for inputs of one shape
            if known is None or known[0] != x.shape:
                self._straight = known = (x.shape, dispatch.straight(x, host, self.prepared))
            if known[1] is not None:
                return known[1](x)
        return dispatch.run(x, host, self.prepared, hear)

    def _heard(self, x: Tensor, host: HostLayer) -> Tensor:
        """The same with somebody listening to the routers."""
        hearing, h = _Hearing(self.sites, host), None

        def frozen(y: Tensor) -> Tensor:
            nonlocal h
            out = host.forward(y)
            if y is x:
                h = out
            return out

        out = self._forward(x, replace(host, forward=frozen), hearing)
        for site, s in hearing.used.items():
            _measure(site, s, x, h, host, self.weights[self.sites.index(site)])
        return out


class _Hearing:
    """What the listeners of the current call make of the probabilities of some sites."""

    def __init__(self, sites: Sequence[Site], host: HostLayer):
        self.sites, self.host = sites, host
        self.used: dict[Site, Tensor] = {}

    @torch.compiler.disable
    def __call__(self, weights: LayerWeights, s: Tensor) -> Tensor:
        site = next(site for site in self.sites if site is weights.owner)
        listeners, shape = site.current.call.listeners, s.shape
        s = self.host.joined(s)
        for listener in listeners:
            s = listener.steer(site.name, s)
        seen = (self.host.seen(s) if s.ndim == 3 and self.host.frames == 1 else s).detach()
        for listener in listeners:
            listener.record(site.name, seen)
        self.used[site] = seen
        return s.reshape(shape)


@torch.compiler.disable
def _measure(site: Site, s: Tensor, x: Tensor, h: Tensor | None, host: HostLayer, weights: LayerWeights) -> None:
    with torch.no_grad():
        x = host.joined(host.seen(x))
        h = None if h is None else host.joined(host.seen(h))
        if host.frames > 1 and s.shape[1] != x.shape[1]:
            s = s.repeat_interleave(x.shape[1] // s.shape[1], 1)  # of each frame, for each of its tokens
        for listener in site.current.call.listeners:
            if listener.measures(site.name):
                listener.measure(site.name, s, x, h, host, weights)
