"""Train an adapter of the embedded model on another drawing style: the plain fine-tuning objective, real images."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..adapter import Adapter
from ..config import AdapterConfig
from ..hosts.architectures import ARCHITECTURES
from ..train.data.source import LatentSource
from ..train.objectives.tasks import FineTune
from ..train.run.loop import Observer, train
from ..train.settings import TrainSettings
from . import data
from .autoencoder import Autoencoder
from .model import load_autoencoder, load_text_encoder, load_unet
from .text import TextEncoder
from .training import DemoTrainingModel

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

    def for_training(self) -> DemoTrainingModel:
        """The same three parts, as training wants them."""
        return DemoTrainingModel(self.unet, self.text_encoder, self.autoencoder)


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
    observer: Observer | None = None,
) -> list[float]:
    """Train an adapter on the style's drawings of every concept that is not held out. Returns the loss of every step."""
    shown = [k for k, concept in enumerate(data.concepts()) if not concept.held_out]
    frozen = model.for_training()
    settings = TrainSettings(
        steps, batch, learning_rate=learning_rate, schedule="cosine", warmup=10, caption_dropout=0.1, seed=seed
    )
    latents = frozen.encode(data.images(style)[shown])
    prompts = frozen.encode_text([data.concepts()[k].name for k in shown])
    source = LatentSource(list(latents), prompts, batch_size=batch, seed=seed)
    task = FineTune(frozen, source, settings, frozen.encode_text([""]))
    return train(adapter, task, settings, observer=observer).losses
