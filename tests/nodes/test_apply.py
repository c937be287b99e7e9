"""Applying adapters to a MODEL: what sampling gives, and that nothing is left behind."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from random_adapters import close, random_adapter


@pytest.fixture
def model(tiny_unet_model):
    return tiny_unet_model()


@pytest.fixture
def adapter(pack, model):
    return random_adapter(pack, model, "to_q", "to_v", "conv")


@pytest.fixture
def apply(run_node):
    """apply(model, adapter, ...) -> MODEL."""
    return lambda model, adapter, **inputs: run_node("StyleInjectApply", model=model, adapter=adapter, **inputs)[0]


def leftovers(model) -> list[str]:
    """Modules that have an instance-level forward, or anything of ours."""
    modules = model.model.diffusion_model.named_modules()
    return [name for name, m in modules if any(key == "forward" or "styleinject" in key for key in m.__dict__)]


def test_adapter_changes_the_result_and_leaves_no_trace(model, adapter, apply, sample) -> None:
    vanilla = sample(model)
    before = {name: set(m.__dict__) for name, m in model.model.diffusion_model.named_modules()}
    styled = sample(apply(model, adapter))
    assert torch.isfinite(styled).all()
    assert (styled - vanilla).abs().mean() > 0.02
    assert torch.equal(sample(model), vanilla), "the base model is not what it was"
    assert {name: set(m.__dict__) for name, m in model.model.diffusion_model.named_modules()} == before


@pytest.mark.parametrize("strengths", [{"strength": 0.0}, {"dma_strength": 0.0, "sta_strength": 0.0}])
def test_strength_zero_is_the_base_model_bit_for_bit(model, adapter, apply, sample, strengths) -> None:
    assert torch.equal(sample(apply(model, adapter, **strengths)), sample(model))


def test_result_is_that_of_the_core(pack, model, adapter, apply, sample) -> None:
    core = pack.submodule("styleinject_core")
    host = model.model.diffusion_model
    found = pack.submodule("integration.places").find_places(model.model, adapter)
    names = {name: where.place for name, where in found.items()}
    settings = {"strength": 0.7, "dma": 1.2, "sta": 0.5, "layers": "!mid", "layer_weights": "up = 0.5"}
    with core.attach(host, core.Applied(adapter, **settings), names=names):
        expected = sample(model)
    styled = sample(
        apply(model, adapter, strength=0.7, dma_strength=1.2, sta_strength=0.5, layers="!mid", layer_weights="up = 0.5")
    )
    assert close(styled, expected)
    assert leftovers(model) == []


def test_clones_do_not_leak_into_each_other(pack, model, adapter, apply, sample) -> None:
    other = random_adapter(pack, model, "to_k", seed=2, name="other")
    first, second = apply(model, adapter), apply(model, other)
    results = [sample(m) for m in (model, first, second)]
    for _ in range(2):
        assert all(torch.equal(sample(m), r) for m, r in zip((model, first, second), results, strict=True))
    assert not close(results[1], results[2], 0.01)


def test_two_adapters_add_up_in_any_order(pack, model, adapter, apply, sample) -> None:
    other = random_adapter(pack, model, "to_q", "ff.net.2", seed=2, name="other")
    both = apply(apply(model, adapter), other)
    swapped = apply(apply(model, other), adapter)
    assert close(sample(both), sample(swapped))
    assert not close(sample(both), sample(apply(model, adapter)), 0.01)
    assert torch.equal(sample(apply(apply(model, adapter), other, strength=0.0)), sample(apply(model, adapter)))
    assert len(both.get_additional_models_with_key("styleinject")) == 2


def test_same_adapter_twice_adds_up_and_shares_its_weights(model, adapter, apply, sample) -> None:
    twice = apply(apply(model, adapter, strength=0.5), adapter, strength=0.5)
    assert close(sample(twice), sample(apply(model, adapter)))
    assert len(twice.get_additional_models_with_key("styleinject")) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, "interrupt"])
def test_clean_after_an_error_inside_sampling(model, adapter, apply, sample, error) -> None:
    import comfy.model_management

    if error == "interrupt":
        error = comfy.model_management.InterruptProcessingException
    vanilla, patched = sample(model), apply(model, adapter)
    calls = 0

    def fail(*_args, **_kwargs):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error("in the middle of a layer")

    handle = model.model.diffusion_model.middle_block[1].register_forward_hook(fail)
    try:
        with pytest.raises(error):
            sample(patched)
    finally:
        handle.remove()
    assert leftovers(model) == []
    assert torch.equal(sample(model), vanilla)


def test_error_in_the_callback_leaves_nothing(model, adapter, apply, sample) -> None:
    vanilla = sample(model)

    def stop(step, *_args):
        if step == 1:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        sample(apply(model, adapter), callback=stop)
    assert leftovers(model) == []
    assert torch.equal(sample(model), vanilla)


def test_batched_and_separate_conds_agree(model, adapter, apply, sample, conditioning, monkeypatch) -> None:
    patched = apply(model, adapter)
    batched = sample(patched, batch=2)
    monkeypatch.setattr(type(model.model), "memory_required", lambda *_args, **_kwargs: 1e30)
    separate = sample(patched, batch=2)
    assert close(batched, separate)
    monkeypatch.undo()
    assert torch.isfinite(sample(patched, positive=conditioning(3, tokens=154))).all()


def test_user_adapter_is_not_changed(model, tiny_unet_model, adapter, apply, sample) -> None:
    before = {name: p.clone() for name, p in adapter.named_parameters()}
    half = tiny_unet_model(dtype=torch.bfloat16)
    low, full = apply(half, adapter), apply(model, adapter)
    low_weights, full_weights = (m.get_additional_models_with_key("styleinject")[0].model for m in (low, full))
    assert next(low_weights.parameters()).dtype == torch.bfloat16
    assert next(full_weights.parameters()).dtype == torch.float32
    assert torch.isfinite(sample(low)).all()
    sample(full)
    for name, parameter in adapter.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.device.type == "cpu"
        assert torch.equal(parameter, before[name])


def test_everything_is_freed_without_the_collector(pack, tiny_unet_model, run_node, sample) -> None:
    import comfy.model_management

    model = tiny_unet_model()
    adapter = random_adapter(pack, model)
    patched = run_node("StyleInjectApply", model=model, adapter=adapter)[0]
    sample(patched)
    weights = patched.get_additional_models_with_key("styleinject")[0].model
    layer = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1.to_q
    alive = [weakref.ref(o) for o in (weights, layer, adapter, model.model)]
    gc.collect()
    gc.disable()
    try:
        comfy.model_management.unload_all_models()
        comfy.model_management.current_loaded_models.clear()
        del model, patched, weights, layer, adapter
        assert [ref() is None for ref in alive] == [True] * 4
    finally:
        gc.enable()


def test_strength_node_rescales_what_is_applied(pack, model, adapter, apply, run_node, sample) -> None:
    other = random_adapter(pack, model, "to_k", seed=2, name="other")
    both = apply(apply(model, adapter, strength=0.3, end_percent=0.5), other)
    rescale = partial(run_node, "StyleInjectStrength")
    expected = apply(apply(model, adapter, strength=0.8, end_percent=0.5), other)
    (result,) = rescale(model=both, adapter_name="style", strength=0.8)
    assert torch.equal(sample(result), sample(expected))
    (result,) = rescale(model=both, adapter_name="loras/style.safetensors", strength=0.8)
    assert torch.equal(sample(result), sample(expected))
    (off,) = rescale(model=both, strength=0.0)
    assert torch.equal(sample(off), sample(model))
    assert torch.equal(sample(both), sample(apply(apply(model, adapter, strength=0.3, end_percent=0.5), other)))
    with pytest.raises(ValueError, match=r'no adapter named "nope".*style, other'):
        rescale(model=both, adapter_name="nope", strength=1.0)
    with pytest.raises(ValueError, match="no StyleInject adapter is applied"):
        rescale(model=model, strength=1.0)
    with pytest.raises(ValueError, match="strength must be a finite number"):
        rescale(model=both, strength=float("nan"))
