"""The embedded text-to-image model inside ComfyUI: its MODEL, VAE and CONDITIONING."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor

from ..styleinject_core.demo import data
from ..styleinject_core.demo.autoencoder import LATENT_CHANNELS
from ..styleinject_core.demo.deadiff import BASE_FILE as FIVE_STYLES_FILE
from ..styleinject_core.demo.deadiff import FIVE_STYLES
from ..styleinject_core.demo.model import NOISE_SCHEDULE, UNET_CONFIG, load_autoencoder, load_text_encoder, read_base, read_unet
from ..styleinject_core.demo.text import TextEncoder, words
from .patcher import ModelPatcher, wrap


class DemoLatent(comfy.latent_formats.LatentFormat):
    """16 channels at an eighth of the size, normalized by the autoencoder itself."""

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


def _state(style: str) -> dict[str, Tensor]:
    return read_base("unet", FIVE_STYLES_FILE)[0] if style == FIVE_STYLES else read_unet(style)


def demo_model(style: str = data.BASE_STYLE, disable_dynamic: bool = False) -> ModelPatcher:
    """The embedded model as a MODEL, or the one that draws another style, or all five."""
    load_device, offload_device = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    patcher = wrap(base_model(_state(style)), load_device, offload_device, disable_dynamic)
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


class DemoCLIP:
    """The embedded text encoder by the two methods that CLIP Text Encode calls, so that a graph made for it fits any model."""

    def __init__(self, style: str = data.BASE_STYLE) -> None:
        self.encoder = load_text_encoder(FIVE_STYLES_FILE) if style == FIVE_STYLES else load_text_encoder()

    def tokenize(self, text: str, **_others: Any) -> str:
        """The prompt itself.

        Raises:
            ValueError: a prompt of which the model knows no word; names some it knows.
        """
        check_known(self.encoder, text)
        return text

    def encode_from_tokens_scheduled(self, tokens: str, **_others: Any) -> list:
        """What `tokenize` returned -> CONDITIONING."""
        return demo_conditioning(self.encoder, tokens)


def check_known(encoder: TextEncoder, text: str) -> list[str]:
    """The words of a prompt that the model does not know. Raises ValueError: it knows none of them; names some it knows."""
    unknown = encoder.unknown_words(text)
    if unknown and len(unknown) == len(words(text)):
        known = ", ".join(encoder.vocabulary[:: max(1, len(encoder.vocabulary) // 12)])
        raise ValueError(f"the demo model knows none of these words: {', '.join(unknown)}. Some that it knows: {known}")
    return unknown


def demo_conditioning(encoder: TextEncoder, text: str) -> list:
    """A CONDITIONING of one prompt."""
    context = encoder([text])  # (1, 8, 128)
    return [[context, {"pooled_output": context.mean(1)}]]
