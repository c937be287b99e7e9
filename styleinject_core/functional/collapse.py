"""What both fast forms share: n styles and all adapters collapsed before any position is touched (method, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers import LayerWeights
from .host import statistics_dtype


@dataclass(frozen=True)
class Collapsed:
    """The per-image parameters of a layer.

    down: A_eff of every adapter side by side, each times its strength and alpha / r, (B, R, k[, kh, kw]) with R the sum
        of their ranks.
    up: their up-projections side by side, (d, R).
    gain: Σ_j sta_j · G_j with G = f_s(σ)/σ - 1, multiplicative adapters only, (B, d).
    Each is None where no adapter contributes.
    """

    down: Tensor | None
    up: Tensor | None
    gain: Tensor | None


def hyper(s: Tensor, weights: LayerWeights) -> Tensor:
    """hyper(s): the modulation of every channel, (B, d) or (B, L, d) by token, in at least float32."""
    precise = statistics_dtype(s)
    return s.to(precise) @ weights.hyper_weight.to(precise).mT + weights.hyper_bias.to(precise)


def collapse(routed: list[tuple[LayerWeights, Tensor]]) -> Collapsed:
    """Collapse adapters that route per image, each with its style probabilities s (B, n)."""
    downs, ups, gain = [], [], None
    for weights, s in routed:
        if weights.dma != 0:
            mixed = (s * weights.dma) @ weights.A.flatten(1)  # (B, r·k·kh·kw); scaled where it is smallest
            downs.append(mixed.unflatten(1, weights.A.shape[1:]))
            ups.append(weights.B)
        if weights.adapts_statistics and weights.sta_form == "multiplicative":
            own = hyper(s, weights) * weights.sta  # (B, d)
            gain = own if gain is None else gain + own
    if not downs:
        return Collapsed(None, None, gain)
    down = downs[0] if len(downs) == 1 else torch.cat(downs, 1)
    up = ups[0] if len(ups) == 1 else torch.cat(ups, 1)
    return Collapsed(down, up, gain)
