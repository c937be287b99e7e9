"""The training loop: AdamW on the adapter's parameters, everything else frozen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and why."""


@dataclass(frozen=True)
class TrainSettings:
    """What the loop needs beyond the loss.

    Args:
        steps: optimiser steps.
        learning_rate: AdamW's, after `warmup` steps of linear rise; it falls to 0 along a cosine where `decay` is set.
        clip: largest norm of the gradient over all parameters.
    """

    steps: int
    learning_rate: float = 1e-4
    warmup: int = 0
    decay: bool = False
    weight_decay: float = 1e-2
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, found {self.steps}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate: expected a positive number, found {self.learning_rate}")

    def rate(self, step: int) -> float:
        """The factor of the learning rate at a step."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        fall = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.decay else 1.0
        return rise * fall


def train(
    module: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    settings: TrainSettings,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Minimise a loss over a module's trainable parameters.

    Args:
        module: its parameters that require gradients are trained.
        loss_of_step: step -> scalar loss, drawing its own batch and noise.
        on_step: called after every step with the steps done and the loss.

    Returns:
        The loss of every step.

    Raises:
        TrainingError: a loss that is NaN or Inf; the parameters are those of the last good step.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.rate)
    losses: list[float] = []
    with torch.enable_grad():
        for step in range(settings.steps):
            loss = loss_of_step(step)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise TrainingError(f"the loss became {value} at step {step + 1} of {settings.steps}: lower the learning rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            schedule.step()
            losses.append(value)
            if on_step is not None:
                on_step(step + 1, value)
    return losses
