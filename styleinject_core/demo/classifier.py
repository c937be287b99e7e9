"""A small classifier of emoji, trained on all styles: which concept, and which style, does a picture show?

It measures the demo's samples. `scripts/demo/train_classifier.py` trains it; its weights ship with the demo.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from . import data

CLASSIFIER_FILE = data.ASSETS / "classifier.safetensors"


class Classifier(nn.Module):
    """Images (B, 3, 64, 64) in [-1, 1] -> logits over concepts (B, C) and over styles (B, S)."""

    def __init__(self, concepts: int, styles: int):
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for source, stride in ((inputs, 2), (outputs, 1)):
                layers += [nn.Conv2d(source, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            return nn.Sequential(*layers)

        self.features = nn.Sequential(block(3, 24), block(24, 48), block(48, 96), block(96, 160))  # to 4x4
        self.concept = nn.Linear(160 * 16, concepts)
        self.style = nn.Linear(160, styles)
        self.dropout = nn.Dropout(0.3)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return self.concept(self.dropout(features.flatten(1))), self.style(features.mean((2, 3)))


def load_classifier(path: Path = CLASSIFIER_FILE) -> Classifier:
    """The trained classifier, frozen."""
    classifier = Classifier(len(data.concepts()), len(data.styles()))
    classifier.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def recognized(classifier: Classifier, images: Tensor, concepts: list[int], style: str) -> tuple[float, float, float]:
    """How often the classifier sees the concept that was asked for, the target style, and both.

    Args:
        images: (N, 3, 64, 64) in [-1, 1].
        concepts: the N indices into `data.concepts()` that the prompts asked for.
        style: the target style.

    Returns:
        (share of images recognized as their concept, share recognized as the style, share as both), each in [0, 1].
    """
    concept, drawn = classifier(images)
    right = concept.argmax(1) == torch.tensor(concepts)
    in_style = drawn.argmax(1) == data.styles().index(style)
    concept_share, style_share, both = (share.float().mean().item() for share in (right, in_style, right & in_style))
    return concept_share, style_share, both
