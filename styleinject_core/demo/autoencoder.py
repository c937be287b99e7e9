"""A small convolutional autoencoder, 64x64 pixels to 8x8x16 latents, for the embedded text-to-image model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LATENT_CHANNELS = 16
DOWNSCALE = 8


class ResBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Autoencoder(nn.Module):
    """Images (B, 3, 64, 64) in [-1, 1] <-> latents (B, 16, 8, 8) with zero mean and unit variance per channel.

    The first and last layers fold 4x4 and 2x2 pixels into channels, which keeps both directions cheap on a CPU.
    `mean` and `std` (16,) are measured on the training images once the network is trained.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4), nn.Conv2d(48, 64, 3, padding=1), ResBlock(64),  # (B, 64, 16, 16)
            nn.Conv2d(64, 128, 3, stride=2, padding=1), ResBlock(128), nn.Conv2d(128, LATENT_CHANNELS, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, 160, 3, padding=1), ResBlock(160), ResBlock(160),
            nn.Conv2d(160, 4 * 80, 1), nn.PixelShuffle(2), ResBlock(80), ResBlock(80),  # (B, 80, 16, 16)
            nn.Conv2d(80, 4 * 40, 1), nn.PixelShuffle(2), ResBlock(40),  # (B, 40, 32, 32)
            nn.Conv2d(40, 12, 3, padding=1), nn.PixelShuffle(2),  # (B, 3, 64, 64)
        )  # fmt: skip
        self.register_buffer("mean", torch.zeros(LATENT_CHANNELS))
        self.register_buffer("std", torch.ones(LATENT_CHANNELS))

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, 64, 64) in [-1, 1] -> (B, 16, 8, 8)."""
        return (self.encoder(images) - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 16, 8, 8) -> (B, 3, 64, 64), clamped to [-1, 1]."""
        return self.decoder(latents * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)).clamp(-1, 1)
