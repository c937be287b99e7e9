"""Nodes that draw with the embedded model: graphs that draw emoji, with nothing to download."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor
from torch.nn import functional as F

from ...integration.demo_model import FIVE_STYLES, DemoCLIP, DemoVAE, check_known, demo_conditioning, demo_model
from ...styleinject_core.demo import data
from ...styleinject_core.demo.autoencoder import LATENT_CHANNELS
from ...styleinject_core.demo.model import load_text_encoder
from ..schema import schema


class StyleInjectDemoModel(io.ComfyNode):
    """-> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectDemoModel",
            section="demo",
            display_name="StyleInject Demo Model",
            description="A tiny text-to-image model that comes with this pack: it draws emoji of 64x64 pixels in seconds.",
            search_aliases=["demo", "emoji", "tiny model"],
            inputs=[
                io.Combo.Input(
                    "style",
                    options=[*data.styles(), FIVE_STYLES],
                    default=data.BASE_STYLE,
                    tooltip=f"What it draws. {data.BASE_STYLE} is the model that the demo's adapters are for; the others are "
                    f'checkpoints tuned to another style, as teachers for Distill StyleInject. "{FIVE_STYLES}" draws all of '
                    "them, by a word or a reference image, and is what the demo's DEADiff is for.",
                )
            ],
            outputs=[
                io.Model.Output("MODEL", display_name="MODEL", tooltip="For the KSampler; its adapters are marked demo."),
                io.Vae.Output("VAE", display_name="VAE", tooltip="For VAE Encode, VAE Decode and StyleInject Train Options."),
                io.Clip.Output("CLIP", display_name="CLIP", tooltip="For CLIP Text Encode. It knows a few hundred words."),
            ],
        )

    @classmethod
    def execute(cls, style: str = data.BASE_STYLE) -> io.NodeOutput:
        return io.NodeOutput(demo_model(style), DemoVAE(), DemoCLIP(style))


class StyleInjectDemoPrompt(io.ComfyNode):
    """Text -> CONDITIONING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectDemoPrompt",
            section="demo",
            display_name="StyleInject Demo Prompt",
            description="A prompt for the demo model: the name of something there is an emoji of.",
            search_aliases=["demo", "emoji", "text encode"],
            inputs=[
                io.String.Input(
                    "text",
                    default="red apple",
                    tooltip='What to draw: "red apple", "cat face". Left empty it is '
                    "the negative prompt. At most eight words count.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("CONDITIONING", display_name="CONDITIONING", tooltip="For the KSampler."),
                io.String.Output(
                    "unknown",
                    display_name="unknown",
                    tooltip="Words of the prompt that the demo model has never seen; they were left out.",
                ),
            ],
        )

    @classmethod
    def execute(cls, text: str) -> io.NodeOutput:
        encoder = load_text_encoder()
        unknown = check_known(encoder, text)
        return io.NodeOutput(demo_conditioning(encoder, text), ", ".join(unknown))


class StyleInjectDemoDecode(io.ComfyNode):
    """LATENT -> IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectDemoDecode",
            section="demo",
            display_name="StyleInject Demo Decode",
            description="Turns latents of the demo model into images.",
            search_aliases=["demo", "emoji", "vae decode"],
            inputs=[
                io.Latent.Input("samples", tooltip="Latents from a KSampler with StyleInject Demo Model."),
                io.Int.Input(
                    "upscale",
                    default=4,
                    min=1,
                    max=16,
                    tooltip="How much larger to make the image, for looking at: 4 turns 64x64 pixels into 256x256.",
                ),
            ],
            outputs=[io.Image.Output("IMAGE", display_name="IMAGE", tooltip="The decoded images.")],
        )

    @classmethod
    def execute(cls, samples: dict[str, Tensor], upscale: int) -> io.NodeOutput:
        latents = samples["samples"]
        if latents.ndim != 4 or latents.shape[1] != LATENT_CHANNELS:
            raise ValueError(
                f"these latents have shape {tuple(latents.shape)}, those of the demo model have {LATENT_CHANNELS} channels: "
                "sample with StyleInject Demo Model, and decode other models' latents with VAE Decode"
            )
        images = DemoVAE().decode(latents)  # (B, 8H, 8W, 3)
        if upscale > 1:
            large = F.interpolate(images.movedim(-1, 1), scale_factor=upscale, mode="bicubic")
            images = large.clamp(0, 1).movedim(1, -1)
        return io.NodeOutput(images)
