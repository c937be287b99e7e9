"""The embedded text-to-image model inside ComfyUI: a graph that draws emoji in seconds, with nothing to download."""

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

from ..styleinject_core.demo.autoencoder import LATENT_CHANNELS
from ..styleinject_core.demo.model import NOISE_SCHEDULE, UNET_CONFIG, load_autoencoder, load_text_encoder, read_base
from ..styleinject_core.demo.text import words
from .patcher import ModelPatcher, wrap
from .schema import schema


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


def demo_model(disable_dynamic: bool = False) -> ModelPatcher:
    """The embedded model as a MODEL."""
    load_device, offload_device = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    patcher = wrap(base_model(read_base("unet")[0]), load_device, offload_device, disable_dynamic)
    patcher.cached_patcher_init = (demo_model, ())
    return patcher


class StyleInjectDemoModel(io.ComfyNode):
    """-> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectDemoModel",
            display_name="StyleInject Demo Model",
            description="A tiny text-to-image model that comes with this pack: it draws emoji of 64x64 pixels in seconds.",
            search_aliases=["demo", "emoji", "tiny model"],
            inputs=[],
            outputs=[io.Model.Output("MODEL", display_name="MODEL", tooltip="For the KSampler; its adapters are marked demo.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(demo_model())


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
        context = encoder([text])  # (1, 8, 128)
        return io.NodeOutput([[context, {"pooled_output": context.mean(1)}]], ", ".join(unknown))


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
        images = (load_autoencoder().decode(latents.float().cpu()) + 1) / 2  # (B, 3, 8H, 8W)
        if upscale > 1:
            images = F.interpolate(images, scale_factor=upscale, mode="bicubic").clamp(0, 1)
        return io.NodeOutput(images.movedim(1, -1))  # (B, 8H, 8W, 3)
