"""The mean of s in each layer: measured while an adapter trains, kept in its file, and what its router can be held at.

Held so, an adapter does for things it never saw what it does on average, not what it has learned by heart of the things it was
shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..call import Listener
from ..config import is_finite
from .analysis import UNUSED

ROUTER_MEAN = "styleinject.router_mean"  # metadata: JSON, {layer: [share of each style]}
_RATE = 0.01  # of a step in the mean: it spans about the last hundred


def router_mean(adapter: Adapter) -> dict[str, Tensor]:
    """The mean of s as the adapter's file has it: layer -> (n,); absent where there is none that fits."""
    try:
        stored: Any = json.loads(adapter.metadata.get(ROUTER_MEAN, "{}"))
    except (ValueError, RecursionError):
        return {}
    found = {}
    for name, layer in adapter.routed.items():
        values = stored.get(name) if isinstance(stored, dict) else None
        if isinstance(values, list) and len(values) == layer.styles and all(is_finite(v) and v >= 0 for v in values):
            total = math.fsum(values)
            if total > 0:
                found[name] = torch.tensor(values) / total
    return found


def keep_router_mean(adapter: Adapter, means: Mapping[str, Tensor]) -> None:
    """Write the mean of s into the adapter's metadata; layers of `means` that have none are left out."""
    rounded = {name: [round(value, 5) for value in mean.tolist()] for name, mean in means.items()}
    adapter.metadata[ROUTER_MEAN] = json.dumps(rounded, separators=(",", ":"))


def shares(adapter: Adapter) -> Tensor | None:
    """How much each style is used, over the layers that have all of them, (n,); None where the file does not say."""
    count = len(adapter.style_names)
    means = [mean for mean in router_mean(adapter).values() if len(mean) == count]
    return torch.stack(means).mean(0) if means else None


def unused(adapter: Adapter) -> float:
    """The share, over all layers and styles, of those that are hardly ever chosen; 0 where the file does not say."""
    means = list(router_mean(adapter).values())
    return float((torch.cat(means) < UNUSED).float().mean()) if means else 0.0


class MeanMeter(Listener):
    """Measures the mean of s over the last hundred steps or so, from what each layer does first in a step.

    First, for later passes of a step may be class images, or the blocks run again for the backward pass.
    """

    def __init__(self) -> None:
        self.means: dict[str, Tensor] = {}
        self.steps = 0
        self._heard: dict[str, Tensor] = {}

    def record(self, layer: str, s: Tensor) -> None:
        if layer not in self._heard:
            self._heard[layer] = s.detach().float().flatten(0, -2).mean(0)

    def step(self) -> None:
        """A step is over: take what was heard into the mean."""
        weight = max(_RATE, 1 / (self.steps + 1))
        for layer, heard in self._heard.items():
            self.means[layer] = torch.lerp(self.means[layer], heard, weight) if layer in self.means else heard
        self._heard.clear()
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"means": dict(self.means), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.means, self.steps = dict(state["means"]), state["steps"]
