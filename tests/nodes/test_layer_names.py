"""The grammar of layer names against ComfyUI: its own tables of names, and the modules of its own models."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import Any

import pytest
import torch

AXES = {"axes_dim": [8, 12, 12], "theta": 10000}
FLUX = {"in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 64, "context_in_dim": 64, "hidden_size": 64,
        "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 3, **AXES, "qkv_bias": True, "guidance_embed": True,
        "image_model": "flux", "txt_ids_dims": []}  # fmt: skip
LUMINA = {"patch_size": 2, "in_channels": 16, "dim": 64, "n_layers": 3, "n_heads": 2, "n_kv_heads": 2, "n_refiner_layers": 2,
          "axes_dims": [8, 12, 12], "axes_lens": [10, 10, 10], "qk_norm": True, "cap_feat_dim": 64}  # fmt: skip
SD3 = {"input_size": None, "patch_size": 2, "in_channels": 16, "depth": 3, "adm_in_channels": 64, "qk_norm": "rms", "num_patches": 256,
       "x_block_self_attn_layers": [0], "pos_embed_max_size": 16,
       "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 192}}}  # fmt: skip
WAN = {"dim": 64, "ffn_dim": 64, "num_heads": 2, "num_layers": 3, "text_dim": 64, "freq_dim": 64}
# name -> module, class, settings; layers that "default" chooses; blocks of the main list, single ones
MODELS: dict[str, tuple[str, str, dict[str, Any], int, int, int]] = {
    "Flux": ("flux.model", "Flux", FLUX, 2 + 3, 2, 3),
    "Flux 2": ("flux.model", "Flux", {**FLUX, "image_model": "flux2", "vec_in_dim": None, "txt_ids_dims": [3], "axes_dim": [8, 8, 8, 8],
                                      "global_modulation": True, "mlp_silu_act": True, "ops_bias": False}, 2 + 3, 2, 3),
    "Chroma": ("chroma.model", "Chroma", {**FLUX, "in_dim": 64, "out_dim": 64, "hidden_dim": 64, "n_layers": 2}, 2 + 3, 2, 3),
    "Z-Image": ("lumina.model", "NextDiT", {**LUMINA, "z_image_modulation": True}, 3 + 2, 3, 0),
    "Lumina2": ("lumina.model", "NextDiT", LUMINA, 3 + 2, 3, 0),
    "Qwen-Image": ("qwen_image.model", "QwenImageTransformer2DModel", {
        "num_layers": 3, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 64, "axes_dims_rope": (8, 12, 12),
        "out_channels": 16}, 2 * 3, 3, 0),
    "SD 3.5": ("modules.diffusionmodules.mmdit", "MMDiT", SD3, 3 + 1, 3, 0),
    "Wan": ("wan.model", "WanModel", {**WAN, "model_type": "t2v"}, 4 * 3, 3, 0),
    "Wan of images": ("wan.model", "WanModel", {**WAN, "model_type": "i2v"}, 4 * 3, 3, 0),
}  # fmt: skip


def linears(module: str, kind: str, settings: dict[str, Any]) -> list[str]:
    """The names of a model's Linears, made without memory; skips where this ComfyUI has no such model."""
    import comfy.ops

    try:
        model_class = getattr(import_module(f"comfy.ldm.{module}"), kind)
    except (ImportError, AttributeError):
        pytest.skip(f"this ComfyUI has no {kind}")
    known = inspect.signature(model_class.__init__).parameters
    if kind in ("Flux", "Chroma"):
        params = import_module(f"comfy.ldm.{module}")
        known = inspect.signature(getattr(params, f"{kind}Params")).parameters
        if settings.get("global_modulation") and "global_modulation" not in known:
            pytest.skip("this ComfyUI has no Flux 2")
    settings = {name: value for name, value in settings.items() if name in known or name == "image_model"}
    with torch.device("meta"):
        made = model_class(**settings, operations=comfy.ops.disable_weight_init, device="meta", dtype=torch.float32)
    return [name for name, part in made.named_modules() if isinstance(part, torch.nn.Linear)]


@pytest.fixture(scope="module")
def names(pack):
    return pack.submodule("styleinject_core.layer_names")


@pytest.mark.parametrize("model", MODELS)
def test_the_modules_of_comfyuis_models(names, model):
    module, kind, settings, default, blocks, singles = MODELS[model]
    layers = names.parse_all(linears(module, kind, settings))
    assert not [name for name, layer in layers.items() if layer.kind in ("other", "norm")]
    assert {layer.block for layer in layers.values() if layer.stack == "block"} == set(range(blocks))
    assert {layer.block for layer in layers.values() if layer.stack == "single"} == set(range(singles))
    assert sum(layer.is_default for layer in layers.values()) == default
    assert all(layer.stream for layer in layers.values() if layer.stack)
    groups = names.groups(layers)
    assert set(groups["all"]) == set(groups["linear"])
    for word in ("attention", "self", "feed-forward", "image", "text", "first", "last", "default"):
        assert groups[word], word


TABLES = {  # ComfyUI's function -> settings of a model
    "flux_to_diffusers": {"depth": 3, "depth_single_blocks": 3, "hidden_size": 64},
    "mmdit_to_diffusers": {"depth": 3, "num_blocks": 3},
    "z_image_to_diffusers": {"n_layers": 3, "dim": 64, "n_refiner_layers": 2},
    "pixart_to_diffusers": {"depth": 3, "hidden_size": 64},
    "auraflow_to_diffusers": {"n_double_layers": 2, "n_layers": 5},
    "krea2_to_diffusers": {"layers": 3},
}
# Where one spelling says more than the other: Krea 2's diffusers names are those of models with two streams.
LESS = re.compile(r"transformer_blocks\.\d+\.(attn|ff)")


@pytest.mark.parametrize("table", TABLES)
def test_both_spellings_say_the_same(names, table):
    """A layer's parts are the same by its diffusers name and by ComfyUI's, but for fused layers' projections."""
    import comfy.utils

    if not hasattr(comfy.utils, table):
        pytest.skip(f"this ComfyUI has no {table}")
    pairs = {}
    for diffusers, comfyui in getattr(comfy.utils, table)(TABLES[table]).items():
        module = comfyui if isinstance(comfyui, str) else comfyui[0]
        if diffusers.endswith(".weight"):
            pairs[diffusers.removesuffix(".weight")] = module.removesuffix(".weight")
    ours, theirs = names.parse_all(pairs), names.parse_all(pairs.values())
    assert len(pairs) > 20
    for diffusers, comfyui in pairs.items():
        mine, other = ours[diffusers], theirs[comfyui]
        assert (mine.stack, mine.block, mine.third) == (other.stack, other.block, other.third), (diffusers, comfyui)
        if other.kind == "fused":  # ComfyUI's layer has what diffusers' two or four have
            assert mine.kind in ("fused", "attention", "feed-forward"), diffusers
        else:
            assert mine.kind == other.kind or not (mine.has_tokens or other.has_tokens), (diffusers, comfyui)
        if mine.projection != other.projection:
            assert other.projection in ("qkv", "kv") and mine.projection in ("", "q", "k", "v"), (diffusers, comfyui)
        if not (table == "krea2_to_diffusers" and LESS.match(diffusers)):
            assert mine.stream == other.stream, (diffusers, comfyui)
            assert mine.attention == other.attention or other.kind == "fused", (diffusers, comfyui)
