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


@pytest.mark.parametrize(
    ("kind", "type"), [("eps", "epsilon"), ("v_prediction", "v_prediction"), ("x0", "sample"), ("flow", "flow")]
)
def test_the_prediction_is_what_the_network_puts_out(pack, model, sampled_as, train, conditioning, kind, type) -> None:
    """So that the loss is the one the model was trained with, whatever ComfyUI makes of its output."""
    patched = sampled_as(model, kind)
    module = pack.submodule("integration.training.comfy_model")
    wrapped = module.ComfyTrainingModel(patched)
    assert wrapped.schedule.prediction_type == type
    encoder = pack.submodule("integration.training.graph_inputs").Encoder(patched)
    seen = []
    with torch.inference_mode(False), torch.no_grad(), module.Loaded([wrapped], [3, 4, 8, 8]).running():
        handle = patched.model.diffusion_model.register_forward_hook(lambda _module, _args, out: seen.append(out))
        times = wrapped.schedule.times(torch.tensor([0.02, 0.5, 0.97]))
        a, b = wrapped.schedule.coefficients(times)
        noisy = a.view(-1, 1, 1, 1) * latents(3)["samples"] + b.view(-1, 1, 1, 1) * latents(3, seed=1)["samples"]
        rows = pack.submodule("styleinject_core.train.data.batches").joined(
            encoder.prompts([tuple(conditioning(0)[0])] * 3, [(4, 8, 8)] * 3)
        )
        prediction = wrapped.predict(noisy, times, rows)
        handle.remove()
    torch.testing.assert_close(prediction, seen[0].float(), rtol=1e-3, atol=1e-3)
    assert times.tolist() == sorted(times.tolist())
    adapter, _, _ = train(model=patched, steps=2)
    assert adapter.metadata["modelspec.prediction_type"] == {"v_prediction": "v"}.get(type, type)  # ModelSpec's word
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
    rows = (
        pack.submodule("integration.training.graph_inputs")
        .Encoder(model)
        .prompts([tuple(prompts[0])] * 2, [(4, 8, 8), (4, 12, 8)])
    )
    first, second = (row["conds"][0]["y"].value for row in rows)
    assert first.shape == second.shape == (1, 2816) and not torch.equal(first, second)
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
    module = pack.submodule("integration.training.comfy_model")
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
        "StyleInjectDistill",
        model=model,
        teacher=teacher,
        latents=latents(),
        layers="to_q, to_v",
        rank=8,
        steps=60,
        learning_rate=5e-3,
    )
    assert mean(losses.losses[-10:]) < 0.6 * mean(losses.losses[:10])
    patched = run_node("StyleInjectApply", model=model, adapter=adapter)[0]
    assert (sample(patched, cfg=1.0) - wanted).norm() < 0.85 * (plain - wanted).norm()
    assert torch.equal(sample(model, cfg=1.0), plain) and torch.equal(sample(teacher, cfg=1.0), wanted)
    assert_clean(model)
    assert_clean(teacher)
    assert adapter.metadata["styleinject.objective"] == "distil" and adapter.metadata["styleinject.teacher_hash"]


def test_distil_without_images_draws_the_teachers_own_once(
    model, teacher, train, conditioning, trained_folder, monkeypatch
) -> None:
    import comfy.sample

    options = {"sampling_steps": 2}
    arguments = {
        "model": model,
        "teacher": teacher,
        "conditioning": [conditioning(0), conditioning(1)],
        "size": 64,
        "images_per_prompt": 2,
    }
    first, _, _ = train("StyleInjectDistill", options=options, **arguments)
    assert len(list((trained_folder / "drawn").iterdir())) == 1
    monkeypatch.setattr(comfy.sample, "sample", None)  # another draw would raise
    again, _, _ = train("StyleInjectDistill", options={**options, "existing_run": "new"}, **arguments)
    assert same(first, again)


def test_drawing_goes_on_after_an_interrupt(model, teacher, train, monkeypatch) -> None:
    import comfy.model_management
    import comfy.sample

    drawn, sample = [], comfy.sample.sample

    def counting(*args, seed, **kwargs):
        drawn.append(seed)
        if len(drawn) == 3:
            raise comfy.model_management.InterruptProcessingException
        return sample(*args, seed=seed, **kwargs)

    monkeypatch.setattr(comfy.sample, "sample", counting)
    given = {
        "model": model,
        "teacher": teacher,
        "size": 64,
        "images_per_prompt": 4,
        "steps": 1,
        "options": {"sampling_steps": 1},
    }
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train("StyleInjectDistill", **given)
    assert_clean(teacher)
    train("StyleInjectDistill", **given)
    assert drawn == [0, 1, 2, 2, 3]


def test_distil_across_text_encoders(model, tiny_unet_model, train, conditioning) -> None:
    """Another width of prompt for the teacher: only outputs are compared."""
    foreign = tiny_unet_model(seed=2, context_dim=48)
    theirs = conditioning(5, context=48)
    arguments = {"model": model, "teacher": foreign, "latents": latents(), "teacher_conditioning": theirs}
    assert train("StyleInjectDistill", **arguments)[2] == 4
    with pytest.raises(ValueError, match="connect both empty and teacher_empty, or none"):
        train("StyleInjectDistill", **arguments, empty=conditioning(9))
    with_empty = train(
        "StyleInjectDistill", **arguments, empty=conditioning(9), teacher_empty=conditioning(9, context=48), name="e"
    )
    assert with_empty[2] == 4


def test_distil_between_predictions(model, teacher, sampled_as, train) -> None:
    assert train("StyleInjectDistill", model=model, teacher=sampled_as(teacher, "v_prediction"), latents=latents())[2] == 4


def test_distil_refuses_what_cannot_be(model, tiny_unet_model, pack, run_node, train) -> None:
    adapter = random_adapter(pack, model)
    with pytest.raises(ValueError, match="teacher and student are the same loaded checkpoint"):
        train(
            "StyleInjectDistill",
            model=model,
            teacher=run_node("StyleInjectApply", model=model, adapter=adapter)[0],
            latents=latents(),
        )
    with pytest.raises(ValueError, match="the teacher's latents are DemoLatent, the student's SD15"):
        train("StyleInjectDistill", model=model, teacher=run_node("StyleInjectDemoModel")[0], latents=latents())
    with pytest.raises(ValueError, match="teacher and student are the same model, there is nothing to learn"):
        train("StyleInjectDistill", model=model, teacher=tiny_unet_model(), latents=latents())
    assert_clean(model)


def test_what_cannot_be_is_said_before_anything_is_drawn(model, teacher, train, conditioning, monkeypatch) -> None:
    import comfy.sample

    monkeypatch.setattr(comfy.sample, "sample", lambda *_args, **_named: pytest.fail("it draws"))
    own = {"model": model, "class_conditioning": conditioning(1), "class_images": 3}
    with pytest.raises(ValueError, match="validation_images: 4 of 4 images leave none to train on"):
        train("StyleInjectDreamBooth", **own, options={"validation_images": 4, "validate_every": 1})
    with pytest.raises(ValueError, match="matches none of the"):
        train("StyleInjectDreamBooth", **own, layers="to_x")
    distil = {"model": model, "teacher": teacher, "size": 64, "images_per_prompt": 2}
    with pytest.raises(ValueError, match="min_snr_gamma"):
        train("StyleInjectDistill", **distil, options={"min_snr_gamma": 5.0})
    with pytest.raises(ValueError, match="validation_images: 2 of 2 images leave none to train on"):
        train("StyleInjectDistill", **distil, options={"validation_images": 2, "validate_every": 1})


def test_attention_without_gradients(model, train, monkeypatch) -> None:
    """SageAttention and its like: ComfyUI's own choice is replaced while training, a patch of another pack is refused."""
    from comfy.ldm.modules import attention

    def without(q, k, v, *args, **named):
        return attention.attention_pytorch(q.detach(), k.detach(), v.detach(), *args, **named)

    patched = model.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = lambda _chosen, *args, **named: without(
        *args, **named
    )
    with pytest.raises(RuntimeError, match=r"no gradient reaches .* layers .*SageAttention"):
        train(model=patched, name="patched")
    without.__name__ = "attention_sage"
    monkeypatch.setattr(attention, "optimized_attention", attention.wrap_attn(without))
    monkeypatch.setattr(attention, "optimized_attention_masked", attention.optimized_attention)
    adapter, _, _ = train(model=model)
    assert all(layer.B.abs().sum() > 0 for layer in adapter.layers.values())


@pytest.mark.parametrize(
    "control", [{"top_k": 1, "role": "positive"}, {"top_k": 1, "start_percent": 0.5}, {"hold": "first step"}], ids=str
)
def test_a_control_that_training_cannot_follow(pack, model, train, run_node, control) -> None:
    (rule,) = run_node("StyleInjectRouterControl", **control)
    steered, _, *_ = run_node("StyleInjectApply", model=model, adapter=random_adapter(pack, model, name="ink"), control=rule)
    with pytest.raises(ValueError, match='adapter "ink" on this model has a router control for one prompt only'):
        train(model=steered)


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
        train(
            "StyleInjectDreamBooth",
            **{**common, "class_conditioning": [conditioning(1), conditioning(2)]},
            class_latents=latents(3),
        )


def test_the_demo_trains_and_shows_pictures(run_node, trained_folder) -> None:
    model, vae, _ = run_node("StyleInjectDemoModel")
    images, prompts, pictures, _ = run_node("StyleInjectDemoDataset", style="noto", count=6)
    assert len(images) == len(prompts) == len(pictures) == 6
    (empty, _) = run_node("StyleInjectDemoPrompt", text="")
    (options,) = run_node(
        "StyleInjectTrainOptions", vae=vae, picture_every=2, sampling_steps=2, guidance=3.0, picture_prompt=empty
    )
    widgets = {key: [value] for key, value in SMALL.items()}
    adapter, _, _ = run_node(
        "StyleInjectTrain", model=[model], latents=images, conditioning=prompts, empty=[empty], options=[options], **widgets
    )
    assert adapter.metadata["modelspec.architecture"] == "styleinject-demo/styleinject"
    assert adapter.metadata["modelspec.resolution"] == "64x64"
    assert sorted(path.name for path in (trained_folder / "rough" / "samples").iterdir()) == [
        "step-000002.png",
        "step-000004.png",
    ]


@pytest.mark.parametrize("router_input", ["layer", "prompt"])
def test_pictures_are_what_the_adapter_draws(pack, run_node, trained_folder, router_input) -> None:
    """With batches of 1 too: cond and uncond are two images, each with a router and statistics of its own."""
    from PIL import Image
    from torchvision.transforms.functional import to_tensor

    model, vae, _ = run_node("StyleInjectDemoModel")
    images, prompts, *_ = run_node("StyleInjectDemoDataset", style="openmoji-line", count=4)
    (empty, _) = run_node("StyleInjectDemoPrompt", text="")
    (options,) = run_node("StyleInjectTrainOptions", vae=vae, picture_every=6, sampling_steps=4, guidance=3.0, seed=2,
                          router_input=router_input)  # fmt: skip
    widgets = {key: [value] for key, value in {**SMALL, "steps": 6, "batch_size": 1, "learning_rate": 3e-2}.items()}
    adapter, _, _ = run_node(
        "StyleInjectTrain", model=[model], latents=images, conditioning=prompts, empty=[empty], options=[options], **widgets
    )
    shown = to_tensor(Image.open(trained_folder / "rough" / "samples" / "step-000006.png"))
    draw = pack.submodule("integration.training.drawing").draw
    expected = {}
    for patched in (model, run_node("StyleInjectApply", model=model, adapter=adapter)[0]):
        prompt, negative = tuple(prompts[0][0]), tuple(empty[0])
        latent = draw(patched, [prompt], negative, images[0]["samples"].shape[1:], seed=2, steps=4, guidance=3.0)
        expected[patched is model] = vae.decode(latent)[0].movedim(-1, 0).clamp(0, 1)
    torch.testing.assert_close(shown, expected[False], rtol=0, atol=0.02)
    assert (shown - expected[True]).abs().max() > 0.2


def test_the_demo_dataset(run_node) -> None:
    _, prompts, pictures, _ = run_node(
        "StyleInjectDemoDataset", style="all but the base's", things="turtle, Owl", prompt="red owl"
    )
    assert len(pictures) == 8 and pictures[0].shape == (1, 64, 64, 3)
    assert torch.equal(prompts[0][0][0], run_node("StyleInjectDemoPrompt", text="red owl")[0][0][0])
    assert len(run_node("StyleInjectDemoDataset", style="noto")[0]) == 186
    with pytest.raises(ValueError, match="there is no drawing of 'sheriff'"):
        run_node("StyleInjectDemoDataset", things="owl, sheriff")


def test_the_demo_dataset_names_the_styles_of_its_drawings(run_node) -> None:
    others = {"style": "all but the base's", "things": "turtle, owl"}
    _, plain, pictures, styles = run_node("StyleInjectDemoDataset", **others)
    _, worded, _, same_styles = run_node("StyleInjectDemoDataset", **others, style_words=True)
    words = ["flat", "shaded", "lineart", "rendered"]
    assert styles == same_styles == words * 2 and len(pictures) == 8

    def said(prompt: str):
        return run_node("StyleInjectDemoPrompt", text=prompt)[0][0][0]

    names = [f"{word} {thing}" for thing in ("turtle", "owl") for word in words]
    for found, name in zip(worded, names, strict=True):
        assert torch.equal(found[0][0], said(name)) and not torch.equal(found[0][0], said(name.split()[1])), name
    assert torch.equal(plain[0][0][0], said("turtle"))
    alone = run_node("StyleInjectDemoDataset", style="noto", things="owl", prompt="red owl", style_words=True)
    assert torch.equal(alone[1][0][0][0], said("shaded red owl")) and alone[3] == ["shaded"]
    base = run_node("StyleInjectDemoDataset", style="openmoji", things="owl", style_words=True)
    assert torch.equal(base[1][0][0][0], said("owl")) and base[3] == ["openmoji"], "the base's own style has no word"


def test_the_demo_dataset_teaches_several_styles(run_node, trained_folder) -> None:
    """Its styles as they come out, to Train StyleInject, which makes as many styles and gives them their names."""
    (model, *_), (empty, _) = run_node("StyleInjectDemoModel"), run_node("StyleInjectDemoPrompt", text="")
    images, prompts, _, styles = run_node(
        "StyleInjectDemoDataset", style="all but the base's", things="turtle, owl", style_words=True
    )
    widgets = {key: [value] for key, value in {**SMALL, "styles": 0}.items()}
    adapter, _, _ = run_node(
        "StyleInjectTrain",
        model=[model], latents=images, conditioning=prompts, empty=[empty], image_styles=styles, **widgets,
    )  # fmt: skip
    assert list(adapter.style_names) == ["flat", "shaded", "lineart", "rendered"]
    assert adapter.config.router_input == "prompt", "a word of the prompt is to choose"


def test_a_flow_model_and_another_kind_do_not_distil(model, teacher, sampled_as, train) -> None:
    for student, other in ((model, sampled_as(teacher, "flow")), (sampled_as(model, "flow"), teacher)):
        with pytest.raises(ValueError, match="a flow model's noisy images are not another one's"):
            train("StyleInjectDistill", model=student, teacher=other, latents=latents())
    assert (
        train("StyleInjectDistill", model=sampled_as(model, "flow"), teacher=sampled_as(teacher, "flow"), latents=latents())[2]
        == 4
    )
    assert_clean(model)


def test_a_teacher_with_another_adapter_draws_anew(pack, model, teacher, train, run_node, trained_folder) -> None:
    drawn = trained_folder / "drawn"
    arguments = {"model": model, "size": 64, "steps": 1, "options": {"sampling_steps": 1}}
    patched, _, *_ = run_node("StyleInjectApply", model=teacher, adapter=random_adapter(pack, teacher, name="ink"))
    names = [train("StyleInjectDistill", teacher=t, **arguments)[0].name for t in (teacher, patched, teacher)]
    assert names == ["rough", "rough_2", "rough"] and len(list(drawn.iterdir())) == 2


def test_what_belongs_to_a_prompt_counts(pack, conditioning) -> None:
    """Pooled outputs, and numbers: the sizes of SDXL, Flux's guidance."""
    prompts_hash = pack.submodule("integration.training.drawing").prompts_hash
    tensor, extras = conditioning(0)[0]
    variants = [
        extras,
        {**extras, "guidance": 3.5},
        {**extras, "guidance": 4.0},
        {"pooled_output": extras["pooled_output"] + 1},
    ]
    assert len({prompts_hash([(tensor, variant)]) for variant in variants}) == 4
    assert prompts_hash([(tensor, extras)]) == prompts_hash([(tensor.clone(), dict(extras))])


def test_a_dropped_caption_keeps_the_size_of_its_picture(pack, train, monkeypatch) -> None:
    model, seen = tiny_sdxl(), []
    module = pack.submodule("integration.training.comfy_model").ComfyTrainingModel
    predict = module.predict
    monkeypatch.setattr(
        module, "predict", lambda self, *a: seen.append((a[0].shape[-2], a[2]["conds"][0]["y"].value)) or predict(self, *a)
    )
    prompts = [[torch.randn(1, 77, 64), {"pooled_output": torch.randn(1, 1280)}] for _ in range(5)]
    train(
        model=model, conditioning=prompts[:4], latents=[latents(2), latents(2, height=12)], empty=[prompts[4]], batch_size=1,
        steps=8, options={"caption_dropout": 1.0}, memory="off",
    )  # fmt: skip
    encoder = pack.submodule("integration.training.graph_inputs").Encoder(model)
    expected = {height: encoder.prompts([tuple(prompts[4])], [(4, height, 8)])[0]["conds"][0]["y"].value for height in (8, 12)}
    assert {height for height, _ in seen} == {8, 12}
    assert all(torch.equal(y, expected[height]) for height, y in seen)


def test_prompts_that_cannot_be_repeated_are_never_mixed(pack, tiny_unet_model, train, conditioning, monkeypatch) -> None:
    """Joint attention would notice a prompt that is there twice: in one batch, each length has a call of its own."""
    import comfy.conds

    model, seen = tiny_unet_model(), []
    model.model.extra_conds = lambda **kwargs: {"c_crossattn": comfy.conds.CONDRegular(kwargs["cross_attn"])}
    module = pack.submodule("integration.training.comfy_model").ComfyTrainingModel
    call = module._call
    monkeypatch.setattr(module, "_call", lambda self, *a: seen.append(tuple(a[2]["c_crossattn"].shape[:2])) or call(self, *a))
    prompts = [conditioning(k, tokens=tokens) for k, tokens in enumerate((23, 26, 23, 31))]
    given = {"model": model, "conditioning": prompts, "memory": "off", "steps": 8}
    train(**given, empty=conditioning(9, tokens=5), options={"caption_dropout": 0.3}, batch_size=4)
    assert {tokens for _, tokens in seen} == {5, 23, 26, 31} and (2, 23) in seen
    assert sum(rows for rows, _ in seen) == 4 * 8


def test_whatever_a_model_is_given_is_handled_by_its_kind(pack, tiny_unet_model, monkeypatch) -> None:
    """A call has the rows that ComfyUI would have in one, and every row comes back in its place."""
    import comfy.conds as conds

    model = tiny_unet_model()

    def extra_conds(**kwargs):
        prompt = kwargs["cross_attn"]
        return {
            "c_crossattn": conds.CONDCrossAttn(prompt),
            "c_concat": conds.CONDNoiseShape(kwargs["concat_latent_image"]),
            "num_tokens": conds.CONDConstant(prompt.shape[1]),
            "method": conds.CONDConstant("index"),
            "ref_latents": conds.CONDList([prompt[:, :1], prompt[:, :2]]),
            **({"attention_mask": conds.CONDRegular(torch.ones(1, prompt.shape[1]))} if prompt.shape[1] > 4 else {}),
        }

    model.model.extra_conds = extra_conds
    inputs = pack.submodule("integration.training.graph_inputs")
    batches = pack.submodule("styleinject_core.train.data.batches")
    encoder = inputs.Encoder(model)
    prompts = [
        (torch.full((1, tokens, 8), float(k)), {"concat_latent_image": torch.full((1, 4, 8, 8), float(k))})
        for k, tokens in enumerate((3, 5, 3, 7, 5))
    ]
    rows = encoder.prompts(prompts, [(4, 8, 8)] * 5)
    calls = inputs.called_together(batches.joined(rows), torch.device("cpu"))
    assert [numbers for numbers, _ in calls] == [[0, 2], [1, 4], [3]]
    named = calls[1][1]
    assert named["num_tokens"] == 5 and named["method"] == "index" and named["attention_mask"].shape == (2, 5)
    assert named["c_crossattn"][:, 0, 0].tolist() == named["c_concat"][:, 0, 0, 0].tolist() == [1, 4]
    assert [tuple(t.shape) for t in named["ref_latents"]] == [(2, 1, 8), (2, 2, 8)]
    assert "attention_mask" not in calls[0][1]

    wrapped = pack.submodule("integration.training.comfy_model").ComfyTrainingModel(model)
    monkeypatch.setattr(
        wrapped, "_call", lambda noisy, times, named, *_: noisy + times[:, None, None, None] + named["num_tokens"]
    )
    noisy, times = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 4, 8, 8), torch.arange(5.0)
    expected = [2 * k + tokens for k, tokens in enumerate((3, 5, 3, 7, 5))]
    assert wrapped._denoised(noisy, times, calls)[:, 0, 0, 0].tolist() == expected

    shuffled = batches.rows(batches.joined(rows), [3, 0])
    assert shuffled["conds"][0]["num_tokens"].value == 7
    assert batches.conditioning_hash(rows[0]) != batches.conditioning_hash(rows[1])
    assert batches.conditioning_hash(rows[0]) == batches.conditioning_hash(encoder.prompts(prompts[:1], [(4, 8, 8)])[0])


def test_latents_of_other_models(pack, tiny_unet_model) -> None:
    """Of video models, and of those whose latents are smaller."""
    import comfy.latent_formats as formats

    model = tiny_unet_model()
    encoder = pack.submodule("integration.training.graph_inputs").Encoder(model)
    assert encoder.pixels_per_latent == 8 and encoder.framed(torch.zeros(4, 8, 6)).shape == (4, 8, 6)
    model.model.latent_format = formats.Wan21()
    assert encoder.framed(torch.zeros(16, 8, 6)).shape == (16, 1, 8, 6)
    assert encoder.framed(torch.zeros(16, 3, 8, 6)).shape == (16, 3, 8, 6)
    if hasattr(formats.LatentFormat, "spacial_downscale_ratio"):
        model.model.latent_format = formats.Wan22()
        assert encoder.pixels_per_latent == 16


def quantized(model):
    """The tiny model with its attention's weights in scaled fp8, as a checkpoint of such a model is loaded."""
    import json

    import comfy.ops
    import comfy.supported_models

    quant_ops = pytest.importorskip("comfy.quant_ops", reason="this ComfyUI has no quantized layers")
    if not hasattr(comfy.ops, "mixed_precision_ops") or "float8_e4m3fn" not in quant_ops.QUANT_ALGOS:
        pytest.skip("this ComfyUI has no quantized layers of this kind")
    config = comfy.supported_models.SD15(dict(UNET_CONFIG))
    config.unet_config["num_heads"] = 4
    config.quant_config = {"mixed_ops": True}
    state = {}
    for name, value in model.model.diffusion_model.state_dict().items():
        part = name.removesuffix(".weight")
        if name.endswith((".to_q.weight", ".to_v.weight")):
            scale = value.abs().max() / 448
            state[name], state[f"{part}.weight_scale"] = (value / scale).to(torch.float8_e4m3fn), scale.float()
            about = json.dumps({"format": "float8_e4m3fn"}).encode()
            state[f"{part}.comfy_quant"] = torch.tensor(list(about), dtype=torch.uint8)
        else:
            state[name] = value
    with torch.inference_mode():
        config.set_inference_dtype(torch.float32, None)
        made = config.get_model({}, "", device=torch.device("cpu"))
        made.diffusion_model.load_state_dict(state)
    return type(model)(made, load_device=model.load_device, offload_device=model.offload_device)


def test_quantized_weights(model, train, sample) -> None:
    packed = quantized(model)
    layers = [layer for layer in packed.model.diffusion_model.modules() if getattr(layer, "layout_type", None)]
    assert layers and all(type(layer.weight).__name__ != "Parameter" for layer in layers)
    for layer in layers:  # as on a GPU that computes in fp8
        layer._full_precision_mm = False
    before = sample(packed)
    adapter, _, step = train(model=packed, steps=3, layers="to_q, to_v, conv")
    assert step == 3 and all(layer.B.abs().max() > 0 for layer in adapter.layers.values())
    assert not any(layer._full_precision_mm for layer in layers)
    assert torch.equal(sample(packed), before)


def test_pictures_of_several_prompts_are_drawn_one_at_a_time(pack, run_node, trained_folder, monkeypatch, caplog) -> None:
    """Beside a training there is little memory left; and the first lines say what is trained on what."""
    model, vae, _ = run_node("StyleInjectDemoModel")
    images, prompts, *_ = run_node("StyleInjectDemoDataset", style="openmoji-line", count=3)
    two = [entry for prompt in prompts[:2] for entry in prompt]
    (options,) = run_node("StyleInjectTrainOptions", vae=vae, picture_every=1, sampling_steps=2, picture_prompt=two)
    job, calls = pack.submodule("integration.training.job"), []

    def counted(patcher, some, *args, **kwargs):
        calls.append((len(some), kwargs["seed"]))
        return drawn(patcher, some, *args, **kwargs)

    drawn = job.draw
    monkeypatch.setattr(job, "draw", counted)
    widgets = {key: [value] for key, value in {**SMALL, "steps": 1, "batch_size": 1}.items()}
    with caplog.at_level("INFO"):
        run_node("StyleInjectTrain", model=[model], latents=images, conditioning=prompts, options=[options], **widgets)
    assert calls == [(1, 0), (1, 1)] and (trained_folder / "rough" / "samples" / "step-000001.png").exists()
    assert (
        "predicting v_prediction" in caplog.text
        and "3 of 64x64" in caplog.text
        and "pictures by the VAE DemoVAE" in caplog.text
    )
