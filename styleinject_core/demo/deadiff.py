"""DEADiff in miniature: the embedded model that draws five styles, and the references that tell it which.

Stable Diffusion knows every style; the demo's base knows one. So there is a second base, tuned on the drawings of all five
artists, with a word for each style (`scripts/demo/train_deadiff_base.py`), and a DEADiff of it (`train_deadiff.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..deadiff import Deadiff, DeadiffConfig, Reference, load_deadiff
from ..deadiff.config import DEMO_ENCODER
from ..deadiff.inject import referenced
from ..hosts.architectures import ARCHITECTURES
from ..train.objectives.reference import PairedImages
from . import data
from .features import TOKENS, WIDTH, trunk_features
from .model import UNET_CONFIG, build_unet, load_autoencoder, load_text_encoder, read_base, sample
from .text import LENGTH, TextEncoder
from .training import DemoTrainingModel

BASE_FILE = data.ASSETS / "deadiff-base.safetensors"
FIVE_STYLES = "five styles"  # the model's name among the demo's
DEADIFF_FILE = data.DEADIFFS / "emoji-deadiff.safetensors"
_CONTEXT = UNET_CONFIG["cross_attention_dim"]


def _layers() -> tuple[tuple[str, int], ...]:
    """The demo's cross-attentions in forward order, with their widths."""
    shapes = ARCHITECTURES["demo"].shapes()
    return tuple(
        (name.removesuffix(".to_k"), shape.out_features) for name, shape in shapes.items() if name.endswith("attn2.to_k")
    )


# 2 x 1.35 M parameters and 0.27 M in i_to. The layers by SD's analogy: content where the image is smallest (4x4 places).
DEMO_CONFIG = DeadiffConfig(
    base=ARCHITECTURES["demo"].modelspec,
    width=_CONTEXT,
    depth=3,
    heads=4,
    feed_forward=512,
    queries=4,
    words=1,
    context=_CONTEXT,
    text_tokens=LENGTH,
    encoder=DEMO_ENCODER,
    vision_tokens=TOKENS,
    vision_width=WIDTH,
    layers=_layers(),
    content_layers=(1, 2, 3),
)


def new_deadiff(config: DeadiffConfig = DEMO_CONFIG, seed: int = 0, name: str = "emoji-deadiff") -> Deadiff:
    """An untrained one: torch's initial weights, queries and words as BERT's embeddings."""
    torch.manual_seed(seed)
    model = Deadiff(config, name=name)
    for name, parameter in model.streams.named_parameters():
        if name.endswith(("qformer.queries", "qformer.text")):
            nn.init.normal_(parameter, std=0.02)
    return model


@cache
def style_words() -> dict[str, str]:
    """Each style's word in the five-style model's prompts."""
    with safe_open(BASE_FILE, framework="pt") as file:
        return json.loads(file.metadata()["style_words"])


def load_five_styles(path: Path = BASE_FILE) -> tuple[nn.Module, TextEncoder]:
    """The U-Net (needs the `demo` extra) and the text encoder of the five-style model, frozen."""
    unet = build_unet()
    unet.load_state_dict(read_base("unet", path)[0])
    return unet.eval().requires_grad_(False), load_text_encoder(path)


def five_style_training(path: Path = BASE_FILE) -> DemoTrainingModel:
    """The five-style model as training wants it."""
    unet, text_encoder = load_five_styles(path)
    return DemoTrainingModel(unet, text_encoder, load_autoencoder(), f"demo:{FIVE_STYLES}")


def paired_images(model: DemoTrainingModel, held_out: bool, words: dict[str, str] | None = None) -> PairedImages:
    """The drawings of every style, of the things that are held out or of the others.

    Args:
        words: a word for each style; None takes the shipped base's.
    """
    words = words or style_words()
    chosen = [k for k, concept in enumerate(data.concepts()) if concept.held_out == held_out]
    names, styles = [data.concepts()[k].name for k in chosen], data.styles()
    drawings = torch.cat([data.images(style)[chosen] for style in styles])  # (S · N, 3, 64, 64)
    return PairedImages(
        torch.cat([model.encode(part) for part in drawings.split(256)]),
        torch.cat([trunk_features(part) for part in drawings.split(256)]),
        [style for style in styles for _ in chosen],
        [name for _ in styles for name in names],
        model.encode_text(names * len(styles)),
        model.encode_text([words[style] for style in styles for _ in chosen]),
        model.encode_text([""]),
    )


@torch.no_grad()
def draw(
    unet: nn.Module,
    text_encoder: TextEncoder,
    prompts: Sequence[str],
    model: Deadiff | None = None,
    style: Tensor | None = None,
    content: Tensor | None = None,
    *,
    seed: int = 0,
    weight: float = 1.0,
    steps: int = 12,
    guidance: float = 3.0,
) -> Tensor:
    """One drawing per prompt, each with references of its own.

    Args:
        style, content: features (N, 64, 128) of a reference for each prompt; None leaves the stream idle.
        weight: of both streams.

    Returns:
        Latents (N, 16, 8, 8).
    """
    context, null = text_encoder(list(prompts)), text_encoder([""])
    if model is None:
        return sample(unet, context, null, seed=seed, steps=steps, guidance=guidance)
    style_tokens = None if style is None else model.encode(style, "style")
    content_tokens = None if content is None else model.encode(content, "content")
    reference = Reference(model, style_tokens, content_tokens, weight, weight)
    with referenced(unet, reference, roles=("positive", "negative")):
        return sample(unet, context, null, seed=seed, steps=steps, guidance=guidance)


def load_emoji_deadiff() -> Deadiff:
    """The DEADiff of the five-style model."""
    return load_deadiff(DEADIFF_FILE)
