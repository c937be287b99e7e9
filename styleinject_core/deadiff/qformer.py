"""The Q-Former (BLIP-2, arXiv 2301.12597, as LAVIS has it) and the projection of its queries: an image becomes tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import DeadiffConfig
from .ops import CASTING, LayerOps

LN_EPS = 1e-12  # BERT's; below what half precision can hold, so norms run in float32
VISION_EPS = 1e-5


class Attention(nn.Module):
    """BERT's attention with its output projection, residual and post-norm: LN(x + Wo · MHA(x, source))."""

    def __init__(self, width: int, source: int, heads: int, ops: LayerOps, **factory: Any):
        super().__init__()
        self.heads = heads
        self.query = ops.linear(width, width, **factory)
        self.key = ops.linear(source, width, **factory)
        self.value = ops.linear(source, width, **factory)
        self.out = ops.linear(width, width, **factory)
        self.norm = ops.layer_norm(width, eps=LN_EPS, **factory)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """x (B, N, width), source (B, M, source width) -> (B, N, width)."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N or M, width / heads)
            for part in (self.query(x), self.key(source), self.value(source))
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, N, width)
        return self.norm(x + self.out(mixed))


class FeedForward(nn.Module):
    """LN(x + W2 · gelu(W1 · x)), with the exact (erf) GELU."""

    def __init__(self, width: int, hidden: int, ops: LayerOps, **factory: Any):
        super().__init__()
        self.rise = ops.linear(width, hidden, **factory)
        self.fall = ops.linear(hidden, width, **factory)
        self.norm = ops.layer_norm(width, eps=LN_EPS, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) -> (B, N, width)."""
        return self.norm(x + self.fall(F.gelu(self.rise(x))))


class QFormerLayer(nn.Module):
    """Queries and text attend to each other, the queries to the image; each then has a feed-forward of its own."""

    def __init__(self, config: DeadiffConfig, ops: LayerOps, **factory: Any):
        super().__init__()
        self.queries, width, hidden = config.queries, config.width, config.feed_forward
        self.attention = Attention(width, width, config.heads, ops, **factory)
        self.cross = Attention(width, config.vision_width, config.heads, ops, **factory)
        self.query_ffn = FeedForward(width, hidden, ops, **factory)
        self.text_ffn = FeedForward(width, hidden, ops, **factory)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        """x (B, queries + words, width), image (B, M, vision width) -> the shape of x."""
        x = self.attention(x, x)
        queries, text = x[:, : self.queries], x[:, self.queries :]
        return torch.cat([self.query_ffn(self.cross(queries, image)), self.text_ffn(text)], 1)


class QFormer(nn.Module):
    """Learned queries and a constant text condition -> queries that hold what the text names of an image.

    The text ("style" or "content", as [CLS] word [SEP]) never changes within a stream, so `text` keeps the sums of its
    word and position embeddings and no tokenizer is needed. Queries have no position.
    """

    def __init__(self, config: DeadiffConfig, ops: LayerOps = CASTING, **factory: Any):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(config.queries, config.width, **factory))
        self.text = nn.Parameter(torch.empty(config.words, config.width, **factory))
        self.norm = ops.layer_norm(config.width, eps=LN_EPS, **factory)
        self.layers = nn.ModuleList(QFormerLayer(config, ops, **factory) for _ in range(config.depth))

    def forward(self, image: Tensor) -> Tensor:
        """Image features (B, M, vision width) -> (B, queries, width)."""
        rows = torch.cat([self.queries.to(image), self.text.to(image)])  # (queries + words, width)
        x = self.norm(rows).expand(image.shape[0], -1, -1)
        for layer in self.layers:
            x = layer(x, image)
        return x[:, : self.queries.shape[0]]


class TokenProjection(nn.Module):
    """x + W2 · quickgelu(W1 · LN(x)), as BLIP-Diffusion has it; quickgelu(z) = z · sigmoid(1.702 z)."""

    def __init__(self, config: DeadiffConfig, ops: LayerOps = CASTING, **factory: Any):
        super().__init__()
        self.norm = ops.layer_norm(config.width, eps=LN_EPS, **factory)
        self.rise = ops.linear(config.width, config.feed_forward, **factory)
        self.fall = ops.linear(config.feed_forward, config.width, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, queries, width) -> tokens (B, queries, width)."""
        hidden = self.rise(self.norm(x))
        return x + self.fall(hidden * torch.sigmoid(1.702 * hidden))


class Stream(nn.Module):
    """One stream's path from image features to tokens: norm of the features, Q-Former, projection. Runs in float32."""

    def __init__(self, config: DeadiffConfig, ops: LayerOps = CASTING, **factory: Any):
        super().__init__()
        self.vision_norm = ops.layer_norm(config.vision_width, eps=VISION_EPS, **factory)
        self.qformer = QFormer(config, ops, **factory)
        self.projection = TokenProjection(config, ops, **factory)

    def forward(self, features: Tensor) -> Tensor:
        """The vision encoder's output (B, M, vision width) -> tokens (B, queries, width), float32."""
        return self.projection(self.qformer(self.vision_norm(features.float())))
