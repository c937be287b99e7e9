"""What a training run is told beyond its data and objective."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

FLOW_TIMES = ("logit-normal", "uniform")
SCHEDULES = ("constant", "cosine", "linear")
MEMORY_AUTO, MEMORY_OFF = "auto", "off"
MEMORY_SIZES = {"8 GB": 8, "12 GB": 12, "16 GB": 16, "24 GB and more": 24}
MEMORY = (MEMORY_AUTO, *MEMORY_SIZES, MEMORY_OFF)
OPTIMIZERS = ("adamw", "adamw8bit", "schedulefree", "prodigy")


def about(text: str) -> dict[str, str]:
    """What a field of a config means, as its metadata; config templates are made of it, line by line."""
    return {"about": text}


def check_choice(name: str, found: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError: not one of the choices."""
    _require(found in choices, name, f"one of {', '.join(choices)}", found)


@dataclass(frozen=True)
class TrainSettings:
    """The loop's settings; the paper's values are the defaults where it gives any.

    Raises:
        ValueError: a value out of its range; names it.
    """

    steps: int = field(default=1000, metadata=about("optimizer steps."))
    batch_size: int = field(default=1, metadata=about("images per forward pass and process."))
    accumulation: int = field(default=1, metadata=about("forward passes per optimizer step, their gradients averaged."))
    learning_rate: float = field(default=1e-4, metadata=about('the optimizer\'s; "prodigy" wants 1.'))
    schedule: str = field(default="constant", metadata=about('"constant", or "cosine" or "linear" down to 0 at the last step.'))
    warmup: int = field(default=0, metadata=about("steps over which the rate rises from 0."))
    optimizer: str = field(
        default="adamw",
        metadata=about(
            '"adamw", or one of a library that must be installed: "adamw8bit" (bitsandbytes), "schedulefree"\n'
            '(schedulefree), "prodigy" (prodigyopt).'
        ),
    )
    weight_decay: float = field(default=1e-2, metadata=about("the optimizer's."))
    clip: float = field(default=1.0, metadata=about("largest norm of the gradient over all parameters; 0 for none."))
    min_snr_gamma: float = field(
        default=0.0, metadata=about("weights samples by min(SNR, gamma), 5 as a rule; 0 leaves all alike.")
    )
    flow_times: str = field(
        default=FLOW_TIMES[0],
        metadata=about(
            'of flow models, which noise is trained: "logit-normal", most of it in the middle (arXiv 2403.03206), or\n'
            '"uniform"; either with the model\'s own shift.'
        ),
    )
    caption_dropout: float = field(
        default=0.1, metadata=about("share of captions replaced by the empty one, for classifier-free guidance.")
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata=about("keeps the inputs of blocks only and runs them again in the backward pass: slower, smaller."),
    )
    memory: str = field(
        default=MEMORY_AUTO,
        metadata=about(
            f"{', '.join(MEMORY)}. Where less is there than a training needs, it divides batches,\n"
            "turns on gradient_checkpointing, computes in bfloat16, makes an adapter smaller whose rank and styles are 0,\n"
            "uses adamw8bit where that is installed; and says so. auto reads the free memory, off changes nothing."
        ),
    )
    seed: int = field(default=0, metadata=about("of the adapter, the noise, and the order of the data."))
    checkpoint_every: int = field(default=1000, metadata=about("steps between checkpoints; 0 writes only the last."))
    sample_every: int = field(
        default=0, metadata=about("steps between validation pictures (of output.prompts, on the command line); 0 for none.")
    )
    validate_every: int = field(default=0, metadata=about("steps between measurements of the validation loss; 0 for none."))
    patience: int = field(
        default=0, metadata=about("stop after this many measurements without a better validation loss; 0 never does.")
    )

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        counts = ("warmup", "seed", "checkpoint_every", "sample_every", "validate_every", "patience")
        for name in (*counts, "clip", "weight_decay", "min_snr_gamma"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, name, "0 or more", value)
        rate = self.learning_rate
        _require(math.isfinite(rate) and rate > 0, "learning_rate", "a positive number", rate)
        _require(0 <= self.caption_dropout <= 1, "caption_dropout", "0 to 1", self.caption_dropout)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("flow_times", self.flow_times, FLOW_TIMES)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("memory", self.memory, MEMORY)
        _require(not (self.patience and not self.validate_every), "patience", "validate_every with it", self.validate_every)

    def rate(self, step: int) -> float:
        """The factor of the learning rate at a step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        match self.schedule:
            case "cosine":
                fall = 0.5 * (1 + math.cos(math.pi * step / self.steps))
            case "linear":
                fall = 1 - step / self.steps
            case _:
                fall = 1.0
        return rise * fall

    def result_fields(self) -> dict[str, Any]:
        """The settings that decide which adapter comes out; a resumed run must have the same.

        How often to save and look does not matter, nor where memory comes from, and a constant rate may go on for
        more steps.
        """
        free = {"checkpoint_every", "sample_every", "gradient_checkpointing", "memory"} | (
            {"steps"} if self.schedule == "constant" else set()
        )
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in free}


def _require(holds: bool, name: str, expected: str, found: Any) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, found {found!r}")
