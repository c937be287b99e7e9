"""The embedded text-to-image model: a latent diffusion model small enough to ship and to sample in seconds.

A diffusers U-Net (v-prediction, Stable Diffusion's noise schedule) over 8x8x16 latents, a word-level text encoder and
an autoencoder for 64x64 pixels, trained on emoji by `scripts/demo/train_base.py`. One fp16 safetensors file holds all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..files import load_adapter
from .autoencoder import LATENT_CHANNELS, Autoencoder
from .data import ADAPTERS, ASSETS, BASE_STYLE, styles
from .text import WIDTH, TextEncoder

Module = TypeVar("Module", bound=nn.Module)
BASE_FILE = ASSETS / "base.safetensors"
WORDS_FILE = ASSETS / "style-words.safetensors"

# diffusers' UNet2DConditionModel arguments; Stable Diffusion 1.5's layout with two levels and one block per level
UNET_CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "block_out_channels": (96, 192),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
}
NOISE_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}


def read_base(part: str, path: Path = BASE_FILE) -> tuple[dict[str, Tensor], list[str]]:
    """One part of the embedded model's file: "unet", "text_encoder" or "autoencoder"; the others are not read.

    Returns:
        (the part's state dict in float32, the vocabulary of the text encoder).
    """
    with safe_open(path, framework="pt") as file:
        state = {
            key.removeprefix(f"{part}."): file.get_tensor(key).float()
            for key in file.keys()  # noqa: SIM118 - safe_open is no mapping
            if key.startswith(f"{part}.")
        }
        return state, json.loads(file.metadata()["vocabulary"])


def load_text_encoder(path: Path = BASE_FILE) -> TextEncoder:
    """The embedded model's text encoder, frozen. It knows the words of `data.STYLE_WORDS`, which the base has never met."""
    state, vocabulary = read_base("text_encoder", path)
    if unmet := [word for word in load_file(WORDS_FILE).items() if word[0] not in vocabulary]:
        words, rows = zip(*unmet, strict=True)
        vocabulary += words
        state["embedding.weight"] = torch.cat([state["embedding.weight"], torch.stack(rows)])
    return _frozen(TextEncoder(vocabulary), state)


def load_autoencoder(path: Path = BASE_FILE) -> Autoencoder:
    """The embedded model's autoencoder, frozen."""
    return _frozen(Autoencoder(), read_base("autoencoder", path)[0])


def build_unet() -> nn.Module:
    """The U-Net with fresh weights, a diffusers UNet2DConditionModel (needs the `demo` extra)."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNET_CONFIG)


def load_unet(style: str = BASE_STYLE, path: Path = BASE_FILE) -> nn.Module:
    """The embedded model's U-Net, frozen (needs the `demo` extra).

    Args:
        style: what it draws; see `read_unet`.
    """
    return _frozen(build_unet(), read_unet(style, path))


def read_unet(style: str = BASE_STYLE, path: Path = BASE_FILE) -> dict[str, Tensor]:
    """The U-Net's state dict, float32. For another style than the base's, the LoRA of that style is merged into it: a
    checkpoint like any other, which shares the base's text encoder.

    Raises:
        ValueError: an unknown style.
    """
    if style not in styles():
        raise ValueError(f"demo style {style!r}: expected one of {', '.join(styles())}")
    state = read_base("unet", path)[0]
    if style != BASE_STYLE:
        for name, layer in load_adapter(ADAPTERS / f"emoji-{style}-lora.safetensors").layers.items():
            state[f"{name}.weight"] += layer.delta().detach()
    return state


def _frozen(module: Module, state: dict[str, Tensor]) -> Module:
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


@torch.no_grad()
def sample(
    unet: nn.Module,
    context: Tensor,
    null_context: Tensor,
    *,
    seed: int,
    steps: int = 16,
    guidance: float = 3.0,
    size: int = UNET_CONFIG["sample_size"],
    callback: Callable[[int], None] | None = None,
) -> Tensor:
    """Sample latents with diffusers' DPM-Solver++ and classifier-free guidance.

    Args:
        unet: the diffusers U-Net, with or without an adapter attached.
        context, null_context: (B, 8, 128) and (1, 8, 128) from the text encoder.
        seed: seeds the initial noise; image k of the batch depends only on the seed and k.
        size: side of the latents, 8 for the 64x64 pixels the model was trained on.
        callback: called with the step index before every U-Net call.

    Returns:
        Latents (B, 16, size, size).
    """
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(**NOISE_SCHEDULE, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.stack([torch.randn(LATENT_CHANNELS, size, size, generator=generator) for _ in context])
    both = torch.cat([context, null_context.expand_as(context)])
    for k, t in enumerate(scheduler.timesteps):
        if callback is not None:
            callback(k)
        model_input = scheduler.scale_model_input(torch.cat([latents, latents]), t)
        positive, negative = unet(model_input, t, both).sample.chunk(2)
        latents = scheduler.step(negative + guidance * (positive - negative), t, latents).prev_sample
    return latents
