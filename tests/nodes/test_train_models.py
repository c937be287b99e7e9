"""Training on models of every kind, and from one model to another."""

from __future__ import annotations

import pytest
import torch
from random_adapters import random_adapter
from tiny_model import UNET_CONFIG, fill
from training import SMALL, assert_clean, latents, mean, same


@pytest.fixture(scope="module")
def model(tiny_unet_model):
    return tiny_unet_model()


@pytest.fixture(scope="module")
def sampled_as():
    """sampled_as(model, "v_prediction"): a clone that samples otherwise, by ComfyUI's own nodes."""
    import comfy_extras.nodes_model_advanced as advanced

    def patch(model, kind: str):
        if kind == "flow":
            return advanced.ModelSamplingSD3().patch(model, 3.0)[0]
        if kind == "edm":
            return advanced.ModelSamplingContinuousEDM().patch(model, "edm_playground_v2.5", 80.0, 0.002)[0]
        return advanced.ModelSamplingDiscrete().patch(model, kind, False)[0]

    return patch


@pytest.mark.parametrize(("kind", "type"), [("eps", "epsilon"), ("v_prediction", "v_prediction"), ("x0", "sample"), ("flow", "flow")])
def test_the_prediction_is_what_the_network_puts_out(pack, model, sampled_as, train, conditioning, kind, type) -> None:
    """So that the loss is the one the model was trained with, whatever ComfyUI makes of its output."""
    patched = sampled_as(model, kind)
    module = pack.submodule("nodes.train_model")
    wrapped = module.ComfyTrainingModel(patched)
    assert wrapped.schedule.prediction_type == type
    encoder = pack.submodule("nodes.train_data").Encoder(patched)
    seen = []
    with torch.inference_mode(False), torch.no_grad(), module.Loaded([wrapped], [3, 4, 8, 8]).running():
        handle = patched.model.diffusion_model.register_forward_hook(lambda _module, _args, out: seen.append(out))
        times = wrapped.schedule.times(torch.tensor([0.02, 0.5, 0.97]))
        a, b = wrapped.schedule.coefficients(times)
        noisy = a.view(-1, 1, 1, 1) * latents(3)["samples"] + b.view(-1, 1, 1, 1) * latents(3, seed=1)["samples"]
        rows = encoder.prompts([tuple(conditioning(0)[0])] * 3, [(4, 8, 8)] * 3)
        prediction = wrapped.predict(noisy, times, rows)
        handle.remove()
    torch.testing.assert_close(prediction, seen[0].float(), rtol=1e-3, atol=1e-3)
    assert times.tolist() == sorted(times.tolist())
    adapter, _, _ = train(model=patched, steps=2)
    assert adapter.metadata["modelspec.prediction_type"] == type
    assert_clean(model)


def test_what_cannot_be_trained_is_said(model, sampled_as, train) -> None:
    for kind in ("edm", "lcm"):
        with pytest.raises(ValueError, match="cannot be trained here: expected a model that predicts noise"):
            train(model=sampled_as(model, kind))


def test_weights_in_half_precision(tiny_unet_model, train) -> None:
    """float16 weights that ComfyUI casts to float32 to compute; the adapter is float32."""
    half = tiny_unet_model(dtype=torch.float16)
    half.model.manual_cast_dtype = torch.float32
    for module in half.model.diffusion_model.modules():
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = True
    half.model.diffusion_model.dtype = torch.float16
    adapter, _, _ = train(model=half, steps=3)
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in adapter.parameters())
    assert next(half.model.diffusion_model.parameters()).dtype == torch.float16


def test_a_model_that_takes_sizes_and_pooled_prompts(pack, train) -> None:
    """SDXL: a vector y of pooled prompt and picture size beside the prompt."""
    model = tiny_sdxl()
    prompts = [[torch.randn(1, 77, 64), {"pooled_output": torch.randn(1, 1280)}] for _ in range(4)]
    images = [latents(2), latents(2, height=12)]
    adapter, _, step = train(model=model, conditioning=prompts, latents=images, empty=[prompts[0]])
    assert step == 4
    rows = pack.submodule("nodes.train_data").Encoder(model).prompts([tuple(prompts[0])] * 2, [(4, 8, 8), (4, 12, 8)])
    assert rows["y"].shape == (2, 2816) and not torch.equal(rows["y"][0], rows["y"][1])
    assert len(adapter.names) == len(set(adapter.names))


def tiny_sdxl():
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    unet = {**UNET_CONFIG, "adm_in_channels": 2816, "num_classes": "sequential", "use_linear_in_transformer": True}
    with torch.inference_mode():
        config = comfy.supported_models.SDXL(unet)
        config.unet_config |= {"num_heads": -1, "num_head_channels": 8}
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, "", device=torch.device("cpu"))
        fill(model.diffusion_model, 0)
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    device = comfy.model_management.get_torch_device()
    return kind(model, load_device=device, offload_device=torch.device("cpu"))


def test_a_native_lora_is_part_of_the_base(pack, model, train, sample) -> None:
    import comfy.utils

    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight"
    lora = model.clone()
    weight = comfy.utils.get_attr(model.model, key)
    lora.add_patches({key: ("diff", (0.5 * torch.randn_like(weight),))})
    module = pack.submodule("nodes.train_model")
    prints = []
    for patcher in (model, lora):
        wrapped = module.ComfyTrainingModel(patcher)
        with module.Loaded([wrapped], [1, 4, 8, 8]).running():
            prints.append(wrapped.fingerprint)
    assert prints[0] != prints[1]
    plain = sample(model)
    train(model=lora, steps=1)
    assert torch.equal(sample(model), plain)


@pytest.fixture
def teacher(tiny_unet_model):
    """The model with other weights in its attention: a tuned sibling."""
    tuned = tiny_unet_model()
    generator = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        for name, parameter in tuned.model.diffusion_model.named_parameters():
            if name.endswith(("to_q.weight", "to_v.weight")):
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
    return tuned


def test_distil_brings_the_student_closer_to_the_teacher(model, teacher, train, run_node, sample) -> None:
    wanted, plain = sample(teacher, cfg=1.0), sample(model, cfg=1.0)
    adapter, losses, _ = train(
        "StyleInjectDistill", model=model, teacher=teacher, latents=latents(), layers="to_q, to_v", rank=8, steps=60, learning_rate=5e-3
    )
    assert mean(losses.losses[-10:]) < 0.6 * mean(losses.losses[:10])
    patched = run_node("StyleInjectApply", model=model, adapter=adapter)[0]
    assert (sample(patched, cfg=1.0) - wanted).norm() < 0.85 * (plain - wanted).norm()
    assert torch.equal(sample(model, cfg=1.0), plain) and torch.equal(sample(teacher, cfg=1.0), wanted)
    assert_clean(model)
    assert_clean(teacher)
    assert adapter.metadata["styleinject.objective"] == "distil" and adapter.metadata["styleinject.teacher_hash"]


def test_distil_without_images_draws_the_teachers_own_once(model, teacher, train, conditioning, trained_folder, monkeypatch) -> None:
    import comfy.sample

    options = {"sampling_steps": 2}
    arguments = {"model": model, "teacher": teacher, "conditioning": [conditioning(0), conditioning(1)], "size": 64, "images_per_prompt": 2}
    first, _, _ = train("StyleInjectDistill", options=options, **arguments)
    assert len(list((trained_folder / "drawn").iterdir())) == 1
    monkeypatch.setattr(comfy.sample, "sample", None)  # another draw would raise
    again, _, _ = train("StyleInjectDistill", options={**options, "existing_run": "new"}, **arguments)
    assert same(first, again)


def test_distil_across_text_encoders(model, tiny_unet_model, train, conditioning) -> None:
    """Another width of prompt for the teacher: only outputs are compared."""
    foreign = tiny_unet_model(seed=2, context_dim=48)
    theirs = conditioning(5, context=48)
    arguments = {"model": model, "teacher": foreign, "latents": latents(), "teacher_conditioning": theirs}
    assert train("StyleInjectDistill", **arguments)[2] == 4
    with pytest.raises(ValueError, match="connect both empty and teacher_empty, or none"):
        train("StyleInjectDistill", **arguments, empty=conditioning(9))
    with_empty = train("StyleInjectDistill", **arguments, empty=conditioning(9), teacher_empty=conditioning(9, context=48), name="e")
    assert with_empty[2] == 4


def test_distil_between_predictions(model, teacher, sampled_as, train) -> None:
    assert train("StyleInjectDistill", model=model, teacher=sampled_as(teacher, "v_prediction"), latents=latents())[2] == 4


def test_distil_refuses_what_cannot_be(model, pack, run_node, train) -> None:
    adapter = random_adapter(pack, model)
    with pytest.raises(ValueError, match="teacher and student are the same loaded checkpoint"):
        train("StyleInjectDistill", model=model, teacher=run_node("StyleInjectApply", model=model, adapter=adapter)[0], latents=latents())
    with pytest.raises(ValueError, match="the teacher's latents are DemoLatent, the student's SD15"):
        train("StyleInjectDistill", model=model, teacher=run_node("StyleInjectDemoModel")[0], latents=latents())


def test_dreambooth_draws_its_class_or_takes_images_of_it(model, train, conditioning, trained_folder) -> None:
    common = {"model": model, "class_conditioning": conditioning(1), "class_images": 3, "options": {"sampling_steps": 2}}
    drawn, _, _ = train("StyleInjectDreamBooth", **common, name="a")
    assert len(list((trained_folder / "drawn").iterdir())) == 1
    given, _, _ = train("StyleInjectDreamBooth", **common, class_latents=latents(3, seed=8), name="b")
    alone, _, _ = train("StyleInjectDreamBooth", **common, prior_weight=0.0, name="c")
    assert not same(drawn, given) and not same(drawn, alone)
    plain, _, _ = train(model=model, options={"sampling_steps": 2}, name="d")
    assert same(alone, plain), "without its class it is fine-tuning"
    with pytest.raises(ValueError, match="class_conditioning: 2 prompts for 3 images"):
        train("StyleInjectDreamBooth", **{**common, "class_conditioning": [conditioning(1), conditioning(2)]}, class_latents=latents(3))


def test_the_demo_trains_and_shows_pictures(run_node, trained_folder) -> None:
    model, vae = run_node("StyleInjectDemoModel")
    images, prompts, pictures = run_node("StyleInjectDemoDataset", style="noto", count=6)
    assert len(images) == len(prompts) == len(pictures) == 6
    (empty, _) = run_node("StyleInjectDemoPrompt", text="")
    (options,) = run_node("StyleInjectTrainOptions", vae=vae, picture_every=2, sampling_steps=2, guidance=3.0, picture_prompt=empty)
    widgets = {key: [value] for key, value in SMALL.items()}
    adapter, _, _ = run_node(
        "StyleInjectTrain", model=[model], latents=images, conditioning=prompts, empty=[empty], options=[options], **widgets
    )
    assert adapter.metadata["modelspec.architecture"] == "styleinject-demo/styleinject"
    assert adapter.metadata["modelspec.resolution"] == "64x64"
    assert sorted(path.name for path in (trained_folder / "rough" / "samples").iterdir()) == ["step-000002.png", "step-000004.png"]


def test_the_demo_dataset(run_node) -> None:
    _, prompts, pictures = run_node("StyleInjectDemoDataset", style="all but the base's", things="turtle, Owl", prompt="red owl")
    assert len(pictures) == 8 and pictures[0].shape == (1, 64, 64, 3)
    assert torch.equal(prompts[0][0][0], run_node("StyleInjectDemoPrompt", text="red owl")[0][0][0])
    assert len(run_node("StyleInjectDemoDataset", style="noto")[0]) == 186
    with pytest.raises(ValueError, match="there is no drawing of 'sheriff'"):
        run_node("StyleInjectDemoDataset", things="owl, sheriff")
