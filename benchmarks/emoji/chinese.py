"""A student that reads Chinese: the base U-Net behind a text encoder of its own, brought near the English one.

As in AltCLIP (Chen et al., arXiv 2211.06679), the new encoder learns to give the Chinese name what the old one gives the
English name. It reads characters, not words, it never sees the U-Net, and it ends close, not equal.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from styleinject_core.demo import data
from styleinject_core.demo.text import LENGTH, PAD, TextEncoder

NAMES_FILE = Path(__file__).with_name("chinese_names.json")


def chinese_names() -> list[str]:
    """The Chinese name of every concept, in the order of `data.concepts()`."""
    names = json.loads(NAMES_FILE.read_text(encoding="utf-8"))["names"]
    return [names[concept.code] for concept in data.concepts()]


class ChineseEncoder(TextEncoder):
    """The demo's text encoder over characters."""

    def tokenize(self, prompts: list[str]) -> Tensor:
        rows = [[self.ids[character] for character in prompt if character in self.ids][:LENGTH] for prompt in prompts]
        return torch.tensor([row + [PAD] * (LENGTH - len(row)) for row in rows])


def train_chinese_encoder(english: TextEncoder, steps: int) -> ChineseEncoder:
    """Least squares between the two encoders' outputs over all names and the empty prompt; seconds, and always the same.

    Args:
        english: the base model's encoder.
        steps: of AdamW on all names at once.
    """
    names = chinese_names()
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        encoder = ChineseEncoder(sorted({character for name in names for character in name}))
        wanted = english([*(concept.name for concept in data.concepts()), ""]).detach()  # (concepts + 1, 8, 128)
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
            loss = (encoder([*names, ""]) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return encoder.eval().requires_grad_(False)
