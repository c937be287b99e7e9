"""The look that all pictures of the router share, and the one place of this package that imports matplotlib.

Sized for a node in a graph, 800 pixels wide. Colors can be told apart by color-blind readers: colors.py for styles
(hatched from the ninth on), viridis for amounts. Whatever comes from a file is written as plain text, never as mathtext.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..colors import ALERT, EMPTY, FAINT, FRAME, INK, PAPER, STYLE_COLORS
from ..files.atomic import replacing

_HATCHES = ("", "////", "....", "xxxx")
WIDTH, DPI = 8.0, 100
_RC: Any = {
    "text.parse_math": False,
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.edgecolor": FRAME,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
}


_OTHER_SCRIPTS = (
    *(f"{noto} CJK {place}" for place in ("SC", "JP", "KR", "TC") for noto in ("Noto Sans", "Noto Serif")),
    *("Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback"),
    *("Microsoft YaHei", "Yu Gothic", "Meiryo", "Malgun Gothic", "SimHei"),  # Windows
    *("PingFang SC", "PingFang HK", "Hiragino Sans", "Hiragino Sans GB", "Apple SD Gothic Neo", "Arial Unicode MS"),  # macOS
)


class MissingPackageError(ImportError):
    """An optional package is not installed; the message says how to install it."""


@contextmanager
def look() -> Iterator[None]:
    """matplotlib's settings for our pictures, whatever the user's are. Raises MissingPackageError."""
    try:
        import matplotlib
    except ImportError:
        raise MissingPackageError("the router's pictures need matplotlib: pip install matplotlib") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        matplotlib.rcParams["font.family"] = ["DejaVu Sans", *_fonts_of_other_scripts()]
        yield


@cache
def _fonts_of_other_scripts() -> list[str]:
    """Those of these fonts that are installed: for letters that matplotlib's own has not got."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return [name for name in _OTHER_SCRIPTS if name in installed]


def picture(draw: Callable[..., Any]) -> Callable[..., Tensor]:
    """Make a function that returns a matplotlib figure one that returns its pixels, (H, W, 3) in [0, 1]."""

    @wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> Tensor:
        with look():
            return _pixels(draw(*args, **kwargs))

    return drawn


def figure(height: float, title: str, subtitle: str = "", alert: str = "") -> Any:
    """An empty figure with its title, what is shown, and what the reader must know, at the top."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=PAPER, layout="constrained")
    layout: Any = drawn.get_layout_engine()
    layout.set(rect=(0.01, 0.01, 0.98, 0.98 - (0.58 + 0.22 * bool(alert)) / height))
    drawn.text(0.5, 1 - 0.12 / height, shortened(title, 74), ha="center", va="top", fontsize=14, fontweight="bold")
    drawn.text(0.5, 1 - 0.39 / height, shortened(subtitle, 110), ha="center", va="top", fontsize=10.5, color=FAINT)
    if alert:
        drawn.text(0.5, 1 - 0.61 / height, shortened(alert, 110), ha="center", va="top", fontsize=10.5, color=ALERT)
    return drawn


def style_look(index: int) -> dict[str, Any]:
    """Color and hatch of a style, the same in every picture."""
    count = len(STYLE_COLORS)
    return {"facecolor": STYLE_COLORS[index % count], "hatch": _HATCHES[index // count % len(_HATCHES)], "edgecolor": PAPER}


def patch(**values: Any) -> Any:
    """A filled rectangle for a legend."""
    from matplotlib.patches import Patch

    return Patch(**values)


def color_map() -> Any:
    """viridis for amounts, gray where there is none."""
    from matplotlib import colormaps

    return colormaps["viridis"].with_extremes(bad=EMPTY)


def shortened(text: str, length: int) -> str:
    """The text on one line, cut in the middle where it is longer."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - length // 3 - 1]}…{text[len(text) - length // 3 :]}"


def save(image: Tensor, path: str | Path) -> None:
    """Write pixels (H, W, 3) in [0, 1] as PNG; the file appears whole or not at all. Raises WriteError."""
    from matplotlib.image import imsave

    with replacing(path) as temporary:
        imsave(temporary, (image * 255).round().to(torch.uint8).numpy(), format="png")


def batch(images: list[Tensor]) -> Tensor:
    """Pictures of any size as one IMAGE (N, H, W, 3), the smaller ones on white."""
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    out = torch.ones(len(images), height, width, 3)
    for canvas, image in zip(out, images, strict=True):
        canvas[: image.shape[0], : image.shape[1]] = image
    return out


@picture
def contact_sheet(images: Sequence[tuple[str, Tensor]], title: str, columns: int = 0) -> Any:
    """Images (H, W, 3) in [0, 1] with their labels on one sheet; 0 columns make it about square."""
    columns = columns or math.ceil(len(images) ** 0.5)
    rows = -(-len(images) // columns)
    cell = WIDTH / columns
    shape = max(image.shape[0] / image.shape[1] for _, image in images)
    drawn = figure(rows * (cell * shape + 0.3) + 0.7, title or "Styles")
    axes = drawn.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (label, image) in zip(axes.flat, images, strict=False):
        axis.imshow(image[..., :3].float().clamp(0, 1).cpu().numpy(), interpolation="lanczos")
        axis.set_title(shortened(label, max(6, int(cell * 11))))
    return drawn


def _pixels(drawn: Any) -> Tensor:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    width, height = canvas.get_width_height()
    rgba = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8).view(height, width, 4)
    return rgba[..., :3].float() / 255
