"""DiffuseKronA and LoRA in ComfyUI: trained by the nodes, and their files in ComfyUI's own loader; router tools refuse them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from random_adapters import close, unet_shapes
from safetensors.torch import load_file

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module")
def model(tiny_unet_model):
    return tiny_unet_model()


@pytest.fixture
def kronecker(pack, model) -> Any:
    """``kronecker(*targets)``: an adapter that visibly changes what the model does."""
    core, config = pack.submodule("styleinject_core"), pack.submodule("styleinject_core.methods.kronecker").KroneckerConfig

    def make(*targets: str) -> Any:
        torch.manual_seed(0)
        settings = config((8, 4), target_modules=targets or PROJECTIONS)
        adapter = core.Adapter.create(unet_shapes(pack, model), settings, "small")
        with torch.no_grad():
            for layer in adapter.layers.values():
                layer.B.normal_(0, 0.1)
        return adapter

    return make


def native(model: Any, path: Path, strength: float) -> Any:
    """The MODEL as ComfyUI's own LoRA loader makes it of a file."""
    import comfy.sd
    import comfy.utils

    return comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(path)), strength, 0)[0]


def assert_files_draw_alike(run_node, sample, model, folder: Path, strength: float, **window: float) -> None:
    """The file trained under the name "rough": by our nodes and by ComfyUI's loader, and not what the model alone draws."""
    name = "output/rough/rough.safetensors"
    ours = run_node("StyleInjectLoadAndApply", model=model, adapter_name=name, strength=strength)[0]
    expected = sample(native(model, folder / "rough" / "rough.safetensors", strength))
    assert not close(sample(model), expected, 0.02)
    assert close(sample(ours), expected, 1e-3)
    adapter, _trigger = run_node("StyleInjectLoader", adapter_name=name)
    whole = run_node("StyleInjectApply", model=model, adapter=adapter, strength=strength, layer_weights="all = 1.0")[0]
    assert close(sample(whole), expected, 1e-3)


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_trained_file_draws_the_same_in_comfyuis_loader(model, train, trained_folder, run_node, sample, strength, dtype):
    options = {"factors": "8, 4", "dtype": dtype}
    adapter, _, step = train(model=model, method="kronecker", layers="", learning_rate=0.1, options=options)
    assert (
        step == 4
        and adapter.config.target_modules == ("queries", "keys", "values", "outputs")
        and adapter.config.factors == (8, 4)
    )
    tensors = load_file(trained_folder / "rough" / "rough.safetensors")
    assert all(key.startswith("lora_unet_") and key.endswith((".lokr_w1", ".lokr_w2")) for key in tensors)
    assert_files_draw_alike(run_node, sample, model, trained_folder, strength)


@pytest.mark.parametrize("alpha", [0.0, 8.0])
def test_a_trained_lora_draws_the_same_in_comfyuis_loader(model, train, trained_folder, run_node, sample, alpha):
    train(
        model=model, method="lora", layers="attention, conv", learning_rate=0.05, options={"alpha": alpha, "dtype": "float32"}
    )
    assert_files_draw_alike(run_node, sample, model, trained_folder, 1.0)


def test_convolutions_draw_the_same_in_comfyuis_loader(model, kronecker, pack, run_node, sample, tmp_path):
    adapter = kronecker("attention", "conv", "linear")
    assert any(layer.B.ndim == 4 for layer in adapter.layers.values())
    pack.submodule("styleinject_core").save_adapter(adapter, tmp_path / "a.safetensors")
    for strength in (1.0, -0.5):
        patched, _, *_ = run_node("StyleInjectApply", model=model, adapter=adapter, strength=strength)
        expected = sample(native(model, tmp_path / "a.safetensors", strength))
        assert not close(sample(model), expected, 0.02) and close(sample(patched), expected, 1e-3)


def test_a_part_of_sampling_and_of_the_layers(model, kronecker, run_node, sample):
    """What ComfyUI's weight patches cannot do: a window, low-level strengths, beside another adapter; it adds up."""
    adapter = kronecker()
    whole = sample(run_node("StyleInjectApply", model=model, adapter=adapter)[0])
    first, last = (
        sample(run_node("StyleInjectApply", model=model, adapter=adapter, start_percent=a, end_percent=b)[0])
        for a, b in ((0.0, 0.5), (0.5, 1.0))
    )
    assert not close(first, sample(model), 0.01) and not close(last, whole, 0.01) and not close(first, last, 0.01)
    once = run_node("StyleInjectApply", model=model, adapter=adapter, strength=0.25)[0]
    twice = run_node("StyleInjectApply", model=once, adapter=adapter, strength=0.75, start_percent=0.0, end_percent=1.0)[0]
    assert close(sample(twice), whole, 1e-3)
    parts = run_node("StyleInjectApply", model=model, adapter=adapter, layers="self")[0]
    parts = run_node("StyleInjectApply", model=parts, adapter=adapter, layers="cross")[0]
    assert close(sample(parts), whole, 1e-3)


@pytest.mark.parametrize("factors", ["8", "8, x", "8, 4, 2", "0, 4", "8; 4"])
def test_factors_that_are_none(model, train, factors):
    with pytest.raises(ValueError, match=r"^factors: expected two (whole numbers, as in|integers of at least 1, found)"):
        train(model=model, method="kronecker", options={"factors": factors})


def test_widgets_that_came_later_are_the_last_and_may_be_absent(pack, run_node):
    """Saved workflows list widgets by position, and saved prompts name those that there were."""
    node = pack["StyleInjectTrainOptions"]
    inputs = node.define_schema().inputs
    later = inputs[[i.id for i in inputs].index("factors") :]
    assert [i.id for i in later] == ["factors", "tokens", "flow_times", "router_input"] and all(i.optional for i in later)
    assert later[0].default == "64, 4"
    given = {i.id: i.default for i in inputs if getattr(i, "default", None) is not None and i not in later}
    assert node.execute(**given).result[0] == pack.submodule("integration.training.train_options").TrainOptions()
    assert inspect.signature(node.execute).parameters["factors"].default == ""


@pytest.mark.parametrize("what", ["monitor", "control", "mix", "grid", "name"])
def test_router_nodes_refuse_a_method_without_router(model, kronecker, run_node, what):
    adapter = kronecker()
    none = r"small has no style router \(it is a DiffuseKronA\): there is nothing to "
    message = {"monitor": "small: a DiffuseKronA has no style router, there is nothing to monitor", "grid": none + "control"}
    with pytest.raises(ValueError, match="^" + message.get(what, none + what) + "$") as refused:
        use_router(run_node, what, model, adapter)
    assert "\n" not in str(refused.value)


def use_router(run_node, what: str, model: Any, adapter: Any) -> None:
    """Give the adapter to a router node."""
    if what == "monitor":
        run_node("StyleInjectRouterMonitor", model=run_node("StyleInjectApply", model=model, adapter=adapter)[0])
    elif what == "control":
        (control,) = run_node("StyleInjectRouterControl", temperature=2.0)
        run_node("StyleInjectApply", model=model, adapter=adapter, control=control)
    elif what == "mix":
        run_node("StyleInjectStyleMixer", adapter=adapter, style_1=1.0)
    elif what == "grid":
        run_node("StyleInjectStyleGrid", model=model, adapter=adapter)
    else:
        run_node("StyleInjectNameStyles", adapter=adapter, names="mine")


def test_info_shows_method_and_factors(kronecker, run_node):
    (text,) = run_node("StyleInjectInfo", adapter=kronecker())
    assert "DiffuseKronA" in text and "factors" in text and "8 x 4" in text and "rank" not in text and "styles" not in text
