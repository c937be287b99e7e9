"""Bad input: one error that names what is wrong, and everything stays as it was."""

from __future__ import annotations

import math

import pytest
from random_adapters import random_adapter


@pytest.fixture(scope="module")
def model(tiny_unet_model):
    return tiny_unet_model()


@pytest.fixture(scope="module")
def adapter(pack, model):
    return random_adapter(pack, model)


@pytest.mark.parametrize("name", ["strength", "dma_strength", "sta_strength"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_strength_must_be_finite(model, adapter, run_node, name, value) -> None:
    part = {"strength": "strength", "dma_strength": "dma", "sta_strength": "sta"}[name]
    with pytest.raises(ValueError, match=f"style: {part} must be a finite number"):
        run_node("StyleInjectApply", model=model, adapter=adapter, **{name: value})


@pytest.mark.parametrize(
    ("percents", "message"),
    [
        ({"start_percent": 0.6, "end_percent": 0.4}, "start_percent 0.6 is after end_percent 0.4"),
        ({"start_percent": -0.1}, "start_percent is -0.1, expected 0 to 1"),
        ({"end_percent": 1.5}, "end_percent is 1.5, expected 0 to 1"),
        ({"end_percent": math.nan}, "end_percent is nan, expected 0 to 1"),
    ],
)
def test_percents_must_be_in_order(model, adapter, run_node, percents, message) -> None:
    with pytest.raises(ValueError, match=message):
        run_node("StyleInjectApply", model=model, adapter=adapter, **percents)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"layers": "conv"}, "'conv' matches none of the"),
        ({"layers": " "}, "empty layer selector"),
        ({"layer_weights": "conv = 2"}, "'conv' matches none of the"),
        ({"layer_weights": "up"}, 'expected "selector = number"'),
    ],
)
def test_selectors_that_match_nothing(pack, model, adapter, run_node, inputs, message) -> None:
    with pytest.raises(pack.submodule("styleinject_core").SelectorError, match=message):
        run_node("StyleInjectApply", model=model, adapter=adapter, **inputs)


def test_no_layer_in_the_model_names_both_sides(pack, model, run_node) -> None:
    core = pack.submodule("styleinject_core")
    layers = {"double_blocks.0.img_attn.qkv": core.LayerShape(3072, 9216)}
    metadata = {"modelspec.architecture": "flux-1-dev/styleinject"}
    config = core.AdapterConfig(r=2, n_styles=2, target_modules=("all",))
    flux = core.Adapter.create(layers, config, "inks", metadata)
    with pytest.raises(core.AdapterMismatchError) as error:
        run_node("StyleInjectApply", model=model, adapter=flux, strength=1.0)
    for part in ('"inks"', "flux-1-dev", "this model is Stable Diffusion 1.x", "none of its 1 layers", "double_blocks.0"):
        assert part in str(error.value)


def test_another_base_model_is_no_raw_size_mismatch(pack, model, run_node) -> None:
    core = pack.submodule("styleinject_core")
    shapes = pack.submodule("styleinject_core.hosts.architectures").ARCHITECTURES["sdxl"].shapes()
    chosen = {name: shape for name, shape in shapes.items() if name.startswith("mid_block") and name.endswith("attn2.to_k")}
    xl = core.Adapter.create(chosen, core.AdapterConfig(r=2, n_styles=2, target_modules=("all",)), "oil")
    with pytest.raises(core.AdapterMismatchError) as error:
        run_node("StyleInjectApply", model=model, adapter=xl)
    for part in (
        '"oil" was made for Stable Diffusion XL',
        "this model is Stable Diffusion 1.x",
        "Linear 2048->1280",
        "Linear 64->64",
    ):
        assert part in str(error.value)


def test_a_failed_apply_changes_nothing(pack, model, adapter, run_node) -> None:
    before = (dict(model.wrappers), dict(model.additional_models))
    with pytest.raises(ValueError):
        run_node("StyleInjectApply", model=model, adapter=adapter, layers="nothing")
    assert (model.wrappers, model.additional_models) == before


def test_unmatched_layers_are_reported(pack, model, run_node) -> None:
    core = pack.submodule("styleinject_core")
    known = random_adapter(pack, model)
    extra = core.Adapter.create(
        {"down_blocks.7.attentions.0.to_q": core.LayerShape(8, 8)}, core.AdapterConfig(r=2, target_modules=("all",))
    )
    mixed = core.Adapter({**known.layers, **extra.layers}, known.config, name="mixed", skipped=("lora_te_text",))
    _, report, *_ = run_node("StyleInjectApply", model=model, adapter=mixed, strength=0.5, layers="up", end_percent=0.4)
    count = len(known.names)
    assert f"mixed: {count} of {count + 1} layers matched" in report
    assert "not in this model (1): down_blocks.7.attentions.0.to_q" in report
    assert "lora_te_text" in report
    assert "this model is Stable Diffusion 1.x" in report
    assert "strength 0.5 (detail 1, tone 1), 0% to 40% of sampling" in report
    assert 'layers "up"' in report
