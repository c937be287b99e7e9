"""Train an adapter of the embedded model on another drawing style: the plain fine-tuning objective, real images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..attach import attach
from ..config import AdapterConfig
from ..hosts.architectures import ARCHITECTURES
from ..train.loop import TrainSettings, train
from ..train.objectives import fine_tune_loss
from . import data
from .autoencoder import Autoencoder
from .model import NOISE_SCHEDULE, load_autoencoder, load_text_encoder, load_unet
from .text import TextEncoder

TARGETS = ("attention", "conv")
CONFIGS = {
    "styleinject": AdapterConfig(r=4, n_styles=4, target_modules=TARGETS),
    "lora": AdapterConfig(r=16, n_styles=1, sta="none", target_modules=TARGETS),  # as many parameters
}


@dataclass
class DemoModel:
    """The embedded model's three parts, frozen."""

    unet: nn.Module = field(default_factory=load_unet)
    text_encoder: TextEncoder = field(default_factory=load_text_encoder)
    autoencoder: Autoencoder = field(default_factory=load_autoencoder)


def adapter_path(style: str, method: str = "styleinject") -> Path:
    """Where the adapter of a style ships."""
    return data.ADAPTERS / f"emoji-{style}{'' if method == 'styleinject' else '-' + method}.safetensors"


def new_adapter(style: str, method: str = "styleinject", seed: int = 0) -> Adapter:
    """An untrained adapter for the embedded model."""
    torch.manual_seed(seed)
    metadata = {
        "modelspec.architecture": f"{ARCHITECTURES['demo'].modelspec}/{method}",
        "modelspec.description": f"The demo's emoji in the style {style}",
    }
    return Adapter.create(ARCHITECTURES["demo"].shapes(), CONFIGS[method], adapter_path(style, method).stem, metadata)


def train_style(
    model: DemoModel,
    adapter: Adapter,
    style: str,
    *,
    steps: int,
    batch: int = 32,
    learning_rate: float = 2e-3,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train an adapter on the style's drawings of every concept that is not held out. Returns the loss of every step."""
    torch.manual_seed(seed)
    shown = [k for k, concept in enumerate(data.concepts()) if not concept.held_out]
    names = [data.concepts()[k].name for k in shown]
    with torch.no_grad():
        latents = model.autoencoder.encode(data.images(style)[shown])
        conditioning = model.text_encoder([*names, ""])  # the last row is the empty prompt
    alphas = alphas_cumprod()

    def loss_of_step(_: int) -> Tensor:
        rows = torch.randint(len(shown), (batch,))
        prompts = torch.where(torch.rand(batch) < 0.1, len(shown), rows)  # 10 % without a prompt, for guidance
        return fine_tune_loss(
            lambda z, t, c: model.unet(z, t, c).sample,
            latents[rows],
            conditioning[prompts],
            torch.randn_like(latents[rows]),
            torch.randint(len(alphas), (batch,)),
            alphas,
            NOISE_SCHEDULE["prediction_type"],
        )

    with attach(model.unet, adapter):
        return train(adapter, loss_of_step, TrainSettings(steps, learning_rate, warmup=10, decay=True), on_step)


def alphas_cumprod() -> Tensor:
    """ᾱ of the embedded model's noise schedule, (1000,)."""
    start, end = NOISE_SCHEDULE["beta_start"] ** 0.5, NOISE_SCHEDULE["beta_end"] ** 0.5
    betas = torch.linspace(start, end, NOISE_SCHEDULE["num_train_timesteps"]) ** 2
    return torch.cumprod(1 - betas, 0)
