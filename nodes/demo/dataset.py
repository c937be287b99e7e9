"""The demo's drawings as training data."""

from __future__ import annotations

from comfy_api.latest import io

from ...integration.demo_model import DemoVAE, demo_conditioning
from ...styleinject_core.demo import data
from ...styleinject_core.demo.model import load_text_encoder
from ..schema import schema

_OTHERS = "all but the base's"
_WORDS = ", ".join(f"{word} for {style}" for style, word in data.STYLE_WORDS.items())


class StyleInjectDemoDataset(io.ComfyNode):
    """-> the demo's drawings, as training wants them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectDemoDataset",
            section="demo",
            display_name="StyleInject Demo Dataset",
            description="Drawings by five artists of the same 223 things, with their names, for trying the training nodes. "
            "Each style has a license of its own: see ATTRIBUTION.md.",
            search_aliases=["demo", "emoji", "training data"],
            inputs=[
                io.Combo.Input(
                    "style",
                    options=[*data.styles(), _OTHERS],
                    default="openmoji-line",
                    tooltip=f'Whose drawings. "{_OTHERS}" gives all drawings of each thing but the base model\'s own.',
                ),
                io.String.Input(
                    "things",
                    default="",
                    tooltip='Which things, separated by commas: "turtle, owl". Empty for the 186 that the demo trains '
                    "on; the other 37 are kept to see whether a style carries over to things it was never trained on.",
                ),
                io.Int.Input(
                    "count", default=0, min=0, max=1000, tooltip="At most this many drawings, spread evenly; 0 for all."
                ),
                io.String.Input(
                    "prompt", default="", tooltip="The prompt of every drawing; empty for the name of what it shows."
                ),
                io.Boolean.Input(
                    "style_words",
                    default=False,
                    optional=True,
                    tooltip='Puts the word for its style before each prompt, as in "flat turtle": '
                    f"{_WORDS}. The model's own style has none.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "latents", display_name="latents", is_output_list=True, tooltip="A list of latents, one per drawing."
                ),
                io.Conditioning.Output(
                    "conditioning", display_name="conditioning", is_output_list=True, tooltip="A prompt for each of them."
                ),
                io.Image.Output("images", display_name="images", is_output_list=True, tooltip="The drawings, 64x64 pixels."),
                io.String.Output(
                    "image_styles",
                    display_name="image_styles",
                    is_output_list=True,
                    tooltip="The style of each drawing, by its word, for several styles in one adapter of Train StyleInject.",
                ),
            ],
        )

    @classmethod
    def execute(cls, style: str, things: str, count: int, prompt: str, style_words: bool = False) -> io.NodeOutput:
        styles = list(data.STYLE_WORDS) if style == _OTHERS else [style]
        drawings = data.drawings(styles, things, count)
        images = [(picture.unsqueeze(0).movedim(1, -1) + 1) / 2 for picture, _, _ in drawings]  # (1, 64, 64, 3)
        vae, encoder = DemoVAE(), load_text_encoder()
        latents = [{"samples": vae.encode(image)} for image in images]
        words = data.STYLE_WORDS if style_words else {}
        texts = [f"{words.get(drawn, '')} {prompt or name}".strip() for _, name, drawn in drawings]
        image_styles = [data.STYLE_WORDS.get(drawn, drawn) for _, _, drawn in drawings]
        return io.NodeOutput(latents, [demo_conditioning(encoder, text) for text in texts], images, image_styles)
