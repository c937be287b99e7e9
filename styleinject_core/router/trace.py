"""Recording style probabilities while a model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..attach import Attachment


@dataclass
class RouterTrace:
    """Style probabilities of every call of every recorded layer.

    `calls[layer]` holds one tensor (B, n) per call of that layer in order, on the device of the model, untouched by
    any synchronisation; `stacked` brings them together.
    """

    calls: dict[str, list[Tensor]] = field(default_factory=dict)

    def stacked(self) -> dict[str, Tensor]:
        """Layer -> (calls, B, n) float32 on the CPU. Layers that were never called are left out."""
        return {name: torch.stack(calls).float().cpu() for name, calls in self.calls.items() if calls}


@contextmanager
def record(attachment: Attachment, adapter: int = 0) -> Iterator[RouterTrace]:
    """Record one attached adapter's routers for the length of a with block; what the layers compute is not changed.

        with attach(unet, adapter) as attachment, record(attachment) as trace:
            sample(...)

    Args:
        attachment: the attachment, installed or not.
        adapter: which of its adapters.
    """
    trace = RouterTrace()
    former = []
    for site in attachment.sites[adapter]:
        calls = trace.calls.setdefault(site.name, [])
        former.append(site.on_route)

        def listen(s: Tensor, calls: list[Tensor] = calls, inner=site.on_route) -> Tensor:
            used = s if inner is None else inner(s)
            calls.append(used.detach())
            return used

        site.on_route = listen
    try:
        yield trace
    finally:
        for site, inner in zip(attachment.sites[adapter], former, strict=True):
            site.on_route = inner
