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
from .functional.host import HostLayer, as_tokens, statistics_dtype
from .functional.update import Hear, LayerWeights, prepare
from .layers import LayerShape
from .site import Rows, Site

Line = Callable[[Tensor], Tensor]
_MOST_LINES = 16  # shapes of inputs that a plan knows at a time
_geometry = attrgetter("padding_mode", "stride", "padding", "dilation")


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
        self.groups = {rows: _Group([site for site in self.active if site.rows == rows], x) for rows in places}
        self.whole = self.groups[None] if list(self.groups) == [None] else None  # nothing but adapters of the whole layer
        self.kept = keep and not torch.is_grad_enabled() and all(group.lasting for group in self.groups.values())
        self._lines: dict[Any, Line | None] = {}  # by shape of x and the call's number of images
        self._kind = x.device.type  # torch knows no autocast for meta tensors
        self._simple = self.kept and self.whole is not None and not self.reading and self._kind != "meta"
        if self.kept:
            self._remember()

    def _remember(self) -> None:
        """Note what all this was made of."""
        live = {id(tensor) for group in self.groups.values() for tensor in group.prepared.live}
        module, forward = self.host.module, self.host.forward
        own = getattr(forward, "__func__", None) is type(module).forward
        self._program = self._sites[0].program if own else None  # below somebody's forward W0 cannot be read
        self._strengths = [(site, site.dma, site.sta) for site in self._sites]
        self._geometry = _geometry(module) if self.host.shape.is_conv else None
        self._parameters: list[tuple[Any, str, Any, int]] = [  # table, name, tensor, where its numbers are
            (site.layer._parameters, name, tensor, 0 if tensor is None else tensor.data_ptr())
            for site in self.active
            for name, tensor in site.layer._parameters.items()
        ]
        copied = [tensor for *_, tensor, pointer in self._parameters if pointer and id(tensor) not in live]
        self._addresses = [tensor.detach() for tensor in copied]  # nothing else comes to lie there while these do
        # those made in inference mode, as ComfyUI makes them, have no count of changes, and are changed by nobody
        self._versions = [(tensor, tensor._version) for tensor in copied if not tensor.is_inference()]

    def holds(self, sites: Sequence[Site], x: Tensor, forward: Callable[..., Tensor]) -> bool:
        """Whether it is what would be prepared now: it is asked in every call, and written for that.

        Args:
            sites: everything on the module, in order.
            x: the input.
            forward: the module's, below ours.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return False
        host, program = self.host, self._program
        if self._dtype is not x.dtype or self._device != x.device or self._sites != sites or host.forward is not forward:
            return False
        if program is not None and program.readable(host.module, x):
            parameters = host.module.__dict__["_parameters"]
            if parameters["weight"] is not host.weight or parameters["bias"] is not host.bias:
                return False
        elif host.weight is not None:
            return False
        if self._geometry is not None and _geometry(host.module) != self._geometry:
            return False
        for site, dma, sta in self._strengths:
            if site.dma != dma or site.sta != sta:
                return False
        try:
            for table, name, tensor, pointer in self._parameters:
                if table[name] is not tensor or (pointer and tensor.data_ptr() != pointer):
                    return False
        except KeyError:  # one has left
            return False
        return all(tensor._version == version for tensor, version in self._versions)

    def line(self, x: Tensor) -> Line | None:
        """All that is to be done to inputs like x as one function of x, where nothing is left to choose in this call."""
        if not self._simple or torch.is_autocast_enabled(self._kind):
            return None
        for current in self.current:
            call = current.call
            if call.listeners or (self.looks and call.tokens is not None):
                return None
        images = self.current[0].call.images
        key = x.shape, images
        if key not in self._lines:
            if len(self._lines) >= _MOST_LINES:
                self._lines.clear()
            self._lines[key] = self._line(x, images)
        return self._lines[key]

    def _line(self, x: Tensor, images: int) -> Line | None:
        host, first = self.host, self.active[0]
        if x.shape[1 if host.shape.is_conv else -1] != self._known:
            return None
        if not host.shape.is_conv and as_tokens(x, first.program.samples(x, first.name, images)) is not x:
            return None
        return dispatch.straight(x, host, self.groups[None].prepared)

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
        frozen = None not in self.groups
        h = host(x) if frozen else self.groups[None].run(x, host)
        places = sorted((rows for rows in self.groups if rows is not None), key=lambda rows: (rows.start, rows.size))
        while places:  # slices that overlap, one after the other
            apart: list[Rows] = []
            later: list[Rows] = []
            end = 0
            for rows in places:
                (apart if rows.start >= end else later).append(rows)
                end = rows.start + rows.size if rows is apart[-1] else end
            h = self._in_slices(x, h, host if frozen else replace(host, weight=None, bias=None), apart)
            places, frozen = later, False  # from here on W0 and b do not give h
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

    def __init__(self, sites: Sequence[Site], x: Tensor):
        self.sites, self.lasting = list(sites), True
        self.current = list({site.current: None for site in sites})
        # torch knows no autocast for meta tensors
        self._device = None if x.device.type == "meta" else x.device.type
        precise = statistics_dtype(x)
        self.weights = [self._weights(site, x, precise) for site in sites]
        self.prepared = prepare([weights for weights in self.weights if weights.active])

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
