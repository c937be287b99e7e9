"""An adapter takes part in what a run samples, whoever calls the model's layers; where it cannot, that is said once."""

from __future__ import annotations

import logging
import types

import pytest
import torch
from random_adapters import close, random_adapter


@pytest.fixture(scope="module")
def model(tiny_unet_model):
    return tiny_unet_model()


@pytest.fixture(scope="module")
def adapter(pack, model):
    return random_adapter(pack, model, "attention", "conv")


@pytest.fixture
def apply(run_node):
    return lambda model, adapter, **inputs: run_node("StyleInjectApply", model=model, adapter=adapter, **inputs)[0]


@pytest.fixture
def said(caplog):
    """The lines about adapters without effect that were logged so far."""
    caplog.set_level(logging.WARNING)
    return lambda: [r.getMessage() for r in caplog.records if "had no effect" in r.getMessage()]


def run_blocks(base, apply_model, args, call_apply=False):
    """What cache packs do: the U-Net's blocks one after the other, without apply_model and without forward."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import forward_timestep_embed, timestep_embedding

    x, sigma, c = args["input"], args["timestep"], args["c"]
    if call_apply:
        return apply_model(x, sigma, **c)
    unet, options = base.diffusion_model, c["transformer_options"]
    h = base.model_sampling.calculate_input(sigma, x)
    time = base.model_sampling.timestep(sigma).float()
    emb = unet.time_embed(timestep_embedding(time, unet.model_channels).to(h.dtype))
    skips = []
    for number, block in enumerate(unet.input_blocks):
        options["block"] = ("input", number)
        h = forward_timestep_embed(block, h, emb, c["c_crossattn"], options)
        skips.append(h)
    options["block"] = ("middle", 0)
    h = forward_timestep_embed(unet.middle_block, h, emb, c["c_crossattn"], options)
    for number, block in enumerate(unet.output_blocks):
        options["block"] = ("output", number)
        h = torch.cat([h, skips.pop()], 1)
        h = forward_timestep_embed(block, h, emb, c["c_crossattn"], options, skips[-1].shape if skips else None)
    return base.model_sampling.calculate_denoised(sigma, unet.out(h), x)


def cached(model, function=run_blocks):
    clone = model.clone()
    clone.set_model_unet_function_wrapper(types.MethodType(function, clone.model))
    return clone


@pytest.mark.parametrize("order", ["pack last", "pack first"])
def test_packs_that_run_the_blocks_themselves(model, adapter, apply, sample, said, order) -> None:
    expected, vanilla = sample(apply(model, adapter, end_percent=0.6), batch=2), sample(model, batch=2)
    assert close(sample(cached(model), batch=2), vanilla)
    patched = apply(model, adapter, end_percent=0.6)
    patched = cached(patched) if order == "pack last" else apply(cached(model), adapter, end_percent=0.6)
    assert close(sample(patched, batch=2), expected)
    assert not close(expected, vanilla, 0.05)
    assert torch.equal(sample(model, batch=2), vanilla) and said() == []
