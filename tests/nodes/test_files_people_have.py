"""The files people have: every kind in every spelling draws what ComfyUI's own loader draws from the same file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapter_files as files
import dit_models
import pytest
import tiny_model
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
        adapter = run_node("StyleInjectLoader", adapter_name=put(tensors, **written))[0]
        return run_node("StyleInjectApply", model=model, adapter=adapter)[1]

    return apply


def native(model: Any, tensors: dict[str, torch.Tensor], strength: float = 1.0) -> Any:
    """The MODEL as ComfyUI's own LoRA loader makes it."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, dict(tensors), strength, 0)[0]


def skip_unknown(layers: dict[str, Any]) -> None:
    """Older versions of ComfyUI have no diffusers names of younger families."""
    if not any(name.endswith("to_q") for name in layers):
        pytest.skip("this version of ComfyUI has no table of this family's names")


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
    skip_unknown(layers)
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
    skip_unknown(dit_models.diffusers_layers(model))
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


# --- weights or calls: both ways onto a model --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", files.KINDS)
def test_patched_into_weights_or_installed_for_calls_is_the_same(model, layers, put, run_node, sample, kind) -> None:
    """A schedule over all but nothing makes a change one for calls: no step of "simple" is after 0.999 of sampling."""
    adapter = run_node("StyleInjectLoader", adapter_name=put(files.file_of(layers, kind)))[0]
    patched = run_node("StyleInjectApply", model=model, adapter=adapter, strength=-0.5)[0]
    scheduled = run_node("StyleInjectApply", model=model, adapter=adapter, strength=-0.5, end_percent=0.999)[0]
    assert patched.patches and not scheduled.patches
    expected = sample(patched, scheduler="simple")
    assert not close(expected, sample(model, scheduler="simple"), 0.02)
    assert close(sample(scheduled, scheduler="simple"), expected, 2e-4)


@pytest.mark.parametrize("family", dit_models.MODELS)
@pytest.mark.parametrize("kind", ["LoRA, alpha", "LoKr, both factored", "DoRA, output axis"])
def test_slices_for_calls(put, run_node, family, kind) -> None:
    model = dit_models.MODELS[family]()
    skip_unknown(dit_models.diffusers_layers(model))
    tensors = {}
    for name, (_, shape) in dit_models.diffusers_layers(model).items():
        for part, value in files.KINDS[kind](shape, files.Draw(len(name))).items():
            tensors[f"transformer.{name}" + files.LORA_PARTS["PEFT"].get(part, f".{part}")] = value * (
                0.3 if "up" in part else 1
            )
    adapter = run_node("StyleInjectLoader", adapter_name=put(tensors))[0]
    patched = run_node("StyleInjectApply", model=model, adapter=adapter)[0]
    scheduled = run_node("StyleInjectApply", model=model, adapter=adapter, end_percent=0.999)[0]
    assert patched.patches and not scheduled.patches
    assert close(dit_models.draw(scheduled), dit_models.draw(patched), 2e-3)


def test_norms_for_calls(model, put, run_node, sample) -> None:
    draw = files.Draw(3)
    tensors = {}
    for name, (_, shape) in files.norms(model).items():
        tensors |= {
            f"diffusion_model.{name}.diff": draw(*shape, std=0.3),
            f"diffusion_model.{name}.diff_b": draw(*shape, std=0.3),
        }
    adapter = run_node("StyleInjectLoader", adapter_name=put(tensors))[0]
    expected = sample(native(model, tensors), scheduler="simple")
    scheduled = run_node("StyleInjectApply", model=model, adapter=adapter, end_percent=0.999)[0]
    sample(model)  # ComfyUI takes the patches off, into parameters of its own
    before = {name: id(p) for name, p in model.model.named_parameters()}
    assert close(sample(scheduled, scheduler="simple"), expected, 2e-4)
    assert {name: id(p) for name, p in model.model.named_parameters()} == before


def test_strength_selector_and_layer_weights_reach_the_patches(model, layers, put, run_node, sample) -> None:
    tensors = files.file_of(layers, "LoRA, alpha")
    adapter = run_node("StyleInjectLoader", adapter_name=put(tensors))[0]
    given = {"adapter": adapter, "layers": "attention", "layer_weights": "to_q = 0.5; cross = *-2"}
    patched = run_node("StyleInjectApply", model=model, strength=0.7, **given)[0]
    scheduled = run_node("StyleInjectApply", model=model, strength=0.7, end_percent=0.999, **given)[0]
    assert close(sample(patched, scheduler="simple"), sample(scheduled, scheduler="simple"), 2e-4)
    later = run_node(
        "StyleInjectStrength",
        model=run_node("StyleInjectApply", model=model, strength=3.0, **given)[0],
        adapter_name="all",
        strength=0.7,
    )[0]
    assert torch.equal(sample(later), sample(patched))
    gone = run_node("StyleInjectStrength", model=patched, adapter_name="people", strength=0.0)[0]
    assert torch.equal(sample(gone), sample(model)) and not gone.patches
    assert torch.equal(sample(patched), sample(later)), "a clone's strength is its own"


def test_two_files_beside_a_lora_of_comfyui(model, layers, put, run_node, sample) -> None:
    first, second = (files.file_of(layers, kind, seed=5) for kind in ("LoRA", "LoHa"))
    expected = native(native(native(model, first, 0.5), second, -0.5), first, 0.2)
    ours = run_node(
        "StyleInjectLoadAndApply", model=native(model, first, 0.2), adapter_name=put(second, "second"), strength=-0.5
    )[0]
    ours = run_node("StyleInjectLoadAndApply", model=ours, adapter_name=put(first, "first"), strength=0.5)[0]
    assert_same(sample, ours, expected, model)


# --- what is in the file and not in the model --------------------------------------------------------------------------


def test_a_text_encoders_part_is_left_out_and_said(model, layers, report, put, run_node) -> None:
    unet = files.file_of(layers, "LoRA")
    for kind in ("LoRA", "LoHa", "LoKr", "OFT"):
        other = (
            {"lora_te_text_model_encoder_layers_0_self_attn_q_proj.oft_blocks": torch.ones(2, 3, 3)}
            if kind == "OFT"
            else files.text_encoder_part(kind)
        )
        text = report(model, {**unet, **other})
        assert f"{len(layers)} of {len(layers)} layers matched\n" in text
        assert f"for another model (a text encoder, a VAE) ({len(other)})" in text
        assert f"text encoder: {len(other)} tensors left out" in text
    with pytest.raises(ValueError, match="all are of a text encoder"):
        run_node("StyleInjectLoader", adapter_name=put(files.text_encoder_part()))


@pytest.fixture(scope="module")
def clip():
    """A CLIP of the real class with two narrow layers, weights random."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sd1_clip

    class Small:
        def __init__(self) -> None:
            config = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2,
                      "max_position_embeddings": 77, "hidden_act": "quick_gelu", "eos_token_id": 49407}  # fmt: skip
            with torch.inference_mode():
                self.cond_stage_model = comfy.sd1_clip.SD1ClipModel(
                    dtype=torch.float32, clip_model=comfy.sd1_clip.SDClipModel, textmodel_json_config=config
                )
                tiny_model.fill(self.cond_stage_model, 3)
            cpu = comfy.model_management.get_torch_device()
            self.patcher = comfy.model_patcher.ModelPatcher(self.cond_stage_model, load_device=cpu, offload_device=cpu)

        def clone(self) -> Small:
            made = Small.__new__(Small)
            made.cond_stage_model, made.patcher = self.cond_stage_model, self.patcher.clone()
            return made

        def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
            return self.patcher.add_patches(patches, strength_patch, strength_model)

    return Small()


@pytest.mark.parametrize("kind", ["LoRA, alpha", "LoHa", "LoKr, both factored", "difference"])
def test_a_text_encoders_part_goes_onto_a_clip(pack, model, layers, put, run_node, clip, kind) -> None:
    import comfy.lora
    import comfy.sd
    import comfy.utils

    tensors = {**files.file_of(layers, "LoRA"), **files.text_encoder_part(kind, width=64)}
    expected = comfy.sd.load_lora_for_models(model, clip, dict(tensors), 1.0, 0.6)[1].patcher
    given = {"model": model, "adapter_name": put(tensors), "strength": 1.0}
    with torch.inference_mode():
        output = pack["StyleInjectLoadAndApply"].execute(**given, clip=clip, clip_strength=0.6)
    found = output.result[2].patcher
    assert "text encoder: 4 of 4 layers matched, strength 0.6" in str(output.ui)
    assert expected.patches and found.patches.keys() == expected.patches.keys()
    for key in expected.patches:
        plain = comfy.utils.get_attr(clip.cond_stage_model, key)
        patches = [patcher.patches.get(key, []) for patcher in (found, expected, clip.patcher)]
        weights = [comfy.lora.calculate_weight(several, plain.detach().clone(), key) for several in patches]
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not clip.patcher.patches
    assert run_node("StyleInjectLoadAndApply", **given)[2] is None


def test_what_is_not_supported_is_in_the_report_and_in_the_node(pack, model, layers, put, run_node, report) -> None:
    tensors = files.file_of(layers, "LoRA")
    tensors["lora_unet_mid_block_attentions_0_proj_in.oft_blocks"] = torch.ones(2, 3, 3)
    del (
        tensors["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"],
        tensors["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"],
    )
    tensors["lora_unet_magic.sorcery"] = torch.ones(1)
    text = report(model, tensors)
    total = len(layers) + 1
    assert f"{total - 2} of {total} layers matched ({(total - 2) / total:.0%})" in text
    assert "OFT or BOFT is not supported (1): lora_unet_mid_block_attentions_0_proj_in" in text
    assert "a tensor of a kind that is not known (1): lora_unet_magic.sorcery" in text
    with torch.inference_mode():
        output = pack["StyleInjectLoadAndApply"].execute(model=model, adapter_name=put(tensors), strength=1.0)
    assert f"{total - 2} of {total} layers" in str(output.ui) and "not supported: 2 layers" in str(output.ui)


def test_less_than_half_is_an_error_that_says_why(model, layers, ours) -> None:
    one = dict(list(layers.items())[:1])
    tensors = files.file_of(one, "LoRA") | {
        f"lora_unet_double_blocks_{n}_img_attn_qkv.diff": torch.ones(3, 3) for n in range(2)
    }
    with pytest.raises(ValueError, match=r"1 of 3 layers matched \(33%\), which is less than half.*not in this model \(2\)"):
        ours(model, tensors)


def test_one_layer_in_two_spellings_of_comfyuis_table(model, layers, ours) -> None:
    one = dict(list(layers.items())[:1])
    for second in ("ComfyUI", "LyCORIS", "kohya, LDM names"):
        with pytest.raises(ValueError, match="two spellings of one layer"):
            ours(model, {**files.file_of(one, "LoRA"), **files.file_of(one, "LoKr", second)})
    flux = dit_models.flux()
    double = {
        f"{key}.diff": torch.ones(128, 64)
        for key in ("transformer.norm_out.linear", "diffusion_model.final_layer.adaLN_modulation.1")
    }
    with pytest.raises(ValueError, match="are one layer of the model"):
        ours(flux, double)


# --- families, names and other programs --------------------------------------------------------------------------------


def test_a_family_with_one_block_per_level_by_its_ldm_names(model, ours, sample) -> None:
    """The tiny model has one residual block a level, where Stable Diffusion has two: LDM's numbers mean other blocks."""
    for spelling in ("ComfyUI", "kohya, LDM names"):
        tensors = files.file_of(files.unet_layers(model), "LoRA, alpha", spelling)
        assert_same(sample, ours(model, tensors), native(model, tensors), model)


def test_layers_that_have_no_diffusers_name(tiny_unet_model, ours, report, sample) -> None:
    """SVD's temporal layers, by a stand-in: layers that ComfyUI knows by their own names alone."""
    model = tiny_unet_model(seed=4)
    block = model.model.diffusion_model.input_blocks[1][1].transformer_blocks[0]
    with torch.inference_mode():
        block.time_stack = torch.nn.Linear(32, 32)
        original = block.forward
        block.forward = lambda x, *args, **kwargs: original(x, *args, **kwargs) + block.time_stack(x)
        key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.time_stack"
        for spelled in (key, "lora_unet_" + key.removeprefix("diffusion_model.").replace(".", "_")):
            tensors = {f"{spelled}.lora_up.weight": files.Draw(1)(32, 2), f"{spelled}.lora_down.weight": files.Draw(2)(2, 32)}
            assert "1 of 1 layers matched" in report(model, tensors)
            assert_same(sample, ours(model, tensors), native(model, tensors), model)


def test_parameters_that_are_no_layers(tiny_unet_model, ours, report, put, run_node, sample) -> None:
    """As the modulation of Wan's blocks: a parameter of the block itself, which ComfyUI knows by its own name."""
    model = tiny_unet_model(seed=5)
    block = model.model.diffusion_model.input_blocks[1][1].transformer_blocks[0]
    original = block.forward
    with torch.inference_mode():
        block.modulation = torch.nn.Parameter(torch.ones(1, 1, 32), requires_grad=False)
        block.forward = lambda x, *args, **kwargs: original(x, *args, **kwargs) * block.modulation
        tensors = {"diffusion_model.input_blocks.1.1.transformer_blocks.0.modulation.diff": files.Draw(1)(1, 1, 32, std=1.0)}
        assert "1 of 1 layers matched" in report(model, tensors)
        adapted = sample(ours(model, tensors, -0.5))
        plain = sample(model)
        block.modulation += -0.5 * next(iter(tensors.values()))  # ComfyUI's loader takes the file and changes nothing here
        assert close(adapted, sample(model), 1e-3) and not close(adapted, plain, 1e-3)


def test_xlabs_files(ours) -> None:
    """Processors of Flux: as ComfyUI's loader has the same layers of USO's files, by its own names."""
    model = dit_models.flux()
    draw, theirs, plain = files.Draw(4), {}, {}
    places = {"double_blocks.0.processor.qkv_lora1": ("double_blocks.0.img_attn.qkv", 192), "double_blocks.1.processor.proj_lora2": ("double_blocks.1.txt_attn.proj", 64),
              "single_blocks.1.processor.qkv_lora": ("single_blocks.1.linear1_qkv", 192)}  # fmt: skip
    for key, (name, rows) in places.items():
        down, up = draw(4, 64, std=0.2), draw(rows, 4, std=0.2)
        theirs |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
        plain |= {f"diffusion_model.{name}.lora_down.weight": down, f"diffusion_model.{name}.lora_up.weight": up}
    assert_same(dit_models.draw, ours(model, theirs), native(model, plain), model)


def test_alphas_that_only_a_header_or_a_file_beside_states(model, layers, ours, sample) -> None:
    tensors = files.file_of(layers, "LoRA", "diffusers", "PEFT")
    stated = {"r": files.RANK, "lora_alpha": 1.0, "use_rslora": True, "target_modules": []}
    scaled = files.file_of(layers, "LoRA") | {
        f"lora_unet_{name.replace('.', '_')}.alpha": torch.tensor(files.RANK**0.5) for name in layers
    }
    header = json.dumps({f"unet.{key}": value for key, value in stated.items()})
    assert_same(sample, ours(model, tensors, lora_adapter_metadata=header), native(model, scaled), model)
    assert_same(sample, ours(model, tensors, name="folder/adapter_model", beside=stated), native(model, scaled), model)


def test_our_loras_are_loras_for_comfyui_too(pack, model, run_node, put, sample, tmp_path) -> None:
    from random_adapters import random_adapter
    from safetensors.torch import load_file

    core = pack.submodule("styleinject_core")
    made = random_adapter(pack, model, "attention, conv", n_styles=1, sta="none", alpha=2.0, scale=0.3)
    core.save_adapter(made, tmp_path / "ours.safetensors")
    tensors = load_file(tmp_path / "ours.safetensors")
    found = run_node("StyleInjectApply", model=model, adapter=made, strength=-0.5)[0]
    assert_same(sample, found, native(model, tensors, -0.5), model)


def test_matching_is_against_the_model_without_what_others_inject(model, layers, ours, sample, report) -> None:
    """As AnimateDiff does: modules are put between a U-Net's own, which shifts their names, and stay after a run."""
    from comfy.patcher_extension import PatcherInjection

    tensors = files.file_of(files.unet_layers(model), "LoRA")
    expected = sample(native(model, tensors))
    blocks = model.model.diffusion_model.output_blocks
    place = next(n for n, block in enumerate(blocks) if any(hasattr(m, "conv") for m in block))

    def inject(_patcher):
        blocks[place].insert(0, torch.nn.Identity())

    def eject(_patcher):
        del blocks[place][0]

    other = model.clone()
    other.set_injections("motion", [PatcherInjection(inject=inject, eject=eject)])
    try:
        sample(other, steps=1)
        if not other.is_injected:
            other.inject_model()
        assert isinstance(blocks[place][0], torch.nn.Identity), "the stand-in is not in the model"
        total = len(files.unet_layers(model))
        found = ours(model, tensors)
        text = report(model, tensors)
        assert isinstance(blocks[place][0], torch.nn.Identity), "it was not put back"
    finally:
        other.eject_model()
    assert close(sample(found), expected, 1e-3)
    assert "layers matched\n" in text and f"{total} of " not in text.split("\n")[0].replace(f"{total} of {total}", "")


@pytest.mark.skipif("\\" in str(Path.cwd()), reason="names that Windows does not allow")
@pytest.mark.parametrize("name", ["a:b", "a\\b", "C:\\x", "sub/a:b", "..hidden", "a..b", "世界", "a b", "100%", "a'\"b", "all"])
@pytest.mark.parametrize("suffix", [".safetensors", ".SAFETENSORS", ".SafeTensors"])
def test_every_name_that_is_listed_can_be_loaded(pack, model, comfy_base, run_node, layers, name, suffix) -> None:
    import folder_paths

    path = comfy_base / "models" / "loras" / f"{name}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(files.file_of(layers, "LoRA"), path)
    try:
        folder_paths.filename_list_cache.clear()
        listed = pack["StyleInjectLoader"].INPUT_TYPES()["required"]["adapter_name"][1]["options"]
        assert f"loras/{name}{suffix}" in listed
        assert pack["StyleInjectLoader"].validate_inputs(adapter_name=f"loras/{name}{suffix}") is True
        adapter = run_node("StyleInjectLoader", adapter_name=f"loras/{name}{suffix}")[0]
        patched = run_node("StyleInjectApply", model=model, adapter=adapter)[0]
        for called in (adapter.name, f"loras/{name}{suffix}"):
            assert run_node("StyleInjectStrength", model=patched, adapter_name=called, strength=0.5)[0].patches
    finally:
        path.unlink()
        folder_paths.filename_list_cache.clear()
