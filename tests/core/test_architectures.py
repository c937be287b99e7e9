"""The architecture tables against diffusers' own U-Nets, built without memory on the meta device."""

from __future__ import annotations

import pytest
import torch

from styleinject_core.adapter import host_shapes
from styleinject_core.demo.model import UNET_CONFIG
from styleinject_core.hosts.architectures import ARCHITECTURES

DIFFUSERS = {
    "sd15": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "demo": UNET_CONFIG,
}


@pytest.mark.parametrize("base", DIFFUSERS)
def test_shapes_equal_diffusers(base):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**DIFFUSERS[base])
    assert ARCHITECTURES[base].shapes() == host_shapes(unet)
