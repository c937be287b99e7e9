"""What a DEADiff is made of: sizes, the layers its tokens enter, and the vision encoder it was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

STREAMS = ("style", "content")
CLIP_L = "clip-vit-large-patch14"  # OpenAI's, 23 of its 24 blocks
DEMO_ENCODER = "styleinject-demo-autoencoder"  # the trunk of the embedded model's autoencoder
ENCODERS = {CLIP_L: "OpenAI's CLIP ViT-L/14", DEMO_ENCODER: "the StyleInject demo's own encoder"}


@dataclass(frozen=True)
class Site:
    """One cross-attention of the U-Net that takes tokens.

    Args:
        name: its diffusers name, up to and including `attn2`.
        width: C, what its to_k and to_v return.
        stream: whose tokens it takes, "style" or "content".
    """

    name: str
    width: int
    stream: str


@dataclass(frozen=True)
class DeadiffConfig:
    """The sizes of a DEADiff.

    Args:
        base: the model it is made for, as ModelSpec 1.0 names architectures.
        width: of the Q-Formers and of the tokens (768).
        depth, heads, feed_forward: of the Q-Formers and, the last one, of the projections (12, 12, 3072).
        queries: tokens per reference and stream (16).
        words: rows of the text condition, [CLS] word [SEP] (3).
        context: width of the U-Net's text conditioning.
        text_tokens: rows the U-Net's text conditioning had in training (77).
        encoder: the vision encoder, one of ENCODERS.
        vision_tokens, vision_width: what the encoder returns per image (257, 1024).
        layers: (name, width) of the U-Net's attn2 in forward order.
        content_layers: places in `layers` that take the content tokens; the others take the style tokens.

    Raises:
        ValueError: a value that is out of its range, or contradicts another.
    """

    method: ClassVar[str] = "deadiff"  # what training calls it
    base: str
    width: int
    depth: int
    heads: int
    feed_forward: int
    queries: int
    words: int
    context: int
    text_tokens: int
    encoder: str
    vision_tokens: int
    vision_width: int
    layers: tuple[tuple[str, int], ...]
    content_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{field.name} is {value!r}, expected a whole number of at least 1")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if not isinstance(self.base, str) or not isinstance(self.encoder, str):
            raise ValueError(f"base and encoder are {self.base!r} and {self.encoder!r}, expected strings")
        if self.encoder not in ENCODERS:
            raise ValueError(f"encoder is {self.encoder!r}, expected one of {', '.join(ENCODERS)}: update the pack")
        if not self.layers or len(dict(self.layers)) != len(self.layers):
            raise ValueError(f"layers has {len(self.layers)} entries of {len(dict(self.layers))} different names")
        if narrow := [name for name, width in self.layers if width < 1]:
            raise ValueError(f"layers: {narrow[0]} has no width of at least 1")
        if outside := [k for k in self.content_layers if not 0 <= k < len(self.layers)]:
            raise ValueError(f"content_layers has {outside[0]}, expected 0 to {len(self.layers) - 1}")

    @property
    def sites(self) -> tuple[Site, ...]:
        """The cross-attentions in forward order, with the stream each takes."""
        return tuple(
            Site(name, width, "content" if place in self.content_layers else "style")
            for place, (name, width) in enumerate(self.layers)
        )

    def to_dict(self) -> dict[str, Any]:
        """For the metadata of a file: values as JSON has them."""
        return {**asdict(self), "layers": [list(layer) for layer in self.layers], "content_layers": list(self.content_layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DeadiffConfig:
        """The config that `to_dict` wrote.

        Raises:
            ValueError: a field that is unknown, missing or of the wrong kind.
        """
        known = {field.name for field in fields(cls)}
        for label, names in (("unknown", set(values) - known), ("missing", known - set(values))):
            if names:
                raise ValueError(f"{label} field {', '.join(sorted(names))}")
        try:
            layers = tuple((str(name), int(width)) for name, width in values["layers"])
            content = tuple(int(place) for place in values["content_layers"])
        except (TypeError, ValueError, OverflowError):
            raise ValueError("layers and content_layers: expected pairs of name and width, and places among them") from None
        return cls(**{**values, "layers": layers, "content_layers": content})


_SD15_BLOCKS = (
    *((f"down_blocks.{level}.attentions.{k}", width) for level, width in enumerate((320, 640, 1280)) for k in range(2)),
    ("mid_block.attentions.0", 1280),
    *((f"up_blocks.{level}.attentions.{k}", width) for level, width in ((1, 1280), (2, 640), (3, 320)) for k in range(3)),
)

# deadiff_v1.ckpt: BERT-base-sized Q-Formers with BLIP-Diffusion's 16 queries; content in layers 4 to 8 (the paper's "low
# resolution"), style in the other eleven. The cut goes by number: 9 has the resolution of 7 and 8.
SD15 = DeadiffConfig(
    base="stable-diffusion-v1",
    width=768,
    depth=12,
    heads=12,
    feed_forward=3072,
    queries=16,
    words=3,
    context=768,
    text_tokens=77,
    encoder=CLIP_L,
    vision_tokens=257,
    vision_width=1024,
    layers=tuple((f"{name}.transformer_blocks.0.attn2", width) for name, width in _SD15_BLOCKS),
    content_layers=(4, 5, 6, 7, 8),
)
