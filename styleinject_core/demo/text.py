"""The embedded model's text encoder: words, positions, and one small transformer over them."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

WIDTH = 128
LENGTH = 8
PAD = 0


def words(prompt: str) -> list[str]:
    """The lower-case words of a prompt: "Beer mug!" -> ["beer", "mug"]."""
    return re.findall(r"[a-z0-9]+", prompt.lower())


class TextEncoder(nn.Module):
    """Prompts -> conditioning (B, 8, 128). The vocabulary is the words of the training prompts; "" is unconditional."""

    def __init__(self, vocabulary: list[str]):
        super().__init__()
        self.vocabulary = vocabulary
        self.ids = {word: k + 1 for k, word in enumerate(vocabulary)}
        self.embedding = nn.Embedding(len(vocabulary) + 1, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """(B, 8) word ids: words never seen in training are left out, the rest is cut or padded to 8."""
        rows = [[self.ids[word] for word in words(prompt) if word in self.ids][:LENGTH] for prompt in prompts]
        return torch.tensor([row + [PAD] * (LENGTH - len(row)) for row in rows], device=self.position.device)

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that the model has never seen, in order."""
        return [word for word in words(prompt) if word not in self.ids]

    def forward(self, prompts: list[str]) -> Tensor:
        """B prompts -> (B, 8, 128)."""
        return self.transformer(self.embedding(self.tokenize(prompts)) + self.position)
