"""The demo's pictures: image grids with labels, and the router over the sampling steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..colors import GRID, INK, PAPER, STYLE_COLORS, VERMILION
from ..files.atomic import replacing


def _figure(width: float, height: float):
    """An empty matplotlib figure that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, facecolor=PAPER)


def _save(figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight", pad_inches=0.15)


def grid(
    path: Path,
    title: str,
    rows: Sequence[tuple[str, Tensor]],
    columns: Sequence[str],
    marked: Sequence[bool],
    note: str = "Orange: concepts the adapter never saw in this style.",
) -> None:
    """Rows of images under column titles.

    Args:
        rows: (label, images (N, 3, H, W) in [-1, 1]) per row.
        columns: N column titles; `marked` ones are set in color and explained below, by `note`.
    """
    count = len(columns)
    height = 0.85 * len(rows) + 1.0
    figure = _figure(0.85 * count + 1.6, height)
    place = {"wspace": 0.05, "hspace": 0.05, "top": 1 - 0.65 / height, "bottom": 0.6 / height}
    axes = figure.subplots(len(rows), count, squeeze=False, gridspec_kw=place)
    for row, (label, images) in zip(axes, rows, strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(((image.permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy(), interpolation="lanczos")
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_color(GRID)
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9, color=INK, labelpad=8)
    for axis, name, mark in zip(axes[0], columns, marked, strict=True):
        wrapped = name.replace(" ", "\n", 1)
        axis.set_title(wrapped, fontsize=8, color=VERMILION if mark else INK, fontweight="bold" if mark else "normal")
    figure.suptitle(title, fontsize=11, color=INK, y=1.0)
    if any(marked):
        figure.text(0.5, 0.25 / height, note, ha="center", fontsize=8, color=VERMILION)
    _save(figure, path)


def router_over_steps(path: Path, title: str, probabilities: Tensor, labels: Sequence[str], styles: Sequence[str]) -> None:
    """Style probabilities over the sampling steps, stacked, one panel per part of the model.

    Args:
        probabilities: (panels, steps, n), rows sum to 1.
        labels: a title per panel.
        styles: a name per style.
    """
    panels, steps, _ = probabilities.shape
    figure = _figure(3.1 * panels, 3.2)
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for axis, panel, label in zip(axes, probabilities, labels, strict=True):
        colors = [STYLE_COLORS[k % len(STYLE_COLORS)] for k in range(len(styles))]
        axis.stackplot(range(1, steps + 1), panel.T.numpy(), colors=colors, labels=list(styles))
        axis.set(xlabel="sampling step", xlim=(1, steps), ylim=(0, 1))
        axis.set_title(label, fontsize=8)
    axes[0].set_ylabel("probability s")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=len(styles), frameon=False, bbox_to_anchor=(0.5, -0.16))
    figure.suptitle(title, fontsize=11, color=INK, y=1.04)
    _save(figure, path)
