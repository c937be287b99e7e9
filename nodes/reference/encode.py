"""From a reference image to tokens: loading a DEADiff, encoding, mixing."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ...integration.paths import DEADIFF_FILES
from ...integration.reference_encoder import LoadedDeadiff
from ...styleinject_core.deadiff import STREAMS, Tokens, mix, side_by_side
from ...styleinject_core.deadiff.config import ENCODERS
from ...styleinject_core.hosts.architectures import title_of
from ..schema import DeadiffType, TokensType, schema

BOTH = "style & content"
AVERAGE, TOGETHER, EACH = "average", "side by side", "one per image"
_SLOTS = "abcd"


def deadiff_name_input() -> io.Combo.Input:
    """The choice of a DEADiff file; the list is read anew each time the schema is."""
    return io.Combo.Input(
        "deadiff_name",
        options=DEADIFF_FILES.names(),
        tooltip="A DEADiff file (.safetensors) from models/deadiff. Make one of the authors' deadiff_v1.ckpt with the command "
        'styleinject deadiff convert. The one under "demo/" is for StyleInject Demo Model alone. Press R after adding files.',
    )


def clip_vision_input() -> io.ClipVision.Input:
    return io.ClipVision.Input(
        "clip_vision",
        optional=True,
        tooltip="OpenAI's CLIP ViT-L/14 (openai/clip-vit-large-patch14), from Load CLIP Vision. Not needed for a file that was "
        "converted --with-vision, nor for the demo's.",
    )


class StyleInjectLoadDeadiff(io.ComfyNode):
    """DEADiff file -> STYLEINJECT_DEADIFF."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectLoadDeadiff",
            section="reference",
            display_name="Load DEADiff",
            description="Loads a DEADiff file, which turns a reference image into style or content for Stable Diffusion 1.x.",
            search_aliases=["reference image", "style transfer", "ip-adapter", "load style"],
            inputs=[deadiff_name_input()],
            outputs=[
                DeadiffType.Output("deadiff", display_name="deadiff", tooltip="For Encode Reference and Apply DEADiff."),
                io.String.Output("info", display_name="info", tooltip="What it is made for, its size, source and license."),
            ],
        )

    @classmethod
    def validate_inputs(cls, deadiff_name: str | None = None) -> bool | str:
        return DEADIFF_FILES.problem(deadiff_name) or True

    @classmethod
    def fingerprint_inputs(cls, deadiff_name: str) -> str:
        return DEADIFF_FILES.fingerprint(deadiff_name)

    @classmethod
    def execute(cls, deadiff_name: str) -> io.NodeOutput:
        loaded = LoadedDeadiff.load(DEADIFF_FILES.path(deadiff_name))
        return io.NodeOutput(loaded, info(loaded))


def info(loaded: LoadedDeadiff) -> str:
    """What a DEADiff is, for people."""
    model, config = loaded.model, loaded.model.config
    content = len(config.content_layers)
    style = len(config.layers) - content
    lines = [
        f"{model.name}: {model.counts()['all']:,} parameters, made for {title_of(config.base)}",
        f"  style in {style} cross-attentions, content in {content}; {config.queries} tokens a reference",
        f"  vision encoder: {ENCODERS[config.encoder]}",
    ]
    known = {"deadiff_source": "made of", "license": "license", "modelspec.license": "license", "modelspec.author": "author"}
    lines += [f"  {label}: {model.metadata[key]}" for key, label in known.items() if model.metadata.get(key)]
    return "\n".join(lines)


class StyleInjectEncodeReference(io.ComfyNode):
    """IMAGE -> STYLEINJECT_TOKENS of one stream or of both."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectEncodeReference",
            section="reference",
            display_name="Encode Reference",
            description="Looks at a reference image and takes its style, its content, or both, as tokens for Apply DEADiff.",
            search_aliases=["reference image", "style transfer", "ip-adapter", "image prompt"],
            inputs=[
                DeadiffType.Input("deadiff", tooltip="From Load DEADiff."),
                io.Image.Input("image", tooltip="The reference. It is squashed to the vision encoder's square, not cropped."),
                io.Combo.Input(
                    "stream",
                    options=[*STREAMS, BOTH],
                    default=STREAMS[0],
                    tooltip="What to take from the image: how it is drawn, what it shows, or both.",
                ),
                io.Combo.Input(
                    "batch",
                    options=[AVERAGE, TOGETHER, EACH],
                    default=AVERAGE,
                    tooltip="For several images: one reference between them, all of them side by side in the attention, or one "
                    "for each picture of the batch that is drawn.",
                ),
                clip_vision_input(),
                io.Mask.Input(
                    "mask", optional=True, tooltip="What of the reference to look at, to keep a face or a logo out of it."
                ),
            ],
            outputs=[
                TokensType.Output(
                    "style", display_name="style", tooltip="Style tokens; empty where only content was asked for."
                ),
                TokensType.Output("content", display_name="content", tooltip="Content tokens; empty where only style was."),
            ],
        )

    @classmethod
    def execute(
        cls,
        deadiff: LoadedDeadiff,
        image: Tensor,
        stream: str,
        batch: str,
        clip_vision: Any = None,
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        streams = STREAMS if stream == BOTH else (stream,)
        arranged = {AVERAGE: Tokens.averaged, TOGETHER: Tokens.side_by_side, EACH: lambda tokens: tokens}[batch]
        found = {t.stream: arranged(t) for t in deadiff.encode(image, streams, mask, clip_vision)}
        return io.NodeOutput(*(found.get(name) for name in STREAMS))


class StyleInjectMixTokens(io.ComfyNode):
    """Up to four STYLEINJECT_TOKENS -> one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        weights = [
            io.Float.Input(
                f"weight_{slot}",
                default=1.0,
                min=-10.0,
                max=10.0,
                step=0.05,
                round=0.001,
                tooltip=f"Share of tokens_{slot}; the shares are scaled to the sum 1. Without tokens there it has no effect.",
            )
            for slot in _SLOTS
        ]
        tokens = [TokensType.Input(f"tokens_{slot}", optional=slot > "b", tooltip="Tokens of one stream.") for slot in _SLOTS]
        return schema(
            "StyleInjectMixTokens",
            section="reference",
            display_name="Mix Tokens",
            description="One reference out of several: between them, by weights that sum to 1, or all of them side by side.",
            search_aliases=["style mixing", "blend references", "several references"],
            inputs=[
                *tokens[:2],
                io.Combo.Input(
                    "how",
                    options=["mix", TOGETHER],
                    default="mix",
                    tooltip="mix: as many tokens as one reference has, their weighted sum. side by side: every reference keeps "
                    "its own tokens, like several Apply DEADiff nodes in a row; the weights have no effect.",
                ),
                *weights,
                *tokens[2:],
            ],
            outputs=[TokensType.Output("tokens", display_name="tokens", tooltip="For Apply DEADiff, or another Mix Tokens.")],
        )

    @classmethod
    def execute(cls, how: str, **inputs: Any) -> io.NodeOutput:
        given = [(inputs[f"tokens_{s}"], inputs[f"weight_{s}"]) for s in _SLOTS if inputs.get(f"tokens_{s}") is not None]
        tokens, weights = [t for t, _ in given], [w for _, w in given]
        return io.NodeOutput(side_by_side(tokens) if how == TOGETHER else mix(tokens, weights))
