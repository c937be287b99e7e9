"""The embedded model as training wants it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..train.data.batches import Conditioning
from ..train.models.noise import DiscreteSchedule
from ..train.models.training_model import TextToImageModel
from .autoencoder import DOWNSCALE, Autoencoder
from .model import BASE_STYLE, NOISE_SCHEDULE, load_autoencoder, load_text_encoder, load_unet, sample
from .text import LENGTH, TextEncoder, words


class DemoTrainingModel(TextToImageModel):
    """The embedded model, frozen."""

    architecture = "styleinject-demo"
    pixels_per_latent = DOWNSCALE

    def __init__(self, unet: nn.Module, text_encoder: TextEncoder, autoencoder: Autoencoder, name: str = "demo"):
        super().__init__(unet, DiscreteSchedule.from_diffusers(NOISE_SCHEDULE), name)
        self.text_encoder, self.autoencoder = text_encoder, autoencoder

    @classmethod
    def load(cls, style: str = BASE_STYLE) -> DemoTrainingModel:
        """The embedded model, or the one that draws another style. Raises ValueError: an unknown style."""
        return cls(
            load_unet(style), load_text_encoder(), load_autoencoder(), "demo" if style == BASE_STYLE else f"demo:{style}"
        )

    def encoders(self) -> list[nn.Module]:
        return [self.text_encoder, self.autoencoder]

    def length(self, caption: str) -> tuple[int, int]:
        return len(words(caption)) - len(self.text_encoder.unknown_words(caption)), LENGTH

    def predict(self, noisy: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        return self.denoiser(noisy, times, conditioning["context"]).sample

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        return self.autoencoder.encode(pixels)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        return {"context": self.text_encoder(list(prompts))}

    def sample(self, prompts: Sequence[str], resolution: int, seed: int, steps: int = 16, guidance: float = 3.0) -> Tensor:
        context, empty = (self.encode_text(p)["context"] for p in (prompts, [""]))
        size = resolution // self.pixels_per_latent
        return sample(self.denoiser, context, empty, seed=seed, steps=steps, guidance=guidance, size=size)
