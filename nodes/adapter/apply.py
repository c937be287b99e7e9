"""Putting adapters on a MODEL, and changing their strength afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ...integration import paths
from ...integration.injection import Injection, model_title
from ...integration.patcher import ModelPatcher, apply_adapter, injections_of, set_strength
from ...integration.text_encoder import apply_to_clip
from ...integration.tokens import layers_with_unknown_tokens
from ...styleinject_core import Adapter, load_adapter
from ...styleinject_core.hosts.architectures import describe
from ...styleinject_core.router.control import Rule
from ...styleinject_core.selector import unmatched_weights
from ..schema import (
    STRENGTH_RANGE,
    AdapterType,
    LayerWeightsType,
    RouterControlType,
    adapter_name_input,
    executing_node,
    percent_inputs,
    schema,
    strength_input,
    trigger_of,
    trigger_output,
)

AS_TRAINED, AT_ITS_MEAN = "as trained", "held at its mean"


class StyleInjectApply(io.ComfyNode):
    """MODEL and STYLEINJECT_ADAPTER -> MODEL, with every setting."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectApply",
            display_name="Apply StyleInject",
            description="Applies an adapter to a model. Chain several for several styles; LoRAs may come before or after.",
            search_aliases=["style adapter", "apply style", "lora"],
            advanced=("layers", "router"),
            inputs=[
                io.Model.Input("model", tooltip="The model to restyle. It is not changed itself."),
                AdapterType.Input("adapter", tooltip="The adapter, from Load StyleInject Adapter."),
                strength_input(
                    "How much of the style: 0 is the model alone, 1 the adapter as trained. Negative values and "
                    "values above 1 are allowed."
                ),
                strength_input(
                    "Strength of the learned shapes and detail (DMA, the low-rank part), times strength.",
                    "dma_strength",
                    "detail",
                ),
                strength_input(
                    "Strength of the learned contrast and tone (STA, the statistics part), times strength. A LoRA has none.",
                    "sta_strength",
                    "tone",
                ),
                *percent_inputs(
                    "the adapter",
                    "A later start keeps the composition of the model. ",
                    "An earlier end leaves fine detail to the model. ",
                ),
                io.String.Input(
                    "layers",
                    default="all",
                    tooltip='Which layers to use: "all", or groups such as attention, conv, self, cross, image, down, mid, up, '
                    "up.1, first, block.0-9, to_q. Comma for either, & for both, ! for not: "
                    '"up & cross, mid".',
                ),
                io.Combo.Input(
                    "router",
                    options=[AS_TRAINED, AT_ITS_MEAN],
                    default=AS_TRAINED,
                    optional=True,
                    tooltip="Held at its mean, every picture gets the mix of styles that training used on average: steadier, "
                    "and better for things that the adapter was not trained on. `control` acts after it.",
                ),
                LayerWeightsType.Input(
                    "layer_weights",
                    optional=True,
                    tooltip="Strengths for groups of layers, from StyleInject "
                    "Layer Weights. They multiply the strengths above.",
                ),
                RouterControlType.Input(
                    "control",
                    optional=True,
                    tooltip="What steers the style router, from StyleInject Router Control or Style Mixer.",
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", display_name="MODEL", tooltip="The model with the adapter."),
                io.String.Output(
                    "report", display_name="report", tooltip="Which layers matched, which did not, and with what strength."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        adapter: Adapter,
        strength: float,
        dma_strength: float,
        sta_strength: float,
        start_percent: float,
        end_percent: float,
        layers: str,
        router: str = AS_TRAINED,
        layer_weights: str = "",
        control: Sequence[Rule] = (),
    ) -> io.NodeOutput:
        held = (Rule(hold_mean=True),) if router == AT_ITS_MEAN else ()
        patched, injection = apply_adapter(
            model,
            adapter,
            strength=strength,
            dma=dma_strength,
            sta=sta_strength,
            layers=layers,
            layer_weights=layer_weights or "",
            start_percent=start_percent,
            end_percent=end_percent,
            control=(*held, *(control or ())),
            node_id=executing_node(cls),
        )
        _, line = with_text_encoder(None, adapter)
        return io.NodeOutput(patched, report(patched, injection, line), ui=shown(patched, injection, line))


class StyleInjectLoadAndApply(io.ComfyNode):
    """The one-node path: a file and a strength."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectLoadAndApply",
            display_name="StyleInject",
            description="Puts a style on a model: a file, and how much of it. Apply StyleInject has more settings.",
            search_aliases=["load and apply styleinject", "style", "style adapter", "lora", "load lora", "apply style"],
            inputs=[
                io.Model.Input("model", tooltip="The model to restyle. It is not changed itself."),
                adapter_name_input(),
                strength_input("How much of the style: 0 is the model alone, 1 the adapter as trained."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder, for LoRAs that were trained on it too; it is not changed itself. Without it, "
                    "that part of a file is left out.",
                ),
                io.Float.Input(
                    "clip_strength",
                    default=1.0,
                    optional=True,
                    tooltip="How much of the text encoder's part: 0 is the text encoder alone, 1 the file as trained.",
                    **STRENGTH_RANGE,
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", display_name="MODEL", tooltip="The model with the adapter."),
                trigger_output(),
                io.Clip.Output(
                    "CLIP", display_name="CLIP", tooltip="The text encoder with its part of the file; nothing without clip."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, adapter_name: str | None = None) -> bool | str:
        return paths.problem(adapter_name) or True

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str, **_others: object) -> str:
        return paths.fingerprint(adapter_name)

    @classmethod
    def execute(
        cls, model: ModelPatcher, adapter_name: str, strength: float, clip: Any = None, clip_strength: float = 1.0
    ) -> io.NodeOutput:
        adapter = load_adapter(paths.adapter_path(adapter_name))
        patched, injection = apply_adapter(model, adapter, strength=strength, node_id=executing_node(cls))
        clip, line = with_text_encoder(clip, adapter, clip_strength)
        return io.NodeOutput(patched, trigger_of(adapter), clip, ui=shown(patched, injection, line))


class StyleInjectStrength(io.ComfyNode):
    """MODEL with adapters -> MODEL with the same adapters at another strength."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectStrength",
            display_name="Set StyleInject Strength",
            description="Changes the strength of adapters that are on a model already, one by name or all of them.",
            search_aliases=["rescale style", "adapter strength"],
            inputs=[
                io.Model.Input("model", tooltip="A model that has adapters, from Apply StyleInject."),
                io.String.Input(
                    "adapter_name", default="all", tooltip='The adapter\'s file name, or "all" for every adapter on the model.'
                ),
                strength_input(
                    "The new strength, in place of the one it was applied with. Detail, tone and layer strengths stay."
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", display_name="MODEL", tooltip="The model with the adapters at the new strength.")
            ],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, adapter_name: str, strength: float) -> io.NodeOutput:
        return io.NodeOutput(set_strength(model, adapter_name, strength))


def with_text_encoder(clip: Any, adapter: Adapter, strength: float | None = None) -> tuple[Any, str]:
    """The CLIP with its part of the adapter's file, and what the report says of it; nothing where there is nothing to say."""
    if clip is not None:
        return apply_to_clip(clip, adapter, 1.0 if strength is None else strength)
    count = len(adapter.skipped)
    return None, f"  text encoder: {count} tensors left out; the node StyleInject puts them on a CLIP" if count else ""


def shown(model: ModelPatcher, injection: Injection, line: str = "") -> dict[str, Sequence[str]]:
    """What the node itself shows: how many layers matched, and what the model is. Under a key of the pack's own: text under
    ComfyUI's would be listed among the results of a run."""
    matched = injection.report(model.model)
    used = len(injection.applied.layer_scales())
    text = f"{len(matched.matched)} of {matched.total} layers, {model_title(model.model)}"
    if used != len(matched.matched):
        text += f"\n{used} of them chosen by layers"
    if matched.unmatched:
        text += f"\nnot in this model: {', '.join(matched.unmatched[:2])}" + (" ..." if len(matched.unmatched) > 2 else "")
    if matched.narrowed:
        text += f"\nmore input channels in this model, changed are those it was made for: {', '.join(matched.narrowed)}"
    if matched.unused:
        text += f"\nnot supported: {len(matched.unused)} layers"
    if line:
        text += f"\n{line.strip()}"
    if trigger := trigger_of(injection.applied.adapter):
        text += f"\ntrigger: {trigger}"
    return {"styleinject_text": (text,)}


def report(model: ModelPatcher, injection: Injection, line: str = "") -> str:
    """What Apply did, for people."""
    applied = injection.applied
    scales = list(applied.layer_scales().values())
    lines = [
        str(injection.report(model.model)),
        f"  made for {describe(applied.adapter)}; this model is {model_title(model.model)}",
        f"  strength {applied.strength:g} (detail {applied.dma:g}, tone {applied.sta:g}), "
        f"{injection.start_percent:.0%} to {injection.end_percent:.0%} of sampling",
        f'  layers "{applied.layers.strip()}": {len(scales)}, weights {min(scales):g} to {max(scales):g}',
    ]
    mixed = layers_with_unknown_tokens(model.model, applied.adapter)
    if mixed:
        lines.append(
            f"  in {len(mixed)} layers the image's tokens cannot be told from the prompt's, as this architecture is not known: "
            f"router and statistics look at all of them ({', '.join(mixed[:2])}{' ...' if len(mixed) > 2 else ''})"
        )
    if idle := unmatched_weights(applied.adapter.shapes, applied.layer_weights):
        lines.append(f"  layer weights of {', '.join(idle)} change nothing: the adapter has no such layers")
    if injection.control:
        lines.append(f"  router steered by {len(injection.control)} control(s)")
    if line:
        lines.append(line)
    names = [other.applied.adapter.name for other in injections_of(model)[:-1]]
    if names:
        lines.append(f"  beside {', '.join(names)}")
    return "\n".join(lines)
