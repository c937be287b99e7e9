"""Train an adapter of the embedded model on another drawing style, or on all of them: plain fine-tuning, real images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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

ALL = "all"  # in the place of a style: every one that the base does not draw, called by its word
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
    """An untrained adapter for the embedded model. Of all styles, one that chooses by the prompt, with a place for each."""
    torch.manual_seed(seed)
    config, words = CONFIGS[method], list(data.STYLE_WORDS.values())
    chooses = style == ALL and config.has_router
    if chooses:
        config = replace(config, n_styles=len(words), router_input="prompt")
    drawn = f"four styles, by a word in the prompt: {', '.join(words)}" if style == ALL else f"the style {style}"
    metadata = {
        "modelspec.architecture": f"{ARCHITECTURES['demo'].modelspec}/{method}",
        "modelspec.description": f"The demo's emoji in {drawn}",
    }
    adapter = Adapter.create(ARCHITECTURES["demo"].shapes(), config, adapter_path(style, method).stem, metadata)
    return adapter.with_style_names(words) if chooses else adapter


def learned(style: str) -> list[str]:
    """The styles that an adapter of a style draws: itself, or every one of `ALL`."""
    return list(data.STYLE_WORDS) if style == ALL else [style]


def license_of(style: str) -> str:
    """The license of what is trained on a style's drawings; of all of them, OpenMoji's, which asks to be kept."""
    return data.LICENSES[data.BASE_STYLE if style == ALL else style]


def prompts(style: str, names: Sequence[str], *, called: bool) -> list[str]:
    """The prompts of things in a style, with its word before them where it has to be `called`."""
    return [f"{data.STYLE_WORDS[style]} {name}" for name in names] if called else list(names)


def train_style(
    model: DemoModel,
    adapter: Adapter,
    style: str,
    *,
    steps: int,
    batch: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    observer: Observer | None = None,
) -> list[float]:
    """Train an adapter on the style's drawings of every concept that is not held out. Returns the loss of every step.

    Of `ALL`, each drawing has its style, so that a router that reads the prompt learns to choose it.

    Args:
        batch, learning_rate: None for 32 and 0.002, of `ALL` 16 and 0.003.
    """
    batch = batch or (16 if style == ALL else 32)
    rate = learning_rate or (3e-3 if style == ALL else 2e-3)
    shown = [k for k, concept in enumerate(data.concepts()) if not concept.held_out]
    names, of = [data.concepts()[k].name for k in shown], learned(style)
    frozen = model.for_training()
    settings = TrainSettings(steps, batch, learning_rate=rate, schedule="cosine", warmup=10, caption_dropout=0.1, seed=seed)
    latents = torch.cat([frozen.encode(data.images(one)[shown]) for one in of])
    captions = frozen.encode_text([prompt for one in of for prompt in prompts(one, names, called=style == ALL)])
    labels = [k for k in range(len(of)) for _ in shown] if style == ALL and adapter.routed else None
    source = LatentSource(list(latents), captions, batch_size=batch, seed=seed, styles=labels)
    task = FineTune(frozen, source, settings, frozen.encode_text([""]))
    return train(adapter, task, settings, observer=observer).losses
