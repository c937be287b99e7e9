"""Give the demo's text encoder a word for each style that its base model does not draw (`data.STYLE_WORDS`).

    python scripts/demo/draw_style_words.py

Their embeddings are random, for a word as rare as a trigger word should be: an adapter has to learn what it means. Of 32
that were drawn these are the ones beside which the base still draws the thing (97 to 100 % of those it was trained on);
beside others it draws as few as 30 %.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from styleinject_core.demo import data
from styleinject_core.demo.model import WORDS_FILE, read_base
from styleinject_core.files.atomic import save_tensors

IGNORED = (9, 13, 27, 8)


def main() -> None:
    known = read_base("text_encoder")[0]["embedding.weight"]
    drawn = torch.randn(max(IGNORED) + 1, known.shape[1], generator=torch.Generator().manual_seed(0)) * known.std()
    rows = {word: drawn[k].clone() for word, k in zip(data.STYLE_WORDS.values(), IGNORED, strict=True)}
    save_tensors(rows, WORDS_FILE, {})


if __name__ == "__main__":
    main()
