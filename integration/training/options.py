"""What most users leave alone in training: values whose defaults are also what trains without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from ...styleinject_core.train.settings import TrainSettings
from .graph_inputs import Prompt

GO_ON, MUST_GO_ON, NEW = "go on or new", "go on", "new"
DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class TrainOptions:
    """See the tooltips of StyleInjectTrainOptions.

    Args:
        vae: what decodes the pictures drawn while it trains; None for no pictures.
        pictured: the prompts they are drawn from; empty for the first one of the training data.
    """

    seed: int = 0
    existing_run: str = GO_ON
    accumulation: int = 1
    optimizer: str = "adamw"
    schedule: str = "constant"
    warmup: int = 0
    weight_decay: float = 0.01
    clip: float = 1.0
    min_snr_gamma: float = 0.0
    caption_dropout: float = 0.1
    gradient_checkpointing: bool = False
    checkpoint_every: int = 500
    picture_every: int = 0
    validation_images: int = 0
    validate_every: int = 50
    patience: int = 0
    alpha: float = 0.0
    router_pool: str = "mean"
    sta: str = "multiplicative"
    sampling_steps: int = 20
    guidance: float = 5.0
    dtype: str = "float16"
    vae: Any = None
    pictured: Sequence[Prompt] = ()

    def settings(self, *, steps: int, batch_size: int, learning_rate: float) -> TrainSettings:
        """The core's settings. Raises ValueError: a value out of its range."""
        names = {f.name for f in fields(TrainSettings)} & {f.name for f in fields(self)}
        own = {name: getattr(self, name) for name in names}
        if not self.validation_images:
            own |= {"validate_every": 0, "patience": 0}
        sample_every = self.picture_every if self.vae is not None else 0
        return TrainSettings(steps, batch_size, learning_rate=learning_rate, sample_every=sample_every, **own)
