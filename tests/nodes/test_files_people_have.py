"""The files people have: every kind in every spelling draws what ComfyUI's own loader draws from the same file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapter_files as files
import dit_models
import pytest
import torch
from random_adapters import close
from safetensors.torch import save_file

STRENGTHS = (1.0, -0.5)


@pytest.fixture(scope="module")
def model(tiny_unet_model):
    return tiny_unet_model()


@pytest.fixture(scope="module")
def layers(model):
    """Some layers of each sort: projections of both attentions, a feed-forward, a time embedding, convolutions of 1x1 and 3x3."""
    wanted = ("down_blocks.1.", "mid_block.", "up_blocks.0.upsamplers", "conv_out", "time_embedding.linear_2")
    return files.unet_layers(model, lambda name: name.startswith(wanted))


@pytest.fixture
def put(comfy_base: Path):
    """``put(tensors, name="x", **metadata)``: write models/loras/x.safetensors and return the name the nodes know it by."""
    import folder_paths

    folder = comfy_base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def write(
        tensors: dict[str, torch.Tensor], name: str = "people", beside: dict[str, Any] | None = None, **metadata: str
    ) -> str:
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata or None)
        written.append(path)
        if beside is not None:
            written.append(path.with_name("adapter_config.json"))
            written[-1].write_text(json.dumps(beside))
        folder_paths.filename_list_cache.clear()
        return f"loras/{name}.safetensors"

    yield write
    for path in written:
        path.unlink(missing_ok=True)
    folder_paths.filename_list_cache.clear()


@pytest.fixture
def ours(put, run_node) -> Callable[..., Any]:
    """``ours(model, tensors, strength)``: the MODEL as Load and Apply makes it from such a file."""

    def apply(model: Any, tensors: dict[str, torch.Tensor], strength: float = 1.0, **written: Any) -> Any:
        return run_node("StyleInjectLoadAndApply", model=model, adapter_name=put(tensors, **written), strength=strength)[0]

    return apply


@pytest.fixture
def report(put, run_node) -> Callable[..., str]:
    """``report(model, tensors)``: what Apply says of such a file."""

    def apply(model: Any, tensors: dict[str, torch.Tensor], **written: Any) -> str:
        (adapter,) = run_node("StyleInjectLoader", adapter_name=put(tensors, **written))
        return run_node("StyleInjectApply", model=model, adapter=adapter)[1]

    return apply


def native(model: Any, tensors: dict[str, torch.Tensor], strength: float = 1.0) -> Any:
    """The MODEL as ComfyUI's own LoRA loader makes it."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, dict(tensors), strength, 0)[0]


def assert_same(draw: Callable[[Any], torch.Tensor], found: Any, expected: Any, base: Any) -> None:
    """Both draw the same, and not what the model alone draws."""
    wanted = draw(expected)
    assert torch.isfinite(wanted).all()
    assert not close(wanted, draw(base), 0.02), "the file changes nothing, the test shows nothing"
    assert close(draw(found), wanted, 1e-3)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("kind", files.KINDS)
def test_every_kind_equals_comfyuis_loader(model, layers, ours, sample, kind, strength) -> None:
    tensors = files.file_of(layers, kind, seed=len(kind))
    expected = native(model, files.multiplied_out(tensors), strength)
    assert_same(sample, ours(model, tensors, strength), expected, model)


@pytest.mark.parametrize("kind", ["LoRA, alpha", "LoHa", "LoKr, both factored", "difference and biases"])
@pytest.mark.parametrize("spelling", files.LOADED_BY_COMFYUI)
def test_every_spelling_of_modules_equals_comfyuis_loader(model, layers, ours, sample, spelling, kind) -> None:
    tensors = files.file_of(layers, kind, spelling)
    assert_same(sample, ours(model, tensors), native(model, tensors), model)


@pytest.mark.parametrize("kind", ["LoRA", "LoKr"])
@pytest.mark.parametrize("spelling", ["diffusers", "PEFT"])
def test_spellings_that_comfyui_does_not_load_mean_the_same(model, layers, ours, sample, spelling, kind) -> None:
    tensors = files.file_of(layers, kind, spelling, "PEFT" if kind == "LoRA" else "kohya")
    assert_same(sample, ours(model, tensors), native(model, files.file_of(layers, kind)), model)


@pytest.mark.parametrize("parts", files.LORA_PARTS)
def test_every_spelling_of_a_loras_parts(model, layers, ours, sample, parts) -> None:
    tensors = files.file_of(layers, "LoRA", "ComfyUI", parts)
    assert_same(sample, ours(model, tensors), native(model, tensors), model)


def test_attention_processors(model, ours, sample) -> None:
    layers = files.unet_layers(model, lambda name: ".attn" in name)
    tensors = files.file_of(layers, "LoRA", "processors", "diffusers, oldest")
    assert_same(sample, ours(model, tensors), native(model, tensors), model)


@pytest.mark.parametrize("kind", ["LoRA, alpha", "LoHa", "LoKr", "DoRA, output axis", "difference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_dtype_of_storage(model, layers, ours, sample, kind, dtype) -> None:
    tensors = files.file_of(layers, kind, dtype=dtype)
    assert_same(sample, ours(model, tensors), native(model, tensors), model)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("kind", ["LoRA, alpha", "LoHa", "LoKr, both factored", "difference", "DoRA, output axis"])
@pytest.mark.parametrize("family", dit_models.MODELS)
def test_slices_of_fused_layers(ours, family, kind, strength) -> None:
    """to_q, to_k and to_v of a file are rows of one qkv in the model."""
    model = dit_models.MODELS[family]()
    layers = dit_models.diffusers_layers(model)
    assert any(name.endswith("to_q") for name in layers)
    tensors = {}
    for name, (_, shape) in layers.items():
        for part, value in files.KINDS[kind](shape, files.Draw(len(name))).items():
            tensors[f"transformer.{name}" + files.LORA_PARTS["PEFT"].get(part, f".{part}")] = value * (
                0.3 if "up" in part else 1
            )
    assert_same(dit_models.draw, ours(model, tensors, strength), native(model, tensors, strength), model)


@pytest.mark.parametrize("family", dit_models.MODELS)
def test_every_layer_of_a_fused_file_is_used(report, family) -> None:
    model = dit_models.MODELS[family]()
    names = list(dit_models.diffusers_layers(model, lambda name: ".attn." in name or ".attention." in name))
    assert names
    layers = dit_models.diffusers_layers(model)
    tensors = {}
    for name in names:
        for part, value in files.lora(layers[name][1], files.Draw(1)).items():
            tensors[f"transformer.{name}" + files.LORA_PARTS["PEFT"][part]] = value
    assert f"{len(names)} of {len(names)} layers matched" in report(model, tensors)


def test_trained_norms(model, ours, sample) -> None:
    """As TrainLoraNode and Extract and Save write them beside everything else, and as LyCORIS does."""
    layers = files.unet_layers(model)
    for weight, bias in (("diff", "diff_b"), ("w_norm", "b_norm")):
        tensors = files.file_of(layers, "LoRA and biases", "ComfyUI")
        draw = files.Draw(3)
        for name, (_, shape) in files.norms(model).items():
            tensors[f"diffusion_model.{name}.{weight}"] = draw(*shape, std=0.3)
            tensors[f"diffusion_model.{name}.{bias}"] = draw(*shape, std=0.3)
        for strength in STRENGTHS:
            assert_same(sample, ours(model, tensors, strength), native(model, tensors, strength), model)


def test_files_that_trainloranode_writes(model, ours, sample) -> None:
    """comfy_extras/nodes_train.py: its own classes make every parameter; here they get numbers that are not zero."""
    nodes_train = pytest.importorskip("comfy_extras.nodes_train")
    setup = getattr(nodes_train, "_setup_lora_adapters", None)
    if setup is None:
        pytest.skip("this version of ComfyUI builds them inside its node")
    for algorithm in ("LoRA", "LoHa", "LoKr"):
        with torch.inference_mode(False):
            patcher = model.clone()
            tensors, _ = setup(patcher, {}, algorithm, torch.float32, 4)
            draw = files.Draw(5)
            written = {
                key: (value if key.endswith(".alpha") else draw(*value.shape, std=0.15)).detach().contiguous()
                for key, value in tensors.items()
            }
        for strength in STRENGTHS:
            assert_same(sample, ours(model, written, strength), native(model, written, strength), model)


@pytest.mark.parametrize("lora_type", ["standard", "full_diff"])
@pytest.mark.parametrize("bias_diff", [True, False])
def test_files_that_extract_and_save_writes(model, tiny_unet_model, ours, sample, lora_type, bias_diff) -> None:
    """The real extraction, of the difference of two models, rank 8 and biases by default."""
    from comfy_extras import nodes_lora_extract, nodes_model_merging

    other = tiny_unet_model(seed=1)
    with torch.inference_mode():
        half = nodes_model_merging.ModelMergeSimple
        merge = half().merge(model, other, 0.9)[0] if hasattr(half, "merge") else half.execute(model, other, 0.9).result[0]
        subtract = nodes_model_merging.ModelSubtract
        given = {"model1": merge, "model2": model, "multiplier": 1.0}
        difference = subtract().merge(**given)[0] if hasattr(subtract, "merge") else subtract.execute(**given).result[0]
        kind = nodes_lora_extract.LORA_TYPES[lora_type]
        tensors: dict[str, torch.Tensor] = {}
        nodes_lora_extract.calc_lora_model(
            difference, 8, "diffusion_model.", "diffusion_model.", tensors, kind, bias_diff=bias_diff
        )
    for strength in STRENGTHS:
        assert_same(sample, ours(model, tensors, strength), native(model, tensors, strength), model)
