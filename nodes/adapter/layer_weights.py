"""Strengths per group of layers."""

from __future__ import annotations

from comfy_api.latest import io

from ..schema import LayerWeightsType, schema

# input -> (selector, what it means to a user)
_GROUPS = {
    "self_attention": ("self", "self-attention (shapes and texture of the image with itself)"),
    "cross_attention": ("cross", "cross-attention (where the prompt enters)"),
    "feed_forward": ("feed-forward", "feed-forward layers of the transformer blocks"),
    "convolutions": ("conv", "convolutions (local texture, edges and color)"),
    "down": ("first", "the first half of the U-Net, or the first third of a transformer's blocks (what is in the image)"),
    "mid": ("middle", "the middle of the U-Net, or the middle third of a transformer's blocks (overall composition)"),
    "up": ("last", "the second half of the U-Net, or the last third of a transformer's blocks (how it looks)"),
}


class StyleInjectLayerWeights(io.ComfyNode):
    """A weight per group -> STYLEINJECT_LAYER_WEIGHTS, as text of the core's layer weight language."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        weights = [
            io.Float.Input(
                name,
                default=1.0,
                min=-2.0,
                max=2.0,
                step=0.05,
                round=0.001,
                tooltip=f"Weight of {meaning}. 1 is as trained, 0 switches it off.",
            )
            for name, (_, meaning) in _GROUPS.items()
        ]
        return schema(
            "StyleInjectLayerWeights",
            display_name="StyleInject Layer Weights",
            description="Strengths for groups of layers, for Apply StyleInject. A layer in two groups (cross-attention, up) "
            "gets the product of their weights. Apply's report says which of them match none of an adapter's layers.",
            search_aliases=["block weight", "lora block weight", "layer strength"],
            inputs=[
                *weights,
                io.String.Input(
                    "extra",
                    default="",
                    multiline=True,
                    tooltip="Single weights, one per line, which replace those above for the layers they name: "
                    '"up.1 & cross = 0.5", of a transformer "block.0-9 & image = 0.5". With a * they multiply: "to_v = *0.5".',
                ),
                LayerWeightsType.Input(
                    "layer_weights", optional=True, tooltip="Weights from another such node; the ones here are multiplied in."
                ),
            ],
            outputs=[LayerWeightsType.Output("weights", display_name="layer_weights", tooltip="For Apply StyleInject.")],
        )

    @classmethod
    def execute(cls, extra: str, layer_weights: str = "", **weights: float) -> io.NodeOutput:
        lines = [f"?{_GROUPS[name][0]} = *{weight}" for name, weight in weights.items() if weight != 1]
        return io.NodeOutput("\n".join(part for part in (layer_weights, *lines, extra.strip()) if part))
