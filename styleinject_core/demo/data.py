"""The demo's real images: emoji in five styles, shipped as one sprite sheet per style (assets/emoji).

Two more styles draw the held-out things alone: nothing is trained on them, not even the classifier.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ASSETS = Path(__file__).parent / "assets"
ADAPTERS = ASSETS / "adapters"
DEADIFFS = ASSETS / "deadiff"
BASE_STYLE = "openmoji"
NEW_STYLES = ("fluent-flat", "fluent-high-contrast")
STYLE_WORDS = {"twemoji": "flat", "noto": "shaded", "openmoji-line": "lineart", "fluent3d": "rendered"}
"""One word for each style that the base model does not draw; none of them is in the name of a drawing."""
LICENSES = {
    "twemoji": "CC-BY-4.0",
    "noto": "Apache-2.0",
    "openmoji": "CC-BY-SA-4.0",
    "openmoji-line": "CC-BY-SA-4.0",
    "fluent3d": "MIT",
    "fluent-flat": "MIT",
    "fluent-high-contrast": "MIT",
}


@dataclass(frozen=True)
class Concept:
    """One thing that every style draws; `held_out` ones are never shown to a style adapter in training."""

    code: str
    name: str
    category: str
    held_out: bool


@cache
def _index() -> dict:
    return json.loads((ASSETS / "emoji" / "concepts.json").read_text(encoding="utf-8"))


def styles() -> list[str]:
    """Names of the drawing styles, in the order of the sheets."""
    return list(_index()["styles"])


def concepts() -> list[Concept]:
    """The concepts in tile order."""
    return [Concept(**entry) for entry in _index()["concepts"]]


def images(style: str) -> Tensor:
    """Every concept drawn in one style, in the order of `concepts()`.

    Returns:
        (N, 3, 64, 64) float32 in [-1, 1].

    Raises:
        ValueError: no sprite sheet of that style ships with the demo.
    """
    if style not in styles():
        raise ValueError(f"demo style {style!r}: expected one of {', '.join(styles())}")
    return _tiles(style)[: len(concepts())]


def new_style_images(style: str) -> Tensor:
    """Every held-out concept drawn in one of NEW_STYLES, in the order of `concepts()`.

    Returns:
        (N, 3, 64, 64) float32 in [-1, 1].
    """
    return _tiles(style)[: sum(concept.held_out for concept in concepts())]


def _tiles(style: str) -> Tensor:
    import numpy as np
    from PIL import Image

    tile, columns = _index()["tile"], _index()["columns"]
    with Image.open(ASSETS / "emoji" / f"{style}.webp") as sheet:
        pixels = torch.from_numpy(np.array(sheet.convert("RGB")))  # (rows*tile, columns*tile, 3)
    rows = pixels.shape[0] // tile
    tiles = pixels.view(rows, tile, columns, tile, 3).permute(0, 2, 4, 1, 3).flatten(0, 1)  # (rows*columns, 3, tile, tile)
    return tiles.float() / 127.5 - 1


def drawings(styles: Sequence[str], things: str = "", count: int = 0) -> list[tuple[Tensor, str, str]]:
    """Drawings with the names of what they show and of their styles, thing by thing, each in all of the styles.

    Args:
        things: names with a comma between them; empty for all that are not held out.
        count: how many at most, evenly picked; 0 for all.

    Returns:
        ((3, 64, 64) float32 in [-1, 1], name, style) of each.

    Raises:
        ValueError: a thing of which there is no drawing.
    """
    places = {concept.name: k for k, concept in enumerate(concepts())}
    names = [name.strip().lower() for name in things.split(",") if name.strip()]
    if unknown := [name for name in names if name not in places]:
        raise ValueError(f"things: there is no drawing of {unknown[0]!r}; there are {', '.join(list(places)[::12])} and others")
    names = names or [concept.name for concept in concepts() if not concept.held_out]
    sheets = {style: images(style) for style in styles}  # (N, 3, 64, 64)
    found = [(sheets[style][places[name]], name, style) for name in names for style in styles]
    return [found[k * len(found) // count] for k in range(count)] if 0 < count < len(found) else found
