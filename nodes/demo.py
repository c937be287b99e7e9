"""The embedded text-to-image model inside ComfyUI: graphs that draw and train on emoji, with nothing to download."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.supported_models_base
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor
from torch.nn import functional as F

from ..styleinject_core.demo import data
from ..styleinject_core.demo.autoencoder import LATENT_CHANNELS
from ..styleinject_core.demo.model import NOISE_SCHEDULE, UNET_CONFIG, load_autoencoder, load_text_encoder, read_unet
from ..styleinject_core.demo.text import TextEncoder, words
from .patcher import ModelPatcher, wrap
from .schema import schema

_OTHERS = "all but the base's"


class DemoLatent(comfy.latent_formats.LatentFormat):
    """16 channels at an eighth of the size, normalised by the autoencoder itself."""

    scale_factor = 1.0
    latent_channels = LATENT_CHANNELS
    spacial_downscale_ratio = 8


class StyleInjectDemoConfig(comfy.supported_models_base.BASE):
    """The embedded model as ComfyUI describes models."""

    title = "StyleInject demo"  # in reports and errors
    unet_extra_config = {"num_heads": UNET_CONFIG["attention_head_dim"], "num_head_channels": -1}
    sampling_settings = {"linear_start": NOISE_SCHEDULE["beta_start"], "linear_end": NOISE_SCHEDULE["beta_end"]}
    latent_format = DemoLatent
    memory_usage_factor = 1.0

    def model_type(self, state_dict: dict[str, Tensor], prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.V_PREDICTION

    def inpaint_model(self) -> bool:
        return False  # the channels beyond four are the autoencoder's, not a mask


def unet_config() -> dict[str, Any]:
    """diffusers' description of the U-Net in ComfyUI's terms."""
    channels = UNET_CONFIG["block_out_channels"]
    levels, blocks = len(channels), UNET_CONFIG["layers_per_block"]
    return {
        "image_size": 32,
        "in_channels": UNET_CONFIG["in_channels"],
        "out_channels": UNET_CONFIG["out_channels"],
        "model_channels": channels[0],
        "channel_mult": [width // channels[0] for width in channels],
        "num_res_blocks": [blocks] * levels,
        "transformer_depth": [1] * levels * blocks,
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1] * levels * (blocks + 1),
        "context_dim": UNET_CONFIG["cross_attention_dim"],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "use_temporal_attention": False,
        "adm_in_channels": None,
        "legacy": False,
    }


def base_model(state: dict[str, Tensor]) -> comfy.model_base.BaseModel:
    """ComfyUI's model with the weights of the diffusers U-Net.

    Args:
        state: the U-Net's state dict, diffusers names.
    """
    config = StyleInjectDemoConfig(unet_config())
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device=comfy.model_management.unet_offload_device())
    table = comfy.utils.unet_to_diffusers(config.unet_config)
    model.diffusion_model.load_state_dict({table[name]: value for name, value in state.items()})
    return model


def demo_model(style: str = data.BASE_STYLE, disable_dynamic: bool = False) -> ModelPatcher:
    """The embedded model as a MODEL, or the one that draws another style."""
    load_device, offload_device = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    patcher = wrap(base_model(read_unet(style)), load_device, offload_device, disable_dynamic)
    patcher.cached_patcher_init = (demo_model, (style,))
    return patcher


class DemoVAE:
    """The embedded autoencoder by the two methods that VAE Encode and VAE Decode call."""

    def __init__(self) -> None:
        self.autoencoder = load_autoencoder()

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1], sides multiples of 8 -> (B, 16, H/8, W/8)."""
        with torch.no_grad():
            return self.autoencoder.encode(pixels[..., :3].movedim(-1, 1).float().cpu() * 2 - 1)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 16, h, w) -> (B, 8h, 8w, 3) in [0, 1]."""
        with torch.no_grad():
            return ((self.autoencoder.decode(latents.float().cpu()) + 1) / 2).movedim(1, -1)


class StyleInjectDemoModel(io.ComfyNode):
    """-> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectDemoModel",
            display_name="StyleInject Demo Model",
            description="A tiny text-to-image model that comes with this pack: it draws emoji of 64x64 pixels in seconds.",
            search_aliases=["demo", "emoji", "tiny model"],
            inputs=[
                io.Combo.Input(
                    "style",
                    options=data.styles(),
                    default=data.BASE_STYLE,
                    tooltip=f"What it draws. {data.BASE_STYLE} is the model that the demo's adapters are for; the others are "
                    "checkpoints tuned to another style, as teachers for Distill StyleInject.",
                )
            ],
            outputs=[
                io.Model.Output("MODEL", display_name="MODEL", tooltip="For the KSampler; its adapters are marked demo."),
                io.Vae.Output("VAE", display_name="VAE", tooltip="For VAE Encode, VAE Decode and StyleInject Train Options."),
            ],
        )

    @classmethod
    def execute(cls, style: str = data.BASE_STYLE) -> io.NodeOutput:
        return io.NodeOutput(demo_model(style), DemoVAE())


class StyleInjectDemoPrompt(io.ComfyNode):
    """Text -> CONDITIONING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectDemoPrompt",
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
                    tooltip="Words of the prompt that the demo model has never seen, and left out.",
                ),
            ],
        )

    @classmethod
    def execute(cls, text: str) -> io.NodeOutput:
        encoder = load_text_encoder()
        unknown = encoder.unknown_words(text)
        if unknown and len(unknown) == len(words(text)):
            known = ", ".join(encoder.vocabulary[:: max(1, len(encoder.vocabulary) // 12)])
            raise ValueError(f"the demo model knows none of these words: {', '.join(unknown)}. Some that it knows: {known}")
        return io.NodeOutput(_conditioning(encoder, text), ", ".join(unknown))


class StyleInjectDemoDataset(io.ComfyNode):
    """-> the demo's drawings, as training wants them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectDemoDataset",
            display_name="StyleInject Demo Dataset",
            description="Drawings by five artists of the same 223 things, with their names, for trying the training nodes. "
            "Each style has a licence of its own: see ATTRIBUTION.md.",
            search_aliases=["demo", "emoji", "training data"],
            inputs=[
                io.Combo.Input(
                    "style",
                    options=[*data.styles(), _OTHERS],
                    default="openmoji-line",
                    tooltip=f'Whose drawings. "{_OTHERS}" gives every drawing of a thing but the base model\'s own.',
                ),
                io.String.Input(
                    "things",
                    default="",
                    tooltip='Which things, with a comma between them: "turtle, owl". Empty for the 186 that the demo trains '
                    "on; the other 37 are kept to see whether a style reaches what it was never shown on.",
                ),
                io.Int.Input("count", default=0, min=0, max=1000, tooltip="How many at most, evenly chosen; 0 for all."),
                io.String.Input(
                    "prompt", default="", tooltip="The prompt of every drawing; empty for the name of what it shows."
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
            ],
        )

    @classmethod
    def execute(cls, style: str, things: str, count: int, prompt: str) -> io.NodeOutput:
        concepts = data.concepts()
        places = {concept.name: k for k, concept in enumerate(concepts)}
        wanted = [name.strip().lower() for name in things.split(",") if name.strip()]
        if missing := [name for name in wanted if name not in places]:
            raise ValueError(
                f"things: there is no drawing of {missing[0]!r}; there are {', '.join(list(places)[::12])} and others"
            )
        chosen = [places[name] for name in wanted] or [k for k, concept in enumerate(concepts) if not concept.held_out]
        styles = [name for name in data.styles() if name != data.BASE_STYLE] if style == _OTHERS else [style]
        pictures = {name: data.images(name) for name in styles}  # (N, 3, 64, 64)
        drawings = [(pictures[name][k], concepts[k].name) for k in chosen for name in styles]
        if 0 < count < len(drawings):
            drawings = [drawings[k * len(drawings) // count] for k in range(count)]
        images = [(picture.unsqueeze(0).movedim(1, -1) + 1) / 2 for picture, _ in drawings]  # (1, 64, 64, 3)
        vae, encoder = DemoVAE(), load_text_encoder()
        latents = [{"samples": vae.encode(image)} for image in images]
        return io.NodeOutput(latents, [_conditioning(encoder, prompt or name) for _, name in drawings], images)


def _conditioning(encoder: TextEncoder, text: str) -> list:
    context = encoder([text])  # (1, 8, 128)
    return [[context, {"pooled_output": context.mean(1)}]]


class StyleInjectDemoDecode(io.ComfyNode):
    """LATENT -> IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectDemoDecode",
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
