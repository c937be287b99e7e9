"""Diffusion transformers as MODELs, small and with random weights: ComfyUI's own classes, a few narrow blocks each.

Only for tests that run inside ComfyUI: everything of it is imported in the functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import tiny_model
import torch

WIDTH = 64
CHANNELS = 16


def flux(seed: int = 0) -> Any:
    """Flux: two double blocks with qkv of text and image, two single blocks with qkv and MLP in linear1."""
    from comfy.ldm.flux.model import FluxParams

    newer = {"txt_ids_dims": []} if any(f.name == "txt_ids_dims" for f in fields(FluxParams)) else {}
    return of("Flux", {
        **newer, "image_model": "flux", "in_channels": CHANNELS, "out_channels": CHANNELS, "patch_size": 2,
        "vec_in_dim": WIDTH, "context_in_dim": tiny_model.CONTEXT, "hidden_size": WIDTH, "mlp_ratio": 4.0, "num_heads": 2,
        "depth": 2, "depth_single_blocks": 2, "axes_dim": [8, 12, 12], "theta": 10000, "qkv_bias": True,
        "guidance_embed": False,
    }, seed)  # fmt: skip


def z_image(seed: int = 0, padded: bool = False) -> Any:
    """Z-Image (Lumina 2's class): qkv in one Linear, two layers, one refiner layer each for noise and context; prompt and image
    are padded to multiples of 32 tokens, in versions that know it."""
    from comfy.ldm.lumina.model import NextDiT

    newer = {"pad_tokens_multiple": 32}
    known = inspect.signature(NextDiT).parameters
    if padded and not newer.keys() <= known.keys():
        pytest.skip("this ComfyUI has no Z-Image")
    return of("Lumina2", {
        **{name: value for name, value in newer.items() if name in known},
        "image_model": "lumina2", "patch_size": 2, "in_channels": CHANNELS, "dim": WIDTH, "cap_feat_dim": tiny_model.CONTEXT,
        "n_layers": 2, "n_refiner_layers": 1, "qk_norm": True, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [8, 12, 12],
        "axes_lens": [64, 64, 64], "multiple_of": 16, "ffn_dim_multiplier": 2.0,
    }, seed)  # fmt: skip


def qwen_image(seed: int = 0) -> Any:
    """Qwen-Image: to_q, to_k, to_v and their text counterparts are layers of their own."""
    return of("QwenImage", {
        "image_model": "qwen_image", "in_channels": CHANNELS * 4, "out_channels": CHANNELS, "num_layers": 2,
        "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": tiny_model.CONTEXT,
        "axes_dims_rope": (8, 12, 12),
    }, seed)  # fmt: skip


def sd3(seed: int = 0) -> Any:
    """Stable Diffusion 3: joint blocks with qkv of text and image; width is 64 times the depth."""
    context = {"target": "torch.nn.Linear", "params": {"in_features": tiny_model.CONTEXT, "out_features": 128}}
    return of("SD3", {
        "in_channels": CHANNELS, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": WIDTH,
        "context_embedder_config": context, "num_patches": 256, "pos_embed_max_size": 16, "pos_embed_scaling_factor": None,
        "qk_norm": "rms", "x_block_self_attn_layers": [],
    }, seed)  # fmt: skip


def sd35(seed: int = 0) -> Any:
    """Stable Diffusion 3.5 medium: the same with a second self-attention in the first block."""
    context = {"target": "torch.nn.Linear", "params": {"in_features": tiny_model.CONTEXT, "out_features": 128}}
    return of("SD3", {
        "in_channels": CHANNELS, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": WIDTH,
        "context_embedder_config": context, "num_patches": 256, "pos_embed_max_size": 16, "pos_embed_scaling_factor": None,
        "qk_norm": "rms", "x_block_self_attn_layers": [0],
    }, seed)  # fmt: skip


def flux2(seed: int = 0) -> Any:
    """Flux 2: modulation shared by all blocks, a gated MLP in linear1; latents of 128 channels, and no smaller patches."""
    return of("Flux2", {
        "image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1, "vec_in_dim": None,
        "context_in_dim": tiny_model.CONTEXT, "hidden_size": WIDTH, "mlp_ratio": 3.0, "num_heads": 2, "depth": 2,
        "depth_single_blocks": 2, "axes_dim": [8, 8, 8, 8], "theta": 2000, "qkv_bias": False, "guidance_embed": False,
        "txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True, "ops_bias": False,
        "default_ref_method": "index", "ref_index_scale": 10.0,
    }, seed)  # fmt: skip


def chroma(seed: int = 0) -> Any:
    """Chroma: Flux without modulation layers, and a small network that makes all of it."""
    from comfy.ldm.chroma.model import ChromaParams

    known = {f.name for f in fields(ChromaParams)}
    newer = {name: value for name, value in {"txt_ids_dims": [], "vec_in_dim": None}.items() if name in known}
    return of("Chroma", {
        **newer, "image_model": "chroma", "in_channels": CHANNELS * 4, "out_channels": CHANNELS * 4, "patch_size": 2,
        "context_in_dim": tiny_model.CONTEXT, "hidden_size": WIDTH, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2,
        "depth_single_blocks": 2, "axes_dim": [8, 12, 12], "theta": 10000, "qkv_bias": True,
        "in_dim": 64, "out_dim": WIDTH, "hidden_dim": WIDTH, "n_layers": 2,
    }, seed)  # fmt: skip


def lumina2(seed: int = 0) -> Any:
    """Lumina 2: as Z-Image, without padding to whole blocks of tokens; keys and values have fewer heads."""
    return of("Lumina2", {
        "image_model": "lumina2", "patch_size": 2, "in_channels": CHANNELS, "dim": WIDTH, "cap_feat_dim": tiny_model.CONTEXT,
        "n_layers": 2, "n_refiner_layers": 1, "qk_norm": True, "n_heads": 2, "n_kv_heads": 1, "axes_dims": [8, 12, 12],
        "axes_lens": [64, 64, 64], "multiple_of": 16, "ffn_dim_multiplier": 2.0,
    }, seed)  # fmt: skip


def wan(seed: int = 0) -> Any:
    """Wan 2.x, text to video: self-attention, and cross-attention to the prompt."""
    return of("WAN21_T2V", {
        "image_model": "wan2.1", "model_type": "t2v", "dim": WIDTH, "ffn_dim": 2 * WIDTH, "num_heads": 2, "num_layers": 3,
        "text_dim": tiny_model.CONTEXT, "freq_dim": WIDTH, "in_dim": CHANNELS, "out_dim": CHANNELS, "patch_size": (1, 2, 2),
        "text_len": 16, "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6, "window_size": (-1, -1),
    }, seed)  # fmt: skip


def ltxv(seed: int = 0) -> Any:
    """LTX Video: blocks that add to what they are given."""
    return of("LTXV", {
        "image_model": "ltxv", "in_channels": 128, "cross_attention_dim": WIDTH, "attention_head_dim": 32,
        "num_attention_heads": 2, "caption_channels": tiny_model.CONTEXT, "num_layers": 2,
    }, seed)  # fmt: skip


def omnigen2(seed: int = 0) -> Any:
    """OmniGen 2: Lumina's blocks, with queries, keys and values apart; it is told how many tokens a prompt has."""
    return of("Omnigen2", {
        "image_model": "omnigen2", "patch_size": 2, "in_channels": CHANNELS, "hidden_size": WIDTH, "num_layers": 2,
        "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": (8, 12, 12),
        "axes_lens": (64, 64, 64), "text_feat_dim": tiny_model.CONTEXT,
    }, seed)  # fmt: skip


def mochi(seed: int = 0) -> Any:
    """Mochi: image and prompt have streams of their own, of two widths."""
    return of("GenmoMochi", {
        "image_model": "mochi_preview", "depth": 2, "patch_size": 2, "num_heads": 2, "hidden_size_x": WIDTH, "hidden_size_y": 32,
        "mlp_ratio_x": 192.0, "mlp_ratio_y": 2.0, "learn_sigma": False, "in_channels": 12, "qk_norm": True, "qkv_bias": False,
        "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True, "posenc_preserve_area": True,
        "timestep_mlp_bias": True, "attend_to_padding": False, "timestep_scale": 1000.0, "use_t5": True,
        "t5_feat_dim": tiny_model.CONTEXT, "t5_token_length": 16, "rope_theta": 10000.0,
    }, seed)  # fmt: skip


def cosmos2(seed: int = 0) -> Any:
    """Cosmos Predict 2: self- and cross-attention on latents whose noise grows without end."""
    return of("CosmosT2IPredict2", {
        "image_model": "cosmos_predict2", "in_channels": CHANNELS, "out_channels": CHANNELS, "max_img_h": 240, "max_img_w": 240,
        "max_frames": 128, "patch_spatial": 2, "patch_temporal": 1, "model_channels": WIDTH, "num_blocks": 2, "num_heads": 2,
        "crossattn_emb_channels": tiny_model.CONTEXT, "concat_padding_mask": True, "pos_emb_cls": "rope3d",
        "pos_emb_learnable": True, "pos_emb_interpolation": "crop", "use_adaln_lora": True, "adaln_lora_dim": 16,
        "extra_per_block_abs_pos_emb": False, "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0,
        "rope_t_extrapolation_ratio": 1.0, "rope_enable_fps_modulation": False,
    }, seed)  # fmt: skip


MODELS: dict[str, Callable[..., Any]] = {"Flux": flux, "Z-Image": z_image, "Qwen-Image": qwen_image, "SD 3": sd3}


def of(kind: str, unet_config: dict[str, Any], seed: int = 0) -> Any:
    """A MODEL of one of ComfyUI's classes; the test is skipped where this ComfyUI has none."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    if not hasattr(comfy.supported_models, kind):
        pytest.skip(f"this ComfyUI has no {kind}")
    with torch.inference_mode():
        config = getattr(comfy.supported_models, kind)(dict(unet_config))
        config.unet_config.update(unet_config)  # some kinds set sizes that no file says
        config.set_inference_dtype(torch.float32, None)
        base = config.get_model({}, "", device=torch.device("cpu"))
        tiny_model.fill(base.diffusion_model, seed)
        if isinstance(positions := getattr(base.diffusion_model, "pos_embed", None), torch.Tensor):
            positions.copy_(
                torch.randn(positions.shape, generator=torch.Generator().manual_seed(seed)) * 0.02
            )  # empty until loaded
    cpu = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu)


def draw(model: Any, steps: int = 2) -> torch.Tensor:
    """Latents of a few steps, as the KSampler node does it, (1, 16, 8, 8); Qwen-Image's have a frame axis."""
    import nodes

    prompt = [[tiny_model.conditioning(0)[0][0], {"pooled_output": torch.ones(1, WIDTH)}]]
    size = (1, CHANNELS, 1, 8, 8) if type(model.model).__name__ == "QwenImage" else (1, CHANNELS, 8, 8)
    with torch.inference_mode():
        latent = {"samples": torch.zeros(size)}
        return nodes.KSampler().sample(model, 5, steps, 1.0, "euler", "simple", prompt, prompt, latent)[0]["samples"]


def diffusers_layers(model: Any, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every Linear of a MODEL by its diffusers name, slices included: name -> (ComfyUI's module, shape of the weight or slice)."""
    import comfy.lora

    shapes = {key: tuple(value.shape) for key, value in model.model.state_dict().items()}
    others = ("attn.to_qkv_mlp_proj", "linear_in", "linear_out")  # Flux 2's and LyCORIS' names of layers that have one already
    found = {}
    for key, place in sorted(comfy.lora.model_lora_keys_unet(model.model, {}).items(), key=lambda item: item[0]):
        if not key.startswith("transformer.") or not wanted(key) or key.endswith(others):
            continue
        if "single_transformer_blocks" in key and key.endswith("attn.to_out"):
            continue
        whole = place if isinstance(place, str) else place[0]
        offset = None if isinstance(place, str) else place[1]
        shape = shapes.get(whole, ())
        if whole.endswith(".weight") and len(shape) == 2:
            rows = shape[0] if offset is None else offset[2]
            found[key.removeprefix("transformer.")] = (whole.removesuffix(".weight"), (rows, shape[1]))
    return found
