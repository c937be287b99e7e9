"""Watching a run: a progress bar, the loss as a picture, validation pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...colors import BLUE, ORANGE, SKY
from ...files.atomic import replacing
from .loop import Observer, Progress

if TYPE_CHECKING:
    from typing_extensions import Self


class ProgressBar(Observer):
    """A line in the terminal with the loss (a running mean), the rate and the time left; a context manager.

    Args:
        steps: of the whole run.
        start: steps done already.
    """

    def __init__(self, steps: int, start: int = 0):
        from tqdm import tqdm

        self.bar: Any = tqdm(total=steps, initial=start, unit="step")
        self.mean: float | None = None

    def progress(self, progress: Progress) -> None:
        self.mean = progress.loss if self.mean is None else 0.95 * self.mean + 0.05 * progress.loss
        postfix = {"loss": f"{self.mean:.4f}", "rate": f"{progress.rate:.1e}"}
        if progress.validation is not None:
            self.bar.write(f"step {progress.step}: validation loss {progress.validation:.4f}")
        self.bar.set_postfix(postfix, refresh=False)
        self.bar.update(progress.step - self.bar.n)

    def problem(self, message: str) -> None:
        self.bar.write(f"warning: {message}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bar.close()


def loss_figure(title: str, losses: Sequence[float], validation: Sequence[tuple[int, float]] = ()) -> Any:
    """Every step's loss, its running mean, and the validation losses: a matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need a package: pip install matplotlib") from error
    figure = Figure(figsize=(6.4, 3.6), dpi=130, facecolor="white", layout="constrained")
    axis = figure.add_subplot()
    steps = range(1, len(losses) + 1)
    means = running_mean(losses)
    axis.plot(steps, losses, color=SKY, linewidth=0.7, alpha=0.7, label="each step")
    axis.plot(steps, means, color=BLUE, linewidth=2, label="running mean")
    if validation:
        axis.plot(*zip(*validation, strict=True), color=ORANGE, marker="o", markersize=4, linewidth=1.5, label="validation")
    axis.set_title(title, parse_math=False)
    axis.set(xlabel="training step", ylabel="loss")
    finite = sorted(v for v in losses if math.isfinite(v))
    if finite and min(finite) > 0 and finite[-1] > 20 * finite[len(finite) // 2]:
        axis.set_yscale("log")  # a few steps far above the rest
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    return figure


def figure_pixels(figure: Any) -> Tensor:
    """A matplotlib figure as pixels, (H, W, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    return pixels.view(height, width, 4)[..., :3]


def running_mean(losses: Sequence[float]) -> list[float]:
    """The mean of the latest tenth of the steps so far, 50 at most."""
    means, total, start = [], 0.0, 0
    for k, loss in enumerate(losses):
        total += loss
        while k + 1 - start > max(1, min(50, (k + 1) // 10)):
            total -= losses[start]
            start += 1
        means.append(total / (k + 1 - start))
    return means


def loss_plot(path: Path, title: str, losses: Sequence[float], validation: Sequence[tuple[int, float]] = ()) -> None:
    """Write the loss as a PNG, whole or not at all."""
    with replacing(path) as temporary:
        loss_figure(title, losses, validation).savefig(temporary, format="png")


def side_by_side(pictures: Sequence[Tensor]) -> tuple[Tensor, str]:
    """Pictures in a row, as they are saved and shown.

    Args:
        pictures: (H, W, 3) each, in [0, 1].

    Returns:
        (H, N W, 3) uint8, and which of them are no pictures, in words; empty where all are.
    """
    broken = [str(k) for k, picture in enumerate(pictures, 1) if not torch.isfinite(picture).all()]
    pixels = torch.cat([(picture.nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8) for picture in pictures], dim=1)
    said = (
        f"{len(broken)} of {len(pictures)} (number {', '.join(broken)}) came out as NaN or infinite numbers, drawn black: "
        "the model or its VAE gives them, as some do in float16"
    )
    return pixels, said if broken else ""


def save_picture(pixels: Tensor, path: Path) -> None:
    """Write (H, W, 3) uint8 as a PNG, whole or not at all. Raises WriteError."""
    from PIL import Image

    with replacing(path) as temporary:
        Image.fromarray(pixels.contiguous().numpy()).save(temporary, format="png")
