"""Images that a model draws before it is trained on: drawn once, kept in a file, and continued after an interrupt."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ...files.checked import load_checked, save_checked

SAVE_EVERY = 60.0  # seconds


def kept_latents(path: Path) -> list[Tensor]:
    """The latents in a file of drawn ones, (C, ..., H, W) each; none where there is no such file, or a damaged one."""
    return list((load_checked(path) or {}).get("latents", ()))


def draw_once(
    path: Path,
    count: int,
    draw: Callable[[int, int], Tensor],
    *,
    at_once: int = 1,
    progress: Callable[[int], None] = lambda _there: None,
    problem: Callable[[str], None] | None = None,
) -> list[Tensor]:
    """The latents of `count` images: those that the file has, then new ones, which are added to it.

    Args:
        path: named after all that the images depend on.
        draw: (start, stop) -> latents of the images from start to stop, (stop - start, C, ..., H, W).
        at_once: how many are drawn together.
        progress: told how many there are, at first and after each draw.
        problem: told that the file cannot be written; by default that is an error.

    Returns:
        (C, ..., H, W) each, on the CPU.

    Raises:
        OSError: the file cannot be written. What was drawn before an error or an interrupt is kept.
    """
    latents = kept_latents(path)
    saved, saved_at = len(latents), time.monotonic()

    def save() -> None:
        nonlocal saved, saved_at
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_checked({"latents": torch.stack(latents)}, path)
        except OSError as error:
            if problem is None:
                raise
            problem(f"images drawn for training are not kept: {error}")
        saved, saved_at = len(latents), time.monotonic()

    progress(len(latents))
    try:
        for start in range(len(latents), count, at_once):
            latents.extend(draw(start, min(start + at_once, count)).cpu())
            progress(len(latents))
            if time.monotonic() - saved_at > SAVE_EVERY:
                save()
    finally:
        if len(latents) > saved:
            save()
    return latents
