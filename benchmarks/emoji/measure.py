"""What is measured on samples: is it the thing asked for, in the style asked for, and how far is one set from another?"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from styleinject_core.demo.classifier import Classifier, recognized


def features(classifier: Classifier, images: Tensor) -> Tensor:
    """The classifier's last features before its style head: images (N, 3, 64, 64) in [-1, 1] -> (N, 160)."""
    return classifier.features(images).mean((2, 3))


def kid(x: Tensor, y: Tensor) -> float:
    """Kernel inception distance (Bińkowski et al., arXiv 1801.01401): the squared MMD of two sets of features, unbiased.

    The kernel is (x·y / d + 1)³. Two sets from one distribution give 0 on average, so small values may be negative.

    Args:
        x: (N, d); y: (M, d); at least two of each.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double().T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        k, count = kernel(a, a), len(a)
        return (k.sum() - k.trace()) / (count * (count - 1))  # no point with itself: this is what makes it unbiased

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def likeness(x: Tensor, subject: Tensor) -> float:
    """How much features (N, d) look like one subject's (M, d): the mean cosine with the subject's mean."""
    return float(F.cosine_similarity(x, subject.mean(0, keepdim=True)).mean())


def shares(classifier: Classifier, images: Tensor, concepts: list[int], style: str) -> dict[str, float]:
    """Shares of images (N, 3, 64, 64): recognized as their concept, as the style, and as both."""
    return dict(zip(("concept", "style", "both"), recognized(classifier, images, concepts, style), strict=True))
