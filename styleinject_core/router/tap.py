"""The tap at a site's router: where recorders listen and controls steer, for the length of one call of the host.

A tap never waits for the device, and stays with its site from call to call: torch.compile guards on what a module calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from ..functional.host import HostLayer
from ..layers import LayerWeights
from ..override import Site

Steer = Callable[[Tensor], Tensor]  # s of a call -> s to use


class Listener(Protocol):
    """One recording of one call of the host."""

    def hear(self, layer: str, s: Tensor) -> None:
        """The layer uses s, (B, n) or (B, L, n)."""

    def wants(self, layer: str) -> bool:
        """Whether `look` is to be called for this layer."""

    def look(self, layer: str, s: Tensor, x: Tensor, h: Tensor | None, host: HostLayer, weights: LayerWeights) -> None:
        """The layer has been called on x; h is the frozen layer's output where it was computed."""


class Tap:
    """Called by the layer with its style probabilities (`Site.on_route`), and after it with what it did (`Site.on_call`)."""

    def __init__(self, layer: str):
        self.layer = layer
        self.listeners: Sequence[Listener] = ()
        self.steer: Steer | None = None
        self._s: Tensor | None = None

    @torch.compiler.disable
    def route(self, s: Tensor) -> Tensor:
        if self.steer is not None:
            s = self.steer(s)
        for listener in self.listeners:
            listener.hear(self.layer, s.detach())
        self._s = s.detach()
        return s

    @torch.compiler.disable
    def call(self, x: Tensor, h: Tensor | None, host: HostLayer, weights: LayerWeights) -> None:
        s, self._s = self._s, None
        if s is not None:  # None for a layer without a router
            with torch.no_grad():
                for listener in self.listeners:
                    if listener.wants(self.layer):
                        listener.look(self.layer, s, x, h, host, weights)


@contextmanager
def tapped(
    sites: Sequence[Site], listeners: Sequence[Listener] = (), steers: Mapping[str, Steer] | None = None
) -> Iterator[None]:
    """Listen to the routers of an attachment's sites, and steer those that `steers` names, for one call of the host.

    Calls nest: listeners add up, and an inner control steers what an outer one has left.
    """
    former = []
    try:
        for site in sites:
            tap = site.tap = site.tap or Tap(site.name)
            former.append((site, site.on_route, site.on_call, tap.listeners, tap.steer))
            tap.listeners = (*tap.listeners, *listeners)
            tap.steer = _then(tap.steer, (steers or {}).get(site.name))
            site.on_route = tap.route
            site.on_call = tap.call if any(listener.wants(site.name) for listener in tap.listeners) else None
        yield
    finally:
        for site, on_route, on_call, heard_by, steer in former:
            site.on_route, site.on_call = on_route, on_call
            site.tap.listeners, site.tap.steer = heard_by, steer


def _then(first: Steer | None, second: Steer | None) -> Steer | None:
    if first is None or second is None:
        return first or second
    return lambda s: second(first(s))
