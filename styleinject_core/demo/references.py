"""`styleinject demo --reference`: the things a prompt names, in the style of a picture."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import data, pictures
from .deadiff import draw, five_style_training, load_emoji_deadiff, style_words
from .features import demo_features
from .reference_scores import measure

SHOWN = ("red apple", "cat face", "rocket")
NEW = " *"  # after the name of a style that nothing was trained on
HELD_OUT = 4  # of those that DEADiff never saw, beside the ones above


def run(out: Path, image: Path | None = None, *, seed: int = 0, scores: bool = True) -> None:
    """Draw a grid, rows references and columns prompts, into `out`; print what a classifier sees.

    Args:
        image: one more reference, any picture; it is seen at 64x64 pixels.
        scores: whether to measure, which takes longer than to draw.

    Raises:
        FileNotFoundError, OSError: `image` is no picture.
    """
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    rows_of = references()
    if image is not None:
        rows_of.append((image.name, _opened(image)))
    model, deadiff = five_style_training(), load_emoji_deadiff()
    concepts = data.concepts()
    held = [concept.name for concept in concepts if concept.held_out]
    names = [*SHOWN, *held[:: len(held) // HELD_OUT][:HELD_OUT]]
    blank = torch.ones(1, 3, 64, 64)
    base = model.decode(draw(model.denoiser, model.text_encoder, names, seed=seed))
    rows = [("no reference", torch.cat([blank, base]))]
    for label, picture in rows_of:
        features = demo_features((picture.movedim(1, -1) + 1) / 2).expand(len(names), -1, -1)
        drawn = model.decode(draw(model.denoiser, model.text_encoder, names, deadiff, features, seed=seed))
        rows.append((label, torch.cat([picture, drawn])))
    title = "DEADiff: the same prompts and noise, in the style of the picture on the left"
    marked = [False, *(name in held for name in names)]
    note = (
        "Orange: things that DEADiff never saw, nor any of the references. *: a style that neither it nor the model ever saw."
    )
    pictures.grid(out / "references.png", title, rows, ["reference", *names], marked, note)
    print(f"  references.png ({time.monotonic() - began:.0f} s)")
    if scores:
        _print_scores(
            [("told the style in words", measure(model, None, seed)), ("shown a picture", measure(model, deadiff, seed))]
        )


def references() -> list[tuple[str, Tensor]]:
    """A drawing of a held-out thing in each style, NEW_STYLES last: (label, (1, 3, 64, 64) in [-1, 1])."""
    held = torch.tensor([k for k, concept in enumerate(data.concepts()) if concept.held_out])
    drawings = {style: data.images(style)[held] for style in data.styles()}
    drawings |= {f"{style}{NEW}": data.new_style_images(style) for style in data.NEW_STYLES}
    count = len(data.styles()) + 2  # the same things as without the new styles
    places = [(k + 1) * len(held) // count for k in range(count - 1)]
    places.append(5 * len(held) // 8)  # a thing that is no column
    return [(label, images[k : k + 1]) for (label, images), k in zip(drawings.items(), places, strict=True)]


def _opened(path: Path) -> Tensor:
    import numpy as np
    from PIL import Image

    with Image.open(path) as opened:
        flat = Image.new("RGBA", opened.size, "white")
        flat.alpha_composite(opened.convert("RGBA"))
        pixels = torch.from_numpy(np.array(flat.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)))
    return pixels.float().div(127.5).sub(1).movedim(-1, 0).unsqueeze(0)


def _print_scores(rows: Sequence[tuple[str, dict[str, float]]]) -> None:
    print("\n37 things DEADiff never saw, in 5 styles; what a classifier sees:\n")
    columns = (("concept", "concept"), ("style", "style"), ("both", "both"), ("color_leak", "color leak"))
    print(f"  {'':28}" + "".join(f"{label:>12}" for _, label in columns))
    for label, scores in rows:
        values = [f"{scores[key]:.2f}" if key == "color_leak" else f"{scores[key]:.0%}" for key, _ in columns]
        print(f"  {label:28}" + "".join(f"{value:>12}" for value in values))
    print(f"\n  chance of a style: {1 / len(data.styles()):.0%}; the styles' words: {', '.join(style_words().values())}")
