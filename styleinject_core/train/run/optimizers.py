"""Optimizers by name: PyTorch's AdamW, and those of libraries that may be installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..settings import TrainSettings


def make_optimizer(parameters: Iterable[nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer that the settings name.

    Raises:
        ImportError: its library is not installed; says how to install it.
    """
    arguments: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    try:
        match settings.optimizer:
            case "adamw8bit":
                from bitsandbytes.optim import AdamW8bit

                return AdamW8bit(parameters, **arguments)
            case "schedulefree":
                from schedulefree import AdamWScheduleFree

                optimizer = AdamWScheduleFree(parameters, warmup_steps=settings.warmup, **arguments)
                optimizer.train()
                return optimizer
            case "prodigy":
                from prodigyopt import Prodigy

                return Prodigy(parameters, safeguard_warmup=settings.warmup > 0, **arguments)
            case _:
                return torch.optim.AdamW(parameters, **arguments)
    except ImportError as error:
        package = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}.get(settings.optimizer, settings.optimizer)
        raise ImportError(f'optimizer "{settings.optimizer}" needs a package: pip install {package}') from error


def set_rate(optimizer: torch.optim.Optimizer, settings: TrainSettings, step: int) -> float:
    """Set the learning rate of a step; returns it. A schedule-free optimizer warms up by itself."""
    rate = settings.learning_rate * (1.0 if settings.optimizer == "schedulefree" else settings.rate(step))
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


@contextmanager
def evaluating(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Parameters as they are to be used and saved, for the length of a with block: schedule-free optimizers train on
    others, which come back bit for bit."""
    if not hasattr(optimizer, "eval"):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p.detach().clone() for p in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter, value in zip(parameters, trained, strict=True):
                parameter.copy_(value)
