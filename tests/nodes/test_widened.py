"""Layers that another node has widened in a model that is loaded, and models that take more than a latent."""

from __future__ import annotations

import pytest
import torch
from random_adapters import close, random_adapter


@pytest.fixture(scope="module")
def model(tiny_unet_model):
    return tiny_unet_model()


@pytest.fixture
def apply(run_node):
    return lambda model, adapter, **inputs: run_node("StyleInjectApply", model=model, adapter=adapter, **inputs)[0]


def lora(pack, model, tmp_path):
    """A LoRA with the first convolution, as a file has it."""
    from safetensors.torch import save_file

    generator, tensors = torch.Generator().manual_seed(3), {}
    for name in ("input_blocks.0.0", "middle_block.1.transformer_blocks.0.attn1.to_q"):
        weight = model.model.diffusion_model.get_submodule(name).weight
        key = "lora_unet_" + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = torch.randn(4, *weight.shape[1:], generator=generator) * 0.2
        tensors[f"{key}.lora_up.weight"] = torch.randn(weight.shape[0], 4, *(1,) * (weight.ndim - 2), generator=generator) * 0.2
    save_file(tensors, tmp_path / "first.safetensors")
    return pack.submodule("styleinject_core").load_adapter(tmp_path / "first.safetensors")


KEY = "diffusion_model.input_blocks.0.0.weight"


def widened(weight, more=4):
    return torch.cat([weight[:, :4], torch.randn(32, more, 3, 3, generator=torch.Generator().manual_seed(1))], 1)


def relit(model, kind="object patch", more=4):
    """What relighting packs do: the first convolution takes a second latent, its attributes and the model know nothing."""
    clone, key = model.clone(), KEY
    wide = widened(clone.get_model_object(key), more)
    if kind == "object patch":
        clone.add_object_patch(key, torch.nn.Parameter(wide, requires_grad=False))
    elif kind == "weight patch":
        extra = wide.clone()
        extra[:, :4] = 0
        clone.add_patches({key: ("diff", (extra, {"pad_weight": True}))}, 1.0, 1.0)

    def with_image(apply_model, args):
        x = args["input"]
        image = torch.ones(x.shape[0], more, *x.shape[2:]) * 0.3
        return apply_model(x, args["timestep"], **{**args["c"], "c_concat": image})

    clone.set_model_unet_function_wrapper(with_image)
    return clone


@pytest.mark.parametrize("kind", ["object patch", "weight patch"])
@pytest.mark.parametrize("order", ["adapter last", "adapter first"])
@pytest.mark.parametrize("what", ["style", "lora", "lora with a schedule"])
def test_a_first_layer_that_another_node_has_widened(
    pack, model, apply, sample, tiny_unet_model, tmp_path, kind, order, what
) -> None:
    adapter = random_adapter(pack, model, "all", scale=0.1) if what == "style" else lora(pack, model, tmp_path)
    percents = {"end_percent": 0.999} if what == "lora with a schedule" else {}
    styled = (
        relit(apply(model, adapter, **percents), kind)
        if order == "adapter last"
        else apply(relit(model, kind), adapter, **percents)
    )
    result, plain = sample(styled), sample(relit(model, kind))
    assert result.isfinite().all() and not close(result, plain, 0.02)
    if what == "style":
        return
    other = tiny_unet_model(in_channels=8)  # by hand: the change on the first four channels of a model that is as wide
    weights = dict(tiny_unet_model().model.diffusion_model.state_dict())
    first, second = sorted(adapter.layers.values(), key=lambda layer: not layer.shape.is_conv)
    with torch.inference_mode():
        own = weights["input_blocks.0.0.weight"] = widened(weights["input_blocks.0.0.weight"]).clone()
        own[:, :4] += first.delta()
        weights["middle_block.1.transformer_blocks.0.attn1.to_q.weight"] += second.delta()
        other.model.diffusion_model.load_state_dict(weights)
    assert close(result, sample(relit(other, "as it is")), 1e-2 if percents else 1e-3)


def test_models_with_more_input_channels(pack, model, apply, run_node, sample, tiny_unet_model, tmp_path, caplog) -> None:
    """An inpainting model takes nine channels, four of them the latent; adapters of plain models fit it, in every node."""
    inpainting = tiny_unet_model(in_channels=9)
    adapter = random_adapter(pack, model, "all", scale=0.1)
    patched, report, *_ = run_node("StyleInjectApply", model=inpainting, adapter=adapter)
    count = len(adapter.names)
    assert f"{count} of {count} layers matched" in report and "more input channels" in report and "conv_in" in report
    assert "conv_in" in caplog.text
    result = sample(relit(patched, "as it is", more=5))
    assert result.isfinite().all() and not close(result, sample(relit(inpainting, "as it is", more=5)), 0.02)
    # the other way round: what an inpainting model's adapter knows of the first layer does not exist here
    wide = random_adapter(pack, inpainting, "all", scale=0.1)
    back, report, *_ = run_node("StyleInjectApply", model=model, adapter=wide)
    assert f"{count - 1} of {count} layers matched" in report
    assert "made for 9 input channels, the model has 4 (1): conv_in" in report
    assert sample(back).isfinite().all()


def test_load_and_apply_on_such_a_model(pack, model, sample, tiny_unet_model, run_node, monkeypatch, tmp_path) -> None:
    import folder_paths

    core = pack.submodule("styleinject_core")
    core.save_adapter(random_adapter(pack, model, "all", scale=0.1), tmp_path / "every.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "styleinject", ([str(tmp_path)], {".safetensors"}))
    patched = run_node(
        "StyleInjectLoadAndApply", model=tiny_unet_model(in_channels=8), adapter_name="every.safetensors", strength=1.0
    )[0]
    assert sample(relit(patched, "as it is")).isfinite().all()
