"""A DEADiff (arXiv 2403.06951): two streams from a reference image to tokens, and the weights that turn tokens to K and V."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from .config import CLIP_L, ENCODERS, STREAMS, DeadiffConfig
from .ops import CASTING, LayerOps
from .qformer import Stream
from .tokens import Tokens, TokensError


class Deadiff(nn.Module):
    """Q-Formers, projections and the i_to_k, i_to_v of every cross-attention; no vision encoder and no U-Net.

    Args:
        config: the sizes.
        ops: where its layers come from; a host program has its own.
        name: for messages.
        factory: device and dtype of the parameters.

    `streams` takes features to tokens and runs once per reference; `to_kv` is applied once per Apply. Neither is needed
    while sampling, where tokens are constant rows (`rows.LayerRows`). `class_embedding` (vision width,) tells the vision
    encoder it was trained with from others of the same size, where the encoder has one.
    """

    class_embedding: Tensor | None

    def __init__(self, config: DeadiffConfig, ops: LayerOps = CASTING, name: str = "DEADiff", **factory: Any):
        super().__init__()
        self.config, self.name = config, name
        self.metadata: dict[str, str] = {}
        self.streams = nn.ModuleDict({stream: Stream(config, ops, **factory) for stream in STREAMS})
        self.to_kv = nn.ModuleList(
            nn.ParameterDict({part: nn.Parameter(torch.empty(width, config.width, **factory)) for part in ("i_to_k", "i_to_v")})
            for _, width in config.layers
        )
        embedding = torch.empty(config.vision_width, **factory) if config.encoder == CLIP_L else None
        self.register_buffer("class_embedding", embedding)

    def encode(self, features: Tensor, stream: str, label: str = "") -> Tokens:
        """What one stream sees in reference images.

        Args:
            features: the vision encoder's output (R, vision_tokens, vision_width), before any final norm.
            stream: "style" or "content".
            label: what the reference is called in reports.

        Returns:
            Tokens with values (R, queries, width), one set per image.

        Raises:
            TokensError: features of another size, or values that are not finite.
        """
        expected = (self.config.vision_tokens, self.config.vision_width)
        if features.ndim != 3 or tuple(features.shape[1:]) != expected:
            found = " x ".join(map(str, features.shape[1:]))
            raise TokensError(
                f"{self.name} was trained with a vision encoder that returns {expected[0]} x {expected[1]} numbers an image, "
                f"found {found}: use {ENCODERS[self.config.encoder]}"
            )
        if not torch.isfinite(features).all():
            raise TokensError("the reference image, or what the vision encoder made of it, has NaN or Inf values")
        return Tokens(self.streams[stream](features), stream, self.stream_id(stream), (label,) if label else ())

    @torch.no_grad()
    def key_values(self, tokens: Tokens, place: int) -> tuple[Tensor, Tensor]:
        """The unscaled rows K = Ik img, V = Iv img of the layer at `place` of `config.layers`: (R, S, C) each, float32."""
        keys, values = (tokens.values @ self.weight(place, part).to(tokens.values).T for part in ("to_k", "to_v"))
        return keys, values

    def weight(self, place: int, part: str) -> nn.Parameter:
        """i_to_k or i_to_v (C, width) of the layer at `place`; `part` is "to_k" or "to_v"."""
        layer: Any = self.to_kv[place]
        return layer[f"i_{part}"]

    @property
    def names(self) -> tuple[str, ...]:
        """The cross-attentions by their diffusers names."""
        return tuple(name for name, _ in self.config.layers)

    def stream_id(self, stream: str) -> str:
        """A short hash of what shapes this stream's tokens: tokens of one file mean nothing to another one's i_to_k."""
        owner: Any = self.streams[stream]
        parts = (owner.qformer.queries, owner.qformer.text, owner.projection.fall.weight, owner.projection.fall.bias)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part.detach().cpu().half().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def check(self, tokens: Tokens, stream: str) -> None:
        """Whether tokens are this model's own.

        Raises:
            TokensError: tokens of the other stream, of other sizes or of another model; both are named.
        """
        if tokens.stream != stream:
            raise TokensError(f"expected {stream} tokens, found {tokens.stream} tokens")
        if tokens.width != self.config.width:
            raise TokensError(f"{stream} tokens are {tokens.width} wide, {self.name} has tokens of {self.config.width}")
        if tokens.model_id and tokens.model_id != (own := self.stream_id(stream)):
            raise TokensError(
                f"these {stream} tokens were made by another DEADiff file (id {tokens.model_id}) than {self.name} (id {own}): "
                "encode the reference again with this one"
            )

    def counts(self) -> dict[str, int]:
        """Parameters by part: streams, i_to, and all."""
        i_to = sum(p.numel() for p in self.to_kv.parameters())
        return {"streams": (own := sum(p.numel() for p in self.streams.parameters())), "i_to": i_to, "all": own + i_to}
