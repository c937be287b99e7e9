"""What training needs from a model, whatever program it lives in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...adapter import Adapter, host_shapes
from ...attach import Applied, Attachment
from ...call import CurrentCall
from ...layer_names import is_block
from ...layers import LayerShape
from ..data.batches import Conditioning, tensors_hash, weights_hash
from ..data.buckets import Size
from .noise import DiscreteSchedule, NoiseSchedule


class TrainingModel(ABC):
    """A frozen model with an adapter's place in it.

    Args:
        denoiser: the U-Net (or DiT), whose layers adapters name.
        schedule: its training noise and what it predicts.
    """

    def __init__(self, denoiser: nn.Module, schedule: NoiseSchedule):
        self.denoiser, self.schedule = denoiser, schedule

    @property
    def is_float16(self) -> bool:
        """Whether it computes in float16."""
        return next(self.denoiser.parameters()).dtype == torch.float16

    @property
    def device(self) -> torch.device:
        """Where it computes, and where noise and losses are."""
        return next(self.denoiser.parameters()).device

    @property
    def whole(self) -> nn.Module:
        """All that a prediction runs, the denoiser in it."""
        return self.denoiser

    @property
    def latent_space(self) -> tuple[Any, ...]:
        """What its latents are; models whose latents are the same have the same. Empty where that is not known."""
        return ()

    @cached_property
    def fingerprint(self) -> str:
        """Tells frozen models apart, for recognizing a run's."""
        return weights_hash(self.denoiser.parameters())

    @property
    def sampling(self) -> dict[str, Any]:
        """What decides a loss beside the denoiser's weights, for recognizing a run's: JSON values."""
        known: dict[str, Any] = {"prediction_type": self.schedule.prediction_type}
        if isinstance(self.schedule, DiscreteSchedule):
            known["schedule"] = tensors_hash([self.schedule.alphas_cumprod])
        return known

    def attachment(self, adapter: Adapter) -> Attachment:
        """The adapter matched to the denoiser. Raises AdapterMismatchError."""
        return Attachment(self.denoiser, [Applied(adapter)])

    def layer_shapes(self) -> dict[str, LayerShape]:
        """Every layer that can be adapted, by the name that adapters call it by."""
        return host_shapes(self.denoiser)

    def text(self, conditioning: Conditioning) -> Tensor | None:
        """The text conditioning that routers may read, (B, L, c), of what `predict` is given; None where there is none."""
        text = conditioning.get("context")
        return text if isinstance(text, Tensor) else None

    def current_calls(self) -> list[CurrentCall]:
        """The calls that layers of adapters are in. In a block that runs again in the backward pass they are as they were."""
        return []

    @abstractmethod
    def predict(self, noisy: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """The prediction at z_t, of the schedule's type; (B, C, H, W)."""

    def blocks(self) -> dict[str, nn.Module]:
        """The blocks whose features teacher and student are compared by, and that are checkpointed."""
        return {name: module for name, module in self.denoiser.named_modules() if is_block(name)}

    def in_place_blocks(self) -> set[str]:
        """Those of the blocks that may write into their inputs, as nothing in them keeps these for the backward pass."""
        return set()


class TextToImageModel(TrainingModel):
    """A training model with its encoders: it takes pictures and captions.

    Args:
        name: what to call it in messages and in the adapter's metadata; no path.
    """

    architecture = "unknown"  # as in ModelSpec's field
    may_be_bfloat16 = False  # whether its denoiser can be brought to bfloat16, and gains by it
    pixels_per_latent = 8

    def __init__(self, denoiser: nn.Module, schedule: NoiseSchedule, name: str):
        super().__init__(denoiser, schedule)
        self.name = name

    @property
    def about(self) -> str:
        """What it predicts under which noise, and who says so, in words."""
        return f"predicts {self.schedule.prediction_type}"

    @property
    def sampling(self) -> dict[str, Any]:
        return {**super().sampling, "latents": list(self.latent_space), "encoders": self._encoders_fingerprint}

    @cached_property
    def _encoders_fingerprint(self) -> str:
        weights = weights_hash(parameter for encoder in self.encoders() for parameter in encoder.parameters())
        return tensors_hash([weights, self.reading()]) if self.reading() else weights

    def reading(self) -> list[Any]:
        """What beside the encoders' weights decides what they make: how a text becomes tokens, as numbers and strings."""
        return []

    def encoders(self) -> list[nn.Module]:
        """What makes latents of pictures and conditioning of captions."""
        return []

    def size_conditioning(self, original: Size, crop: Size, size: Size) -> Conditioning:
        """What it is told about an image beside its caption, a row; nothing as a rule.

        Args:
            original: (H, W) of the image file; crop: pixels cut off at the top and at the left once it is scaled.
            size: (H, W) of what it sees.
        """
        return {}

    def length(self, caption: str) -> tuple[int, int] | None:
        """How many tokens a caption has, and how many are read; None where that is not known."""
        return None

    @property
    def latent_space(self) -> tuple[Any, ...]:
        return (type(self).__name__,)

    def spare_encoders(self) -> None:
        """Keep the encoders in RAM from now on, but for the time they are used, where they are large."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> latents."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> (B, 3, H, W) in [-1, 1]."""

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts -> conditioning, a row each."""

    @abstractmethod
    def sample(self, prompts: Sequence[str], resolution: int, seed: int, steps: int = 20, guidance: float = 5.0) -> Tensor:
        """Latents of one square picture per prompt, with classifier-free guidance; seed + k seeds picture k."""
