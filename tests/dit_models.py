"""Diffusion transformers as MODELs, small and with random weights: ComfyUI's own classes, a few narrow blocks each.

Only for tests that run inside ComfyUI: everything of it is imported in the functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import tiny_model
import torch

WIDTH = 64
CHANNELS = 16


def flux(seed: int = 0) -> Any:
    """Flux: two double blocks with qkv of text and image, two single blocks with qkv and MLP in linear1."""
    from comfy.ldm.flux.model import FluxParams

    newer = {"txt_ids_dims": []} if any(f.name == "txt_ids_dims" for f in fields(FluxParams)) else {}
    return _model("Flux", {
        **newer, "image_model": "flux", "in_channels": CHANNELS, "out_channels": CHANNELS, "patch_size": 2,
        "vec_in_dim": WIDTH, "context_in_dim": tiny_model.CONTEXT, "hidden_size": WIDTH, "mlp_ratio": 4.0, "num_heads": 2,
        "depth": 2, "depth_single_blocks": 2, "axes_dim": [8, 12, 12], "theta": 10000, "qkv_bias": True,
        "guidance_embed": False,
    }, seed)  # fmt: skip


def z_image(seed: int = 0) -> Any:
    """Z-Image (Lumina 2's class): qkv in one Linear, two layers, one refiner layer each for noise and context."""
    return _model("Lumina2", {
        "image_model": "lumina2", "patch_size": 2, "in_channels": CHANNELS, "dim": WIDTH, "cap_feat_dim": tiny_model.CONTEXT,
        "n_layers": 2, "n_refiner_layers": 1, "qk_norm": True, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [8, 12, 12],
        "axes_lens": [64, 64, 64], "multiple_of": 16, "ffn_dim_multiplier": 2.0,
    }, seed)  # fmt: skip


def qwen_image(seed: int = 0) -> Any:
    """Qwen-Image: to_q, to_k, to_v and their text counterparts are layers of their own."""
    return _model("QwenImage", {
        "image_model": "qwen_image", "in_channels": CHANNELS * 4, "out_channels": CHANNELS, "num_layers": 2,
        "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": tiny_model.CONTEXT,
        "axes_dims_rope": (8, 12, 12),
    }, seed)  # fmt: skip


def sd3(seed: int = 0) -> Any:
    """Stable Diffusion 3: joint blocks with qkv of text and image; width is 64 times the depth."""
    context = {"target": "torch.nn.Linear", "params": {"in_features": tiny_model.CONTEXT, "out_features": 128}}
    return _model("SD3", {
        "in_channels": CHANNELS, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": WIDTH,
        "context_embedder_config": context, "num_patches": 256, "pos_embed_max_size": 16, "pos_embed_scaling_factor": None,
        "qk_norm": "rms", "x_block_self_attn_layers": [],
    }, seed)  # fmt: skip


MODELS: dict[str, Callable[..., Any]] = {"Flux": flux, "Z-Image": z_image, "Qwen-Image": qwen_image, "SD 3": sd3}


def _model(kind: str, unet_config: dict[str, Any], seed: int) -> Any:
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    with torch.inference_mode():
        config = getattr(comfy.supported_models, kind)(unet_config)
        config.set_inference_dtype(torch.float32, None)
        base = config.get_model({}, "", device=torch.device("cpu"))
        tiny_model.fill(base.diffusion_model, seed)
        if (positions := getattr(base.diffusion_model, "pos_embed", None)) is not None:
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
