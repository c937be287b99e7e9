"""Images that a model draws: those it is trained on, and those that show how far training is."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import torch
from torch import Tensor

from ...styleinject_core.train.data.batches import tensors_hash
from ...styleinject_core.train.data.drawn import draw_once
from ...styleinject_core.train.request import Drawing
from .. import paths
from ..patcher import ModelPatcher
from .graph_inputs import Encoder, Prompt
from .graph_model import GraphModel

DRAWN = "drawn"  # in output/styleinject: latents that models drew for training, kept for the next run


def draw(
    patcher: ModelPatcher,
    prompts: Sequence[Prompt],
    empty: Prompt | None,
    shape: Sequence[int],
    *,
    seed: int,
    steps: int,
    guidance: float,
) -> Tensor:
    """Sample one latent per prompt; seed + k seeds number k.

    Args:
        empty: the negative prompt; without one there is no guidance.
        shape: of a latent, (C, ..., H, W).

    Returns:
        (N, C, ..., H, W), float32 on the CPU, in the scale of the VAE.
    """

    def interruptible(*_: Any) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    found = []
    with torch.inference_mode():
        blank = Encoder(patcher).framed(torch.zeros(*shape)).unsqueeze(0)
        for k, prompt in enumerate(prompts):
            latent = comfy.sample.sample(
                patcher,
                comfy.sample.prepare_noise(blank, seed + k),
                steps,
                guidance if empty is not None else 1.0,
                "euler",
                "simple",
                [list(prompt)],
                [list(empty or prompt)],
                blank,
                callback=interruptible,
                disable_pbar=True,
                seed=seed + k,
            )
            found.append(latent.float().cpu())
    with torch.inference_mode(False):
        return torch.cat(found).clone()


def drawn_for_training(
    model: GraphModel, prompts: Sequence[Prompt], shape: Sequence[int], seed: int, drawing: Drawing
) -> list[Tensor]:
    """Latents that a model draws, one per prompt; drawn once, and kept for other runs with the same ones.

    Args:
        shape: of a latent, (C, ..., H, W).

    Returns:
        (C, ..., H, W) each, in the scale of the VAE.
    """
    settings = [list(shape), seed, drawing.steps, drawing.guidance]
    empty_hash = prompts_hash([model.empty] if model.empty else [])
    depends_on = f"{model.network.fingerprint}/{prompts_hash(prompts)}/{empty_hash}/{settings}"
    name = f"{hashlib.blake2b(depends_on.encode(), digest_size=12).hexdigest()}.latents"

    def draw_some(start: int, stop: int) -> Tensor:
        some = prompts[start:stop]
        return draw(model.patcher, some, model.empty, shape, seed=seed + start, steps=drawing.steps, guidance=drawing.guidance)

    return draw_once(
        paths.trained_folder() / DRAWN / name,
        len(prompts),
        draw_some,
        progress=comfy.utils.ProgressBar(len(prompts)).update_absolute,
        problem=lambda text: logging.warning("StyleInject training: %s", text),
    )


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """A fingerprint of prompts and of all that belongs to them: pooled outputs, sizes, guidance."""
    tensors, texts = [], []
    for tensor, extras in prompts:
        tensors.append(tensor)
        for key, value in sorted(extras.items()):
            if isinstance(value, Tensor):
                tensors.append(value)
            else:
                texts.append(f"{key}: {value!r}")
    return hashlib.blake2b(f"{tensors_hash(tensors)} {texts}".encode(), digest_size=8).hexdigest()
