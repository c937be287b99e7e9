"""Models that are no Stable Diffusion U-Net: whatever matches by name, and a clear word about the rest."""

from __future__ import annotations

from dataclasses import fields

import comfyui
import pytest
import tiny_model
import torch
from random_adapters import close
from training import assert_clean

WIDTH = 64


def flux_model(seed: int):
    """A Flux-type MODEL: two double blocks and two single blocks of 64 channels, weights random."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    from comfy.ldm.flux.model import FluxParams

    newer = {"txt_ids_dims": []} if any(f.name == "txt_ids_dims" for f in fields(FluxParams)) else {}
    with torch.inference_mode():
        config = comfy.supported_models.Flux(
            {
                **newer,
                "image_model": "flux",
                "in_channels": 16,
                "out_channels": 16,
                "patch_size": 2,
                "vec_in_dim": WIDTH,
                "context_in_dim": tiny_model.CONTEXT,
                "hidden_size": WIDTH,
                "mlp_ratio": 2.0,
                "num_heads": 2,
                "depth": 2,
                "depth_single_blocks": 2,
                "axes_dim": [8, 12, 12],
                "theta": 10000,
                "qkv_bias": True,
                "guidance_embed": False,
            }
        )
        config.set_inference_dtype(torch.float32, None)
        base = config.get_model({}, "", device=torch.device("cpu"))
        tiny_model.fill(base.diffusion_model, seed)
    cpu = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu)


@pytest.fixture(scope="module")
def flux():
    return flux_model(0)


def draw(model) -> torch.Tensor:
    import nodes

    with torch.inference_mode():
        prompt, latent = tiny_model.conditioning(0), {"samples": torch.zeros(1, 16, 8, 8)}
        return nodes.KSampler().sample(model, 5, 2, 1.0, "euler", "simple", prompt, prompt, latent)[0]["samples"]


def test_layers_match_by_comfyuis_and_by_diffusers_names(pack, flux, run_node) -> None:
    core = pack.submodule("styleinject_core")
    square = core.LayerShape(WIDTH, WIDTH)
    names = {
        "double_blocks.0.img_attn.proj": square,  # as in ComfyUI
        "transformer_blocks.0.attn.to_add_out": square,  # diffusers, a layer of its own: txt_attn.proj
        "transformer_blocks.0.attn.to_q": square,  # diffusers, a slice of img_attn.qkv
        "transformer_blocks.7.attn.to_q": square,  # not in this model
    }
    adapter = core.Adapter.create(names, core.AdapterConfig(r=4, n_styles=3, target_modules=("all",)), "ink")
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if not name.endswith(".A"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    patched, report, *_ = run_node("StyleInjectApply", model=flux, adapter=adapter)
    assert "3 of 4 layers matched (75%)" in report
    assert "not in this model (1): transformer_blocks.7.attn.to_q" in report
    assert "this model is Flux" in report
    vanilla = draw(flux)
    assert not close(draw(patched), vanilla, 1e-3)
    assert torch.equal(draw(flux), vanilla)


SQUARES = ["double_blocks.0.img_attn.proj", "double_blocks.1.txt_attn.proj", "transformer_blocks.1.attn.to_out.0"]


def test_layer_weights_say_which_sliders_match_nothing(pack, flux, run_node) -> None:
    core = pack.submodule("styleinject_core")
    shapes = dict.fromkeys(SQUARES, core.LayerShape(WIDTH, WIDTH))
    adapter = core.Adapter.create(shapes, core.AdapterConfig(r=4, n_styles=3, target_modules=("all",)), "ink")

    def applied(**sliders: float) -> tuple[str, list[float]]:
        (weights,) = run_node("StyleInjectLayerWeights", **sliders)
        patched, report, *_ = run_node("StyleInjectApply", model=flux, adapter=adapter, layer_weights=weights)
        (injection,) = pack.submodule("integration.patcher").injections_of(patched)
        return report, list(injection.applied.layer_scales().values())

    sliders = ["self_attention", "cross_attention", "feed_forward", "convolutions", "down", "mid", "up"]
    report, scales = applied(**dict.fromkeys(sliders, 0.0))
    assert scales == [0, 0, 0] and "weights 0 to 0" in report
    assert "layer weights of feed-forward, conv, middle change nothing: the adapter has no such layers" in report
    report, scales = applied(self_attention=0.5, down=0.5, cross_attention=0.25)
    assert scales == [0.25, 0.25, 0.5], "image side first third; prompt's side last; image side last"
    assert "change nothing" not in report
    assert applied(extra="block.1 & text = 2")[1] == [1, 2, 1]
    with pytest.raises(core.SelectorError, match=r"'down' matches none.*image, first, last, outputs, block\.0-1"):
        applied(extra="down = 0.5")


LAYERS = "single, to_out.0, to_add_out"


def images() -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        return {"samples": torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))}


@pytest.mark.skipif(
    "0.8" <= comfyui.comfyui_version(comfyui.find_comfyui()) < "0.9", reason="0.8's rotary embedding has no gradient"
)
def test_blocks_that_work_in_place_train(pack, flux, train, monkeypatch) -> None:
    """Flux's add to what their norms have kept for the backward pass; with and without checkpointing the result is the same."""
    given = {"model": flux, "latents": images(), "layers": LAYERS, "batch_size": 1}
    plain, _, _ = train(**given)
    assert all(layer.B.abs().sum() > 0 for layer in plain.layers.values())
    assert len(plain.layers) == 2 * 2 + 2 * 4  # of the single blocks, queries, keys, values and linear2
    small, _, _ = train(**given, name="small", options={"gradient_checkpointing": True})
    for name, layer in plain.layers.items():
        torch.testing.assert_close(small.layers[name].B, layer.B, rtol=1e-3, atol=1e-5)
    assert_clean(flux)


@pytest.mark.skipif(
    "0.8" <= comfyui.comfyui_version(comfyui.find_comfyui()) < "0.9", reason="0.8's rotary embedding has no gradient"
)
def test_features_of_text_and_image_are_distilled(pack, flux, train) -> None:
    given = {"model": flux, "teacher": flux_model(5), "latents": images(), "layers": LAYERS, "batch_size": 1}
    whole, out = (train("StyleInjectDistill", **given, name=f"w{weight}", feature_weight=weight)[1] for weight in (1.0, 0.0))
    assert all(more > less for more, less in zip(whole.losses, out.losses, strict=True))
