"""What most users leave alone in training: values whose defaults are also what trains without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from ...styleinject_core.train.request import AdapterRequest, Drawing, TrainingRequest, check_name
from ...styleinject_core.train.settings import TrainSettings
from .graph_inputs import Prompt
from .named_runs import GO_ON


@dataclass(frozen=True)
class TrainOptions:
    """See the tooltips of StyleInjectTrainOptions. The defaults are the core's, as on the command line.

    Args:
        validate_every: counts where images are held out only, and so may have a default.
        vae: what decodes the pictures drawn while it trains; None for no pictures.
        pictured: the prompts they are drawn from; empty for the first one of the training data.
    """

    seed: int = TrainSettings.seed
    existing_run: str = GO_ON
    accumulation: int = TrainSettings.accumulation
    optimizer: str = TrainSettings.optimizer
    schedule: str = TrainSettings.schedule
    warmup: int = TrainSettings.warmup
    weight_decay: float = TrainSettings.weight_decay
    clip: float = TrainSettings.clip
    min_snr_gamma: float = TrainSettings.min_snr_gamma
    caption_dropout: float = TrainSettings.caption_dropout
    gradient_checkpointing: bool = TrainSettings.gradient_checkpointing
    checkpoint_every: int = TrainSettings.checkpoint_every
    picture_every: int = TrainSettings.sample_every
    validation_images: int = TrainingRequest.held_out
    validate_every: int = 50
    patience: int = TrainSettings.patience
    alpha: float = AdapterRequest.alpha
    router_pool: str = AdapterRequest.router_pool
    router_input: str = AdapterRequest.router_input
    sta: str = AdapterRequest.sta
    sampling_steps: int = Drawing.steps
    guidance: float = Drawing.guidance
    dtype: str = TrainingRequest.dtype
    vae: Any = None
    pictured: Sequence[Prompt] = ()
    factors: tuple[int, ...] = AdapterRequest.factors
    tokens: str = AdapterRequest.tokens
    flow_times: str = TrainSettings.flow_times

    @property
    def drawing(self) -> Drawing:
        """How pictures are drawn, and images for training."""
        return Drawing(self.sampling_steps, self.guidance)

    def request(
        self,
        *,
        name: str,
        method: str,
        steps: int,
        learning_rate: float,
        batch_size: int,
        rank: int,
        styles: int,
        layers: str,
        memory: str = TrainSettings.memory,
    ) -> TrainingRequest:
        """The core's request, from these and from the widgets that all training nodes have.

        Raises:
            ValueError: a value out of its range.
        """
        shared = {f.name for f in fields(TrainSettings)} & {f.name for f in fields(self)}
        values: dict[str, Any] = {field: getattr(self, field) for field in shared}
        if not self.validation_images:
            values |= {"validate_every": 0, "patience": 0}
        settings = TrainSettings(
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            memory=memory,
            sample_every=self.picture_every if self.vae is not None else 0,
            **values,
        )
        adapter = AdapterRequest(
            method=method,
            rank=rank,
            styles=styles,
            alpha=self.alpha,
            targets=tuple(term.strip() for term in layers.split(",") if term.strip()),
            factors=self.factors,
            router_pool=self.router_pool,
            router_input=self.router_input,
            sta=self.sta,
            tokens=self.tokens,
        )
        return TrainingRequest(
            name=check_name(name), adapter=adapter, settings=settings, held_out=self.validation_images, dtype=self.dtype
        )
