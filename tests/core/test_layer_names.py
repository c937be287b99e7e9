"""The grammar of layer names: names of every architecture with the parts they have, the words that choose them, labels."""

from __future__ import annotations

import re

import pytest
import torch

from styleinject_core import LayerShape, SelectorError
from styleinject_core.hosts.architectures import ARCHITECTURES
from styleinject_core.layer_names import WORDS, LayerName, dotted, groups, is_block, parse, parse_all
from styleinject_core.selector import parse_weights, select, unmatched_weights

# name -> side, block, index, kind, attention, projection, stream, third
UNET = {
    "conv_in": ("", None, (), "embedding", "", "", "image", ""),
    "time_embedding.linear_1": ("", None, (), "time", "", "", "", ""),
    "add_embedding.linear_2": ("", None, (), "time", "", "", "", ""),
    "down_blocks.1.resnets.0.conv1": ("down", 1, (0,), "conv", "", "", "image", "first"),
    "down_blocks.1.resnets.1.time_emb_proj": ("down", 1, (1,), "modulation", "", "", "image", "first"),
    "down_blocks.0.attentions.1.proj_in": ("down", 0, (1,), "other", "", "", "image", "first"),
    "down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_q": (
        "down",
        2,
        (1, 9),
        "attention",
        "self",
        "q",
        "image",
        "first",
    ),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (
        "mid",
        None,
        (0, 0),
        "attention",
        "cross",
        "k",
        "text",
        "middle",
    ),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_q": (
        "mid",
        None,
        (0, 0),
        "attention",
        "cross",
        "q",
        "image",
        "middle",
    ),
    "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_out.0": (
        "up",
        1,
        (2, 0),
        "attention",
        "cross",
        "out",
        "image",
        "last",
    ),
    "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj": ("up", 1, (2, 0), "feed-forward", "", "", "image", "last"),
    "up_blocks.0.upsamplers.0.conv": ("up", 0, (), "conv", "", "", "image", "last"),
    "up_blocks.3.resnets.2.conv_shortcut": ("up", 3, (2,), "conv", "", "", "image", "last"),
    "conv_out": ("", None, (), "output", "", "", "image", ""),
    # LDM's, which adapters keep where diffusers has no name for a layer
    "input_blocks.1.1.time_stack.0.attn1.to_q": ("down", None, (), "attention", "self", "q", "image", "first"),
}

# architecture -> name -> stack, block, kind, attention, projection, stream
TRANSFORMERS = {
    "Flux": {
        "x_embedder": ("", None, "embedding", "", "", "image"),
        "context_embedder": ("", None, "embedding", "", "", "text"),
        "time_text_embed.guidance_embedder.linear_1": ("", None, "time", "", "", ""),
        "time_text_embed.text_embedder.linear_2": ("", None, "time", "", "", ""),
        "transformer_blocks.18.norm1.linear": ("block", 18, "modulation", "", "", "image"),
        "transformer_blocks.18.norm1_context.linear": ("block", 18, "modulation", "", "", "text"),
        "transformer_blocks.18.attn.to_q": ("block", 18, "attention", "joint", "q", "image"),
        "transformer_blocks.18.attn.to_out.0": ("block", 18, "attention", "joint", "out", "image"),
        "transformer_blocks.18.attn.add_q_proj": ("block", 18, "attention", "joint", "q", "text"),
        "transformer_blocks.18.attn.add_v_proj": ("block", 18, "attention", "joint", "v", "text"),
        "transformer_blocks.18.attn.to_add_out": ("block", 18, "attention", "joint", "out", "text"),
        "transformer_blocks.18.ff.net.0.proj": ("block", 18, "feed-forward", "", "", "image"),
        "transformer_blocks.18.ff_context.net.2": ("block", 18, "feed-forward", "", "", "text"),
        "single_transformer_blocks.37.attn.to_k": ("single", 37, "attention", "joint", "k", "both"),
        "single_transformer_blocks.37.proj_mlp": ("single", 37, "feed-forward", "", "", "both"),
        "single_transformer_blocks.37.proj_out": ("single", 37, "fused", "joint", "out", "both"),
        "single_transformer_blocks.37.norm.linear": ("single", 37, "modulation", "", "", "both"),
        "norm_out.linear": ("", None, "modulation", "", "", ""),
        "proj_out": ("", None, "output", "", "", "image"),
    },
    "Flux in ComfyUI": {
        "img_in": ("", None, "embedding", "", "", "image"),
        "txt_in": ("", None, "embedding", "", "", "text"),
        "vector_in.in_layer": ("", None, "time", "", "", ""),
        "guidance_in.out_layer": ("", None, "time", "", "", ""),
        "double_blocks.2.img_mod.lin": ("block", 2, "modulation", "", "", "image"),
        "double_blocks.2.img_attn.qkv": ("block", 2, "attention", "joint", "qkv", "image"),
        "double_blocks.2.txt_attn.qkv": ("block", 2, "attention", "joint", "qkv", "text"),
        "double_blocks.2.txt_attn.proj": ("block", 2, "attention", "joint", "out", "text"),
        "double_blocks.2.img_mlp.0": ("block", 2, "feed-forward", "", "", "image"),
        "double_blocks.2.txt_mlp.2": ("block", 2, "feed-forward", "", "", "text"),
        "single_blocks.5.linear1": ("single", 5, "fused", "joint", "qkv", "both"),
        "single_blocks.5.linear2": ("single", 5, "fused", "joint", "out", "both"),
        "single_blocks.5.modulation.lin": ("single", 5, "modulation", "", "", "both"),
        "final_layer.linear": ("", None, "output", "", "", "image"),
        "final_layer.adaLN_modulation.1": ("", None, "modulation", "", "", ""),
    },
    "Flux 2": {
        "double_stream_modulation_txt.linear": ("", None, "modulation", "", "", ""),
        "single_stream_modulation.linear": ("", None, "modulation", "", "", ""),
        "time_guidance_embed.timestep_embedder.linear_1": ("", None, "time", "", "", ""),
        "transformer_blocks.0.ff.linear_in": ("block", 0, "feed-forward", "", "", "image"),
        "transformer_blocks.0.ff_context.linear_out": ("block", 0, "feed-forward", "", "", "text"),
        "single_transformer_blocks.47.attn.to_qkv_mlp_proj": ("single", 47, "fused", "joint", "qkv", "both"),
        "single_transformer_blocks.47.attn.to_out": ("single", 47, "fused", "joint", "out", "both"),
    },
    "Chroma": {
        "distilled_guidance_layer.in_proj": ("", None, "time", "", "", ""),
        "distilled_guidance_layer.layers.0.in_layer": ("", None, "time", "", "", ""),
        "distilled_guidance_layer.layers.4.linear_2": ("", None, "time", "", "", ""),
        "transformer_blocks.18.attn.to_v": ("block", 18, "attention", "joint", "v", "image"),
    },
    "SD 3.5": {
        "pos_embed.proj": ("", None, "embedding", "", "", "image"),
        "transformer_blocks.23.attn.to_k": ("block", 23, "attention", "joint", "k", "image"),
        "transformer_blocks.23.attn.add_k_proj": ("block", 23, "attention", "joint", "k", "text"),
        "transformer_blocks.23.attn2.to_q": ("block", 23, "attention", "self", "q", "image"),
        "transformer_blocks.23.attn2.to_v": ("block", 23, "attention", "self", "v", "image"),
        "transformer_blocks.23.attn2.to_out.0": ("block", 23, "attention", "self", "out", "image"),
    },
    "SD 3.5 in ComfyUI": {
        "x_embedder.proj": ("", None, "embedding", "", "", "image"),
        "y_embedder.mlp.0": ("", None, "time", "", "", ""),
        "joint_blocks.23.context_block.attn.qkv": ("block", 23, "attention", "joint", "qkv", "text"),
        "joint_blocks.23.context_block.mlp.fc1": ("block", 23, "feed-forward", "", "", "text"),
        "joint_blocks.23.context_block.adaLN_modulation.1": ("block", 23, "modulation", "", "", "text"),
        "joint_blocks.23.x_block.attn.proj": ("block", 23, "attention", "joint", "out", "image"),
        "joint_blocks.23.x_block.attn2.qkv": ("block", 23, "attention", "self", "qkv", "image"),
    },
    "Qwen-Image": {
        "img_in": ("", None, "embedding", "", "", "image"),
        "transformer_blocks.59.img_mod.1": ("block", 59, "modulation", "", "", "image"),
        "transformer_blocks.59.attn.to_q": ("block", 59, "attention", "joint", "q", "image"),
        "transformer_blocks.59.attn.add_k_proj": ("block", 59, "attention", "joint", "k", "text"),
        "transformer_blocks.59.img_mlp.net.0.proj": ("block", 59, "feed-forward", "", "", "image"),
        "transformer_blocks.59.txt_mlp.net.2": ("block", 59, "feed-forward", "", "", "text"),
    },
    "Z-Image": {
        "all_x_embedder.2-1": ("", None, "embedding", "", "", "image"),
        "all_final_layer.2-1.linear": ("", None, "output", "", "", "image"),
        "all_final_layer.2-1.adaLN_modulation.1": ("", None, "modulation", "", "", ""),
        "cap_embedder.1": ("", None, "embedding", "", "", "text"),
        "t_embedder.mlp.0": ("", None, "time", "", "", ""),
        "layers.29.attention.to_q": ("block", 29, "attention", "joint", "q", "both"),
        "layers.29.attention.to_out.0": ("block", 29, "attention", "joint", "out", "both"),
        "layers.29.attention.qkv": ("block", 29, "attention", "joint", "qkv", "both"),  # ComfyUI's
        "layers.29.attention.out": ("block", 29, "attention", "joint", "out", "both"),
        "layers.29.feed_forward.w3": ("block", 29, "feed-forward", "", "", "both"),
        "layers.29.adaLN_modulation.0": ("block", 29, "modulation", "", "", "both"),
        "noise_refiner.1.attention.to_v": ("refiner", 1, "attention", "self", "v", "image"),
        "context_refiner.1.attention.to_v": ("refiner", 1, "attention", "self", "v", "text"),
        "context_refiner.1.feed_forward.w1": ("refiner", 1, "feed-forward", "", "", "text"),
    },
    "Lumina2": {
        "time_caption_embed.timestep_embedder.linear_1": ("", None, "time", "", "", ""),
        "time_caption_embed.caption_embedder.1": ("", None, "embedding", "", "", "text"),
        "layers.3.attn.to_k": ("block", 3, "attention", "joint", "k", "both"),
        "layers.3.norm1.linear": ("block", 3, "modulation", "", "", "both"),
        "layers.3.feed_forward.linear_2": ("block", 3, "feed-forward", "", "", "both"),
    },
    "Wan": {
        "patch_embedding": ("", None, "embedding", "", "", "image"),
        "condition_embedder.time_proj": ("", None, "time", "", "", ""),
        "condition_embedder.text_embedder.linear_1": ("", None, "embedding", "", "", "text"),
        "condition_embedder.image_embedder.ff.net.0.proj": ("", None, "embedding", "", "", "reference"),
        "blocks.39.attn1.to_q": ("block", 39, "attention", "self", "q", "image"),
        "blocks.39.attn2.to_q": ("block", 39, "attention", "cross", "q", "image"),
        "blocks.39.attn2.to_k": ("block", 39, "attention", "cross", "k", "text"),
        "blocks.39.attn2.add_v_proj": ("block", 39, "attention", "cross", "v", "reference"),
        "blocks.39.attn2.to_out.0": ("block", 39, "attention", "cross", "out", "image"),
        "blocks.39.ffn.net.0.proj": ("block", 39, "feed-forward", "", "", "image"),
    },
    "Wan in ComfyUI": {
        "text_embedding.2": ("", None, "embedding", "", "", "text"),
        "time_projection.1": ("", None, "time", "", "", ""),
        "img_emb.proj.1": ("", None, "embedding", "", "", "reference"),
        "blocks.39.self_attn.o": ("block", 39, "attention", "self", "out", "image"),
        "blocks.39.cross_attn.v": ("block", 39, "attention", "cross", "v", "text"),
        "blocks.39.cross_attn.k_img": ("block", 39, "attention", "cross", "k", "reference"),
        "blocks.39.ffn.2": ("block", 39, "feed-forward", "", "", "image"),
        "head.head": ("", None, "output", "", "", "image"),
    },
    "HunyuanVideo": {
        "context_embedder.proj_in": ("", None, "embedding", "", "", "text"),
        "context_embedder.time_text_embed.text_embedder.linear_1": ("", None, "time", "", "", ""),
        "context_embedder.token_refiner.refiner_blocks.1.attn.to_q": ("refiner", 1, "attention", "self", "q", "text"),
        "txt_in.individual_token_refiner.blocks.1.self_attn.qkv": ("refiner", 1, "attention", "self", "qkv", "text"),
        "txt_in.individual_token_refiner.blocks.1.mlp.0": ("refiner", 1, "feed-forward", "", "", "text"),
        "double_blocks.3.img_attn_qkv": ("block", 3, "attention", "joint", "qkv", "image"),  # LoRA files'
        "double_blocks.3.txt_attn_proj": ("block", 3, "attention", "joint", "out", "text"),
    },
    "AuraFlow": {
        "joint_transformer_blocks.3.attn.add_q_proj": ("block", 3, "attention", "joint", "q", "text"),
        "single_transformer_blocks.31.attn.to_out.0": ("single", 31, "attention", "joint", "out", "both"),
        "double_layers.3.attn.w1q": ("block", 3, "attention", "joint", "q", "text"),
        "double_layers.3.attn.w2q": ("block", 3, "attention", "joint", "q", "image"),
        "double_layers.3.mlpC.c_fc1": ("block", 3, "feed-forward", "", "", "text"),
        "single_layers.3.attn.w1q": ("single", 3, "attention", "joint", "q", "both"),
        "single_layers.3.modCX.1": ("single", 3, "modulation", "", "", "both"),
    },
    "PixArt": {
        "adaln_single.emb.resolution_embedder.linear_1": ("", None, "modulation", "", "", ""),
        "transformer_blocks.27.attn1.to_q": ("block", 27, "attention", "self", "q", "image"),
        "transformer_blocks.27.attn2.to_v": ("block", 27, "attention", "cross", "v", "text"),
        "blocks.27.attn.qkv": ("block", 27, "attention", "self", "qkv", "image"),
        "blocks.27.cross_attn.kv_linear": ("block", 27, "attention", "cross", "kv", "text"),
    },
    "others": {
        "transformer_blocks.7.attn1.add_k_proj": ("block", 7, "attention", "joint", "k", "text"),  # Mochi
        "double_stream_blocks.3.block.attn1.to_v_t": ("block", 3, "attention", "joint", "v", "text"),  # HiDream
        "double_stream_blocks.3.block.ff_i.experts.1.w2": ("block", 3, "feed-forward", "", "", "image"),
        "single_stream_blocks.3.block.ff_i.shared_experts.w1": ("single", 3, "feed-forward", "", "", "both"),
        "visual_transformer_blocks.3.cross_attention.to_key": ("block", 3, "attention", "cross", "k", "text"),  # Kandinsky 5
        "transformer_blocks.0.attn.img_qkv": ("block", 0, "attention", "joint", "qkv", "image"),  # Lens
        "transformer_blocks.0.attn.txt_qkv": ("block", 0, "attention", "joint", "qkv", "text"),
        "patch_blocks.1.attn.qkv_x": ("block", 1, "attention", "joint", "qkv", "image"),  # PixelDiT
        "patch_blocks.1.attn.qkv_y": ("block", 1, "attention", "joint", "qkv", "text"),
        "pixel_blocks.0.attn.proj": ("pixel", 0, "attention", "self", "out", "image"),
        "language_model.layers.1.self_attn.q_proj": ("block", 1, "attention", "self", "q", "both"),  # HiDream-O1
        "blocks.0.attn.proj_qkv.txt": ("block", 0, "attention", "joint", "qkv", "text"),  # SeedVR2
        "blocks.1.attn.proj_out.all": ("block", 1, "attention", "joint", "out", "both"),
        "blocks.2.v": ("block", 2, "attention", "joint", "v", "both"),  # CogVideoX
        "blocks.2.ff_out": ("block", 2, "feed-forward", "", "", "both"),
        "text_transformer_blocks.1.self_attention.to_value": ("refiner", 1, "attention", "self", "v", "text"),
        "blocks.3.attn.wv": ("block", 3, "attention", "joint", "v", "both"),  # Krea 2
        "blocks.3.mlp.gate": ("block", 3, "feed-forward", "", "", "both"),
        "layers.3.self_attention.to_q": ("block", 3, "attention", "self", "q", "both"),  # Ernie
        "blocks.3.attn2.kv_proj": ("block", 3, "attention", "cross", "kv", "text"),  # HunyuanDiT
        "blocks.3.skip_linear": ("block", 3, "other", "", "", "image"),
        "ref_image_refiner.0.attn.to_q": ("refiner", 0, "attention", "self", "q", "reference"),  # OmniGen 2
        "blocks.block3.blocks.1.block.attn.to_q.0": ("block", 3, "attention", "", "q", "image"),  # Cosmos
        "lyric_encoder.encoders.0.self_attn.linear_q": ("", None, "other", "", "", ""),  # blocks of something else
        "llm_adapter.blocks.0.self_attn.q_proj": ("", None, "other", "", "", ""),
        "something": ("", None, "other", "", "", ""),
        "attender.to_v": ("", None, "other", "", "v", ""),  # of a model that nobody knows
        "": ("", None, "other", "", "", ""),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", UNET)
def test_the_parts_of_a_unets_names(name):
    side, block, index, kind, attention, projection, stream, third = UNET[name]
    assert parse(name) == LayerName(name, side, "", block, index, kind, attention, projection, stream, third)


@pytest.mark.parametrize("model", TRANSFORMERS)
def test_the_parts_of_a_transformers_names(model):
    names = TRANSFORMERS[model]
    for name, parsed in ({name: parse(name) for name in names} if model == "others" else parse_all(names)).items():
        found = (parsed.stack, parsed.block, parsed.kind, parsed.attention, parsed.projection, parsed.stream)
        assert found == names[name], name
        assert (parsed.text, parsed.side, parsed.index) == (name, "", ())


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", "base_model.model.", "model.diffusion_model."])
def test_prefixes_say_nothing(prefix):
    name = "single_transformer_blocks.3.proj_out"
    assert parse(prefix + name) == parse_like(prefix + name, name)


@pytest.mark.parametrize(("kohya", "name"), [
    ("lora_unet_double_blocks_0_img_attn_qkv", "double_blocks.0.img_attn.qkv"),
    ("lora_unet_single_blocks_12_linear1", "single_blocks.12.linear1"),
    ("lora_unet_single_blocks_12_modulation_lin", "single_blocks.12.modulation.lin"),
    ("lora_transformer_transformer_blocks_3_attn_add_q_proj", "transformer_blocks.3.attn.add_q_proj"),
    ("lora_transformer_single_transformer_blocks_3_proj_mlp", "single_transformer_blocks.3.proj_mlp"),
    ("lora_transformer_transformer_blocks_3_ff_context_net_0_proj", "transformer_blocks.3.ff_context.net.0.proj"),
    ("lora_unet_joint_blocks_3_x_block_attn2_qkv", "joint_blocks.3.x_block.attn2.qkv"),
    ("lora_unet_joint_blocks_3_context_block_adaLN_modulation_1", "joint_blocks.3.context_block.adaLN_modulation.1"),
    ("lora_unet__blocks_39_cross_attn_k_img", "blocks.39.cross_attn.k_img"),
    ("lora_unet_layers_7_feed_forward_w1", "layers.7.feed_forward.w1"),
    ("lycoris_noise_refiner_0_attention_to_out_0", "noise_refiner.0.attention.to_out.0"),
    ("lycoris_transformer_blocks_59_img_mlp_net_0_proj", "transformer_blocks.59.img_mlp.net.0.proj"),
])  # fmt: skip
def test_kohyas_spelling_says_the_same(kohya, name):
    assert parse(kohya) == parse_like(kohya, name)
    assert parse(kohya).end == parse(name).end
    assert parse(kohya).ends_with(name.split(".", 2)[2])


def parse_like(text: str, name: str) -> LayerName:
    parsed = parse(name)
    return LayerName(text, *(getattr(parsed, field) for field in list(LayerName.__dataclass_fields__)[1:]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_name_of_a_unet_comes_back_from_kohyas_spelling(architecture):
    for name in ARCHITECTURES[architecture].shapes():
        assert dotted(name.replace(".", "_")) == name


def flux(doubles: int = 19, singles: int = 38) -> dict[str, LayerShape]:
    """Flux in diffusers' spelling: every Linear inside of its blocks."""
    double = ["norm1.linear", "norm1_context.linear", *(f"attn.{p}" for p in ("to_q", "to_k", "to_v", "to_out.0")),
              *(f"attn.{p}" for p in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
              *(f"{ff}.net.{p}" for ff in ("ff", "ff_context") for p in ("0.proj", "2"))]  # fmt: skip
    single = ["norm.linear", "proj_mlp", "proj_out", "attn.to_q", "attn.to_k", "attn.to_v"]
    names = [f"transformer_blocks.{n}.{part}" for n in range(doubles) for part in double]
    names += [f"single_transformer_blocks.{n}.{part}" for n in range(singles) for part in single]
    return dict.fromkeys(["x_embedder", "context_embedder", *names, "proj_out"], LayerShape(64, 64))


def z_image(layers: int = 30) -> dict[str, LayerShape]:
    parts = [*(f"attention.{p}" for p in ("to_q", "to_k", "to_v", "to_out.0")), *(f"feed_forward.w{n}" for n in (1, 2, 3))]
    blocks = [f"layers.{n}" for n in range(layers)] + [f"{r}_refiner.{n}" for r in ("noise", "context") for n in (0, 1)]
    return dict.fromkeys([f"{block}.{part}" for block in blocks for part in parts], LayerShape(64, 64))


def wan(blocks: int = 40) -> dict[str, LayerShape]:
    parts = [
        *(f"{a}_attn.{p}" for a in ("self", "cross") for p in "qkvo"),
        "cross_attn.k_img",
        "cross_attn.v_img",
        "ffn.0",
        "ffn.2",
    ]
    return dict.fromkeys([f"blocks.{n}.{part}" for n in range(blocks) for part in parts], LayerShape(64, 64))


@pytest.mark.parametrize(("layers", "selector", "count"), [
    (flux, "all", 19 * 14 + 38 * 6 + 3),
    (flux, "attention", 19 * 8 + 38 * 4),
    (flux, "feed-forward", 19 * 4 + 38 * 2),
    (flux, "self", 19 * 4 + 38 * 4),
    (flux, "cross", 19 * 4),
    (flux, "image", 19 * 7 + 38 * 6 + 2),
    (flux, "text", 19 * 7 + 38 * 6 + 1),
    (flux, "!text", 19 * 7 + 2),
    (flux, "text & !image", 19 * 7 + 1),
    (flux, "default", 2 * 19 + 2 * 38),
    (flux, "to_q, to_v", 2 * 19 + 2 * 38),
    (flux, "single", 38 * 6),
    (flux, "first", 19 * 14),
    (flux, "middle", 19 * 6),
    (flux, "last", 19 * 6),
    (flux, "block.3", 14),
    (flux, "blocks.0-9", 10 * 14),
    (flux, "blocks.0-9, single.30-99", 10 * 14 + 8 * 6),
    (flux, "single.5 & attention", 4),
    (flux, "*transformer_blocks.3.*", 14 + 6),
    (z_image, "attention", 34 * 4),
    (z_image, "feed-forward", 34 * 3),
    (z_image, "self", 34 * 4),
    (z_image, "image", 32 * 7),
    (z_image, "text", 32 * 7),
    (z_image, "default", 32 * 2),
    (z_image, "refiner", 4 * 7),
    (z_image, "refiner.0 & text", 7),
    (z_image, "first", 10 * 7),
    (z_image, "first, middle, last", 30 * 7),
    (z_image, "block.0-9", 10 * 7),
    (wan, "self", 40 * 4),
    (wan, "cross", 40 * 6),
    (wan, "text", 40 * 2),
    (wan, "image", 40 * 8),
    (wan, "default", 40 * 4),
    (wan, "cross & default", 40 * 2),
    (wan, "first", 13 * 12),
    (wan, "middle", 14 * 12),
    (wan, "last", 13 * 12),
    (wan, "v_img", 40),
])  # fmt: skip
def test_what_words_choose_in_transformers(layers, selector, count):
    assert len(select(layers(), selector)) == count


@pytest.mark.parametrize(("layers", "term", "message"), [
    (flux, "down", "term 'down' matches none of the 497 layers; these have: all, attention, linear, self, cross, feed-forward, text, "
                   "image, single, first, middle, last, queries, keys, values, outputs, default, block.0-18, single.0-37, add_k_proj, add_q_proj, add_v_proj, to_k, to_q, to_v$"),
    (flux, "conv", "term 'conv' matches none"),
    (flux, "block.19", r"term 'block.19' matches none.*block\.0-18"),
    (flux, "block.9-3", "matches none"),
    (flux, "up.1", "matches none"),
    (z_image, "cross", "term 'cross' matches none of the 238 layers; these have: all, attention, linear, self, feed-forward"),
    (z_image, "single", r"matches none.*refiner.*block\.0-29, refiner\.0-1, to_k, to_q, to_v$"),
    (wan, "to_q", r"matches none.*block\.0-39, k, k_img, q, v, v_img$"),
    (lambda: {"lora_unet_double_blocks_0_img_attn_qkv": LayerShape(2, 2)}, "to_q", r"default, block\.0, qkv$"),
])  # fmt: skip
def test_a_word_that_matches_nothing_says_what_would(layers, term, message):
    with pytest.raises(SelectorError, match=message):
        select(layers(), term)


@pytest.mark.parametrize("word", ["down", "mid", "up"])
def test_a_unets_sides_are_its_thirds_and_words_are_not_ends_of_names(word):
    layers = ARCHITECTURES["sdxl"].shapes()
    assert select(layers, word) == select(layers, {"down": "first", "mid": "middle", "up": "last"}[word])
    krea = dict.fromkeys(["blocks.0.mlp.up", "blocks.0.mlp.down", "blocks.0.mlp.mid"], LayerShape(2, 2))
    with pytest.raises(SelectorError, match="matches none"):
        select(krea, word)


@pytest.mark.parametrize("architecture", ["sd15", "sd21", "sdxl", "demo"])
def test_default_is_the_papers_in_a_unet(architecture):
    layers = ARCHITECTURES[architecture].shapes()
    assert select(layers, "default") == select(layers, "to_q, to_v")
    assert select(layers, "feed-forward") == select(layers, "*.ff.net*")
    assert select(layers, "text") == select(layers, "attn2.to_k, attn2.to_v")
    assert not select(layers, "image") & select(layers, "text")
    assert select(layers, "attention") == select(layers, "self, cross")


@pytest.mark.parametrize(("blocks", "thirds"), [
    (1, "m"), (2, "fl"), (3, "fml"), (4, "fmml"), (5, "ffmll"), (28, "f" * 9 + "m" * 10 + "l" * 9), (57, "f" * 19 + "m" * 19 + "l" * 19),
])  # fmt: skip
def test_thirds_of_blocks(blocks, thirds):
    found = [layer.third[0] for layer in parse_all(f"layers.{n}.attention.to_q" for n in range(blocks)).values()]
    assert "".join(found) == thirds


def test_thirds_count_single_blocks_after_the_others_and_leave_refiners_out():
    thirds = {name: layer.third for name, layer in parse_all(flux(2, 4)).items() if name.endswith("to_q")}
    assert list(thirds.values()) == ["first", "first", "middle", "middle", "last", "last"]
    assert parse_all(z_image())["noise_refiner.0.attention.to_q"].third == ""
    assert parse("layers.0.attention.to_q").third == "", "one name does not know how many blocks there are"


def test_attn2_is_sd3s_second_self_attention_only_beside_an_attn():
    name = "transformer_blocks.0.attn2.to_k"
    assert parse_all([name, "transformer_blocks.0.attn1.to_k"])[name].attention == "cross"
    beside = parse_all([name, "transformer_blocks.5.attn.to_q"])[name]
    assert (beside.attention, beside.stream) == ("self", "image")
    assert name in select(dict.fromkeys([name, "transformer_blocks.5.attn.to_q"], LayerShape(2, 2)), "self")


def test_groups_have_every_word_and_every_block_there_is():
    found = groups(flux(11, 2), ())
    assert list(found) == [*WORDS, *(f"block.{n}" for n in range(11)), "single.0", "single.1"]
    assert found["conv"] == found["down"] == [] and len(found["block.10"]) == 14
    unet = ARCHITECTURES["demo"].shapes()
    found = groups(unet, {name for name, shape in unet.items() if shape.is_conv})
    assert list(found)[len(WORDS) :] == ["down.0", "down.1", "up.0", "up.1"]
    for word in ("conv", "linear", "self", "down", "mid", "down.1"):
        assert set(found[word]) == select(unet, word)


def test_weights_say_which_of_their_lines_matched_nothing():
    layers = z_image(3)
    text = "?cross = *0.5\n?self = *0.5; ?conv = 0\n ? down = *2\nfirst = 0.25"
    assert unmatched_weights(layers, text) == ["cross", "conv", "down"]
    weights = parse_weights(layers, text)
    assert (weights["layers.0.attention.to_q"], weights["layers.1.attention.to_q"], weights["layers.1.feed_forward.w1"]) == (
        0.25,
        0.5,
        1,
    )
    with pytest.raises(SelectorError, match="'cross' matches none"):
        unmatched_weights(layers, "cross = 1")


@pytest.mark.parametrize(("name", "label", "block", "role"), [
    ("down_blocks.2.attentions.1.transformer_blocks.3.attn1.to_q", "down 2.1.3 self to_q", "down 2", ("self", "to_q")),
    ("down_blocks.2.attentions.1.proj_in", "down 2.1 proj_in", "down 2", ("proj_in",)),
    ("mid_block.resnets.1.conv2", "mid.1 res conv2", "mid", ("res", "conv2")),
    ("down_blocks.0.downsamplers.0.conv", "down 0 shrink conv", "down 0", ("shrink", "conv")),
    ("conv_out", "conv_out", "conv_out", ()),
    ("single_transformer_blocks.7.proj_mlp", "single_transformer_blocks.7.proj_mlp", "single_transformer_blocks.7", ("ff", "proj_mlp")),
    ("blocks.7.cross_attn.q", "blocks.7.cross_attn.q", "blocks.7", ("cross", "q")),
    ("layers.7.attention.to_out.0", "layers.7.attention.to_out.0", "layers.7", ("joint", "to_out")),
    ("input_blocks.4.1.proj_in", "input_blocks.4.1.proj_in", "input_blocks.4", ("proj_in",)),
])  # fmt: skip
def test_labels(name, label, block, role):
    parsed = parse(name)
    assert (parsed.label, parsed.block_label, parsed.role_label) == (label, block, role)


def test_layers_without_tokens():
    names = [name for model in TRANSFORMERS.values() for name in model]
    without = {name for name in names if not parse(name).has_tokens}
    assert "transformer_blocks.18.norm1.linear" in without and "t_embedder.mlp.0" in without and "vector_in.in_layer" in without
    assert not any(
        re.search(r"attn|attention|ff|mlp\.|_in$", name) for name in without - {"t_embedder.mlp.0", "y_embedder.mlp.0"}
    )


@pytest.mark.parametrize(("module", "expected"), [
    ("down_blocks.0.attentions.1", True), ("mid_block.resnets.0", True), ("up_blocks.1.upsamplers.0", True), ("down_blocks.0", False),
    ("down_blocks.0.1", True), ("input_blocks.4.1", True), ("middle_block.1", True), ("input_blocks.4", False),
    ("transformer_blocks.11", True), ("single_blocks.3", True), ("joint_blocks.0", True), ("layers.29", True), ("blocks.block7", True),
    ("noise_refiner.0", True), ("transformer_blocks", False), ("transformer_blocks.0.attn", False),
    ("distilled_guidance_layer.layers.0", False), ("txt_in.individual_token_refiner.blocks.0", False), ("conv_in", False),
])  # fmt: skip
def test_blocks(module, expected):
    assert is_block(module) is expected


SMALL = {"num_layers": 3, "attention_head_dim": 32, "num_attention_heads": 2}
JOINT = {**SMALL, "joint_attention_dim": 64}
DIFFUSERS = {  # class -> its settings, the targets of "default" in a block, blocks, single blocks, refiners of the image
    "FluxTransformer2DModel": ({**JOINT, "num_single_layers": 2, "pooled_projection_dim": 64, "axes_dims_rope": (8, 12, 12)}, 2, 3, 2, 0),
    "ChromaTransformer2DModel": ({**JOINT, "num_single_layers": 2, "axes_dims_rope": (8, 12, 12), "approximator_hidden_dim": 64,
                                  "approximator_num_channels": 64, "approximator_layers": 2}, 2, 3, 2, 0),
    "SD3Transformer2DModel": ({**JOINT, "sample_size": 16, "caption_projection_dim": 64, "pooled_projection_dim": 64}, 2, 3, 0, 0),
    "QwenImageTransformer2DModel": ({**JOINT, "axes_dims_rope": (8, 12, 12)}, 2, 3, 0, 0),
    "ZImageTransformer2DModel": ({"dim": 64, "n_layers": 3, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 64,
                                  "axes_dims": [8, 12, 12], "axes_lens": [64, 16, 16]}, 2, 3, 0, 2),
    "Lumina2Transformer2DModel": ({"hidden_size": 64, "num_layers": 3, "num_refiner_layers": 2, "num_attention_heads": 2,
                                   "num_kv_heads": 1, "cap_feat_dim": 64, "axes_dim_rope": (8, 12, 12)}, 2, 3, 0, 2),
    "WanTransformer3DModel": ({**SMALL, "text_dim": 64, "freq_dim": 64, "ffn_dim": 64, "image_dim": 64, "added_kv_proj_dim": 64}, 4, 3, 0, 0),
    "PixArtTransformer2DModel": ({**SMALL, "cross_attention_dim": 64, "caption_channels": 64, "sample_size": 16}, 4, 3, 0, 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", DIFFUSERS)
def test_the_names_that_diffusers_models_have(kind):
    diffusers = pytest.importorskip("diffusers", reason="tests of real names need diffusers")
    if not hasattr(diffusers, kind):
        pytest.skip(f"this diffusers has no {kind}")
    settings, per_block, blocks, singles, refiners = DIFFUSERS[kind]
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**settings)
    names = parse_all(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    assert all(layer.kind not in ("other", "norm") for layer in names.values()), [
        n for n, p in names.items() if p.kind == "other"
    ]
    assert {layer.block for layer in names.values() if layer.stack == "block"} == set(range(blocks))
    assert sum(layer.is_default for layer in names.values()) == per_block * (blocks + refiners) + 2 * singles
    assert {layer.third for layer in names.values() if layer.stack == "block"} >= {"first", "middle"}
    assert all(layer.stream for layer in names.values() if layer.stack), "every layer of a block says whose tokens it has"
