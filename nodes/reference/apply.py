"""Putting a reference image on a MODEL."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ...integration.injection import model_title
from ...integration.patcher import ModelPatcher, apply_reference, references_of
from ...integration.paths import DEADIFF_FILES
from ...integration.reference import AppliedReference
from ...integration.reference_encoder import LoadedDeadiff
from ...styleinject_core.deadiff import Reference, Tokens
from ...styleinject_core.deadiff.rows import MAX_WEIGHT
from ...styleinject_core.hosts.architectures import title_of
from ..schema import DeadiffType, LayerWeightsType, TokensType, executing_node, percent_inputs, schema
from .encode import clip_vision_input, deadiff_name_input


def weight_input(name: str, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=1.0, min=0.0, max=MAX_WEIGHT, step=0.05, round=0.001, tooltip=tooltip)


class StyleInjectApplyDeadiff(io.ComfyNode):
    """MODEL and STYLEINJECT_TOKENS -> MODEL, with every setting."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectApplyDeadiff",
            section="reference",
            display_name="Apply DEADiff",
            description="Draws in the style, or with the content, of a reference image. Chain several for several references.",
            search_aliases=["reference image", "style transfer", "ip-adapter", "apply style"],
            inputs=[
                io.Model.Input("model", tooltip="The model to draw with, Stable Diffusion 1.x. It is not changed itself."),
                DeadiffType.Input("deadiff", tooltip="From Load DEADiff, the file the tokens were made with."),
                weight_input(
                    "weight_style",
                    "How strongly the style acts. 1 is as trained; the effect is not linear. With both weights at 0 the model "
                    "is its own, which is not quite what 0.01 gives.",
                ),
                weight_input("weight_content", "The same for the content. Without content tokens it has no effect."),
                *percent_inputs("the reference"),
                io.String.Input(
                    "layers",
                    default="",
                    multiline=True,
                    tooltip='Weights of single layers, one a line, times those above: "up = 0.5", "down.1 & to_v = 0". Layers '
                    "of weight 0 keep empty tokens. Empty: 1 for all.",
                ),
                TokensType.Input("style", optional=True, tooltip="Style tokens, from Encode Reference, Mix Tokens or a card."),
                TokensType.Input("content", optional=True, tooltip="Content tokens, of the same image or of another one."),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Where in the picture the reference acts; elsewhere only the prompt."
                ),
                TokensType.Input(
                    "negative", optional=True, tooltip="Tokens for the negative prompt: what the picture should not look like."
                ),
                LayerWeightsType.Input(
                    "layer_weights", optional=True, tooltip="Weights per group, from StyleInject Layer Weights."
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", display_name="MODEL", tooltip="The model with the reference."),
                io.String.Output("report", display_name="report", tooltip="Which layers matched, and with what weights."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        deadiff: LoadedDeadiff,
        weight_style: float,
        weight_content: float,
        start_percent: float,
        end_percent: float,
        layers: str,
        style: Tokens | None = None,
        content: Tokens | None = None,
        mask: Tensor | None = None,
        negative: Tokens | None = None,
        layer_weights: str = "",
    ) -> io.NodeOutput:
        against = {} if negative is None else {f"negative_{negative.stream}": negative}
        lines = "\n".join(part for part in (layer_weights, layers) if part)
        reference = Reference(deadiff.model, style, content, weight_style, weight_content, lines, **against)
        applied = AppliedReference(reference, start_percent, end_percent, mask, executing_node(cls))
        patched = apply_reference(model, applied)
        return io.NodeOutput(patched, report(patched, applied))


class StyleInjectReference(io.ComfyNode):
    """The one-node path: a file, an image and a weight."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectReference",
            section="reference",
            display_name="Style from Image (DEADiff)",
            description="Makes a model draw in the style of one image, in one node. Apply DEADiff has more settings.",
            search_aliases=["reference image", "style transfer", "ip-adapter", "make it look like"],
            inputs=[
                io.Model.Input("model", tooltip="The model to draw with, Stable Diffusion 1.x. It is not changed itself."),
                io.Image.Input("image", tooltip="The picture whose style to take. Several are averaged."),
                deadiff_name_input(),
                weight_input("weight", "How strongly the style acts: 0 is the model alone, 1 as trained."),
                clip_vision_input(),
            ],
            outputs=[io.Model.Output("MODEL", display_name="MODEL", tooltip="The model with the reference.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, deadiff_name: str | None = None) -> bool | str:
        return DEADIFF_FILES.problem(deadiff_name) or True

    @classmethod
    def fingerprint_inputs(cls, deadiff_name: str, **_others: object) -> str:
        return DEADIFF_FILES.fingerprint(deadiff_name)

    @classmethod
    def execute(
        cls, model: ModelPatcher, image: Tensor, deadiff_name: str, weight: float, clip_vision: Any = None
    ) -> io.NodeOutput:
        loaded = LoadedDeadiff.load(DEADIFF_FILES.path(deadiff_name))
        tokens = loaded.encode(image, ("style",), clip_vision=clip_vision)[0].averaged()
        reference = Reference(loaded.model, tokens, weight_style=weight)
        return io.NodeOutput(apply_reference(model, AppliedReference(reference, node_id=executing_node(cls))))


def report(model: ModelPatcher, applied: AppliedReference) -> str:
    """What Apply did, for people."""
    reference = applied.reference
    lines = [
        str(applied.attachment(model.model)),
        f"  made for {title_of(reference.model.config.base)}; this model is {model_title(model.model)}",
    ]
    for stream in ("style", "content"):
        tokens = getattr(reference, stream)
        weight = getattr(reference, f"weight_{stream}")
        lines.append(f"  {stream}: {'idle (empty tokens)' if tokens is None else f'{tokens.described()}, weight {weight:g}'}")
    if not reference.active:
        lines.append("  all weights are 0: the model is its own, bit for bit")
    lines.append(
        f"  {applied.start_percent:.0%} to {applied.end_percent:.0%} of sampling"
        + (", masked" if applied.mask is not None else "")
    )
    if count := len(references_of(model)) - 1:
        lines.append(f"  side by side with {count} other reference(s)")
    return "\n".join(lines)
