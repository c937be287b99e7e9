"""From a reference image to tokens inside ComfyUI: vision encoder and Q-Formers, loaded as ComfyUI loads its models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from torch import Tensor

from ..styleinject_core.deadiff import Deadiff, Tokens, TokensError, load_deadiff, load_vision
from ..styleinject_core.deadiff.config import CLIP_L, ENCODERS
from ..styleinject_core.deadiff.file import check_vision
from ..styleinject_core.deadiff.ops import LayerOps
from ..styleinject_core.deadiff.vision import check_image, normalized, squash
from ..styleinject_core.demo.features import demo_features
from .patcher import ModelPatcher, wrap

OPS = LayerOps(comfy.ops.manual_cast.Linear, comfy.ops.manual_cast.LayerNorm)


@dataclass(eq=False)
class LoadedDeadiff:
    """A DEADiff file: its model, as ComfyUI manages models, and its vision encoder where the file has one.

    Args:
        patcher: around the `Deadiff`; loaded to encode, not needed while sampling.
        path: of the file.
    """

    patcher: ModelPatcher
    path: Path
    _vision: ModelPatcher | None = None

    @classmethod
    def load(cls, path: Path) -> LoadedDeadiff:
        """Raises DeadiffFileError."""
        return cls(_wrap(load_deadiff(path, OPS)), path)

    @property
    def model(self) -> Deadiff:
        model: Any = self.patcher.model
        return model

    def own_vision(self) -> ModelPatcher | None:
        """The file's vision encoder, read the first time it is needed; None where it has none."""
        if self._vision is None and (tower := load_vision(self.path, OPS)) is not None:
            self._vision = _wrap(tower)
        return self._vision

    def features(self, image: Tensor, mask: Tensor | None, clip_vision: Any = None) -> Tensor:
        """What the vision encoder makes of reference images.

        Args:
            image: (R, H, W, 3) in [0, 1].
            mask: (R or 1, h, w), what to look at; or None.
            clip_vision: a CLIP_VISION; may be None where the file, or the pack, has the encoder.

        Returns:
            (R, vision_tokens, vision_width).

        Raises:
            ValueError: no vision encoder, or another one than the model was trained with.
            TokensError: no image, NaN values, or a mask that does not fit or is empty.
        """
        check_image(image)
        if self.model.config.encoder != CLIP_L:
            return demo_features(image, mask)
        if clip_vision is not None:
            return _clip_features(self.model, clip_vision, squash(image, mask))
        vision = self.own_vision()
        if vision is None:
            raise ValueError(
                f"{self.model.name} needs a vision encoder: load {ENCODERS[CLIP_L]} (openai/clip-vit-large-patch14) with Load "
                "CLIP Vision, and connect it to clip_vision"
            )
        comfy.model_management.load_models_gpu([vision])
        return vision.model(normalized(squash(image, mask)).to(vision.load_device))

    def encode(
        self, image: Tensor, streams: tuple[str, ...], mask: Tensor | None = None, clip_vision: Any = None
    ) -> list[Tokens]:
        """The tokens of each of these streams, a set per image; see `features`."""
        bar = comfy.utils.ProgressBar(1 + len(streams))
        features = self.features(image, mask, clip_vision)
        bar.update(1)
        comfy.model_management.load_models_gpu([self.patcher])
        tokens = []
        for stream in streams:
            comfy.model_management.throw_exception_if_processing_interrupted()
            tokens.append(self.model.encode(features.to(self.patcher.load_device), stream))
            bar.update(1)
        return tokens


def _clip_features(model: Deadiff, clip_vision: Any, pixels: Tensor) -> Tensor:
    """penultimate_hidden_states of a CLIP_VISION: 23 of ViT-L's 24 blocks, before any norm."""
    try:
        embedding = clip_vision.model.vision_model.embeddings.class_embedding
    except AttributeError:
        raise ValueError(
            f"this vision encoder is not a CLIP model; {model.name} was trained with {ENCODERS[CLIP_L]} "
            "(openai/clip-vit-large-patch14)"
        ) from None
    check_vision(model, embedding)
    features = clip_vision.encode_image(pixels, crop=False)["penultimate_hidden_states"]
    expected = (model.config.vision_tokens, model.config.vision_width)
    if tuple(features.shape[1:]) != expected:
        found = " x ".join(map(str, features.shape[1:]))
        raise TokensError(
            f"this vision encoder returns {found} numbers an image, {model.name} was trained with one that returns "
            f"{expected[0]} x {expected[1]}: {ENCODERS[CLIP_L]} for images of 224 pixels"
        )
    return features


def _wrap(module: torch.nn.Module) -> ModelPatcher:
    """As ComfyUI has it for vision and text encoders."""
    management = comfy.model_management
    return wrap(module, management.text_encoder_device(), management.text_encoder_offload_device())
