"""Points on a plane: PCA, t-SNE or UMAP. The one place that imports scikit-learn and umap-learn."""

from __future__ import annotations

import torch
from torch import Tensor

from .canvas import MissingPackageError

METHODS = ("t-SNE", "PCA", "UMAP")


def embed(points: Tensor, method: str, *, seed: int = 0, neighbors: float = 30.0) -> Tensor:
    """Two coordinates for each point, (points, 2).

    Args:
        points: (points, dimensions), three at least. Of points that are all the same, all coordinates are 0.
        method: one of METHODS. PCA needs nothing but torch.
        seed: t-SNE and UMAP begin at random.
        neighbors: how many near points t-SNE (its perplexity) and UMAP look at; fewer are taken of few points.

    Raises:
        MissingPackageError: scikit-learn or umap-learn is not installed. ValueError: an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    centered = (points - points.mean(0)).float()
    near = max(1.0, min(neighbors, (len(points) - 1) / 3))
    if centered.abs().max() < 1e-6:
        return centered.new_zeros(len(points), 2)  # all the same, of which t-SNE and UMAP make NaN, or crash
    centered = torch.nn.functional.pad(centered, (0, max(0, 2 - centered.shape[1])))
    if method == "PCA":
        _, _, axes = torch.linalg.svd(centered, full_matrices=False)
        return centered @ axes[:2].mT
    if method == "UMAP":
        try:
            from umap import UMAP
        except ImportError:
            raise MissingPackageError("UMAP needs umap-learn: pip install umap-learn, or choose PCA or t-SNE") from None
        fitted = UMAP(n_neighbors=max(2, int(near)), random_state=seed).fit_transform(centered.numpy())
    else:
        try:
            from sklearn.manifold import TSNE
        except ImportError:
            raise MissingPackageError("t-SNE needs scikit-learn: pip install scikit-learn, or choose PCA") from None
        fitted = TSNE(perplexity=near, init="pca", random_state=seed).fit_transform(centered.numpy())
    return torch.as_tensor(fitted, dtype=torch.float32)
