"""The demo's vision encoder: the trunk of its autoencoder, which has seen every style and is not the judge of any."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..deadiff.vision import masked_pixels
from .model import load_autoencoder

SIZE = 64  # pixels
TOKENS, WIDTH = 64, 128  # 8x8 places


@cache
def _trunk() -> nn.Module:
    """The encoder without its last 1x1 convolution, in which the latents lose what they need not tell."""
    return load_autoencoder().encoder[:-1]


@torch.no_grad()
def trunk_features(images: Tensor) -> Tensor:
    """Drawings (R, 3, 64, 64) in [-1, 1] -> (R, 64, 128)."""
    return _trunk()(images).flatten(2).transpose(1, 2)


def demo_features(images: Tensor, mask: Tensor | None = None) -> Tensor:
    """Reference images of any size -> features.

    Args:
        images: (R, H, W, 3) in [0, 1].
        mask: (R or 1, h, w); outside of it the image becomes white, the demo's paper.

    Returns:
        (R, 64, 128).

    Raises:
        TokensError: see `masked_pixels`.
    """
    pixels = masked_pixels(images, mask, torch.ones(3))
    if pixels.shape[2:] != (SIZE, SIZE):
        pixels = F.interpolate(pixels, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)
    return trunk_features(pixels * 2 - 1)
