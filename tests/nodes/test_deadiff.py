"""DEADiff in real ComfyUI: against an attention patch that computes the paper's equations, in batches of every kind, beside
what else is done to a model, and with wrong input."""

from __future__ import annotations

import json

import deadiff_models as models
import pytest
import tiny_model
import torch
from random_adapters import close, random_adapter
from running_blocks import cached


@pytest.fixture
def model(tiny_unet_model):
    return tiny_unet_model()


@pytest.fixture(scope="session")
def core(pack):
    return pack.submodule("styleinject_core.deadiff")


@pytest.fixture(scope="session")
def deadiff_file(core, comfy_base):
    """models/deadiff/tiny.safetensors, for the tiny MODEL; strong, so that its effect cannot be overlooked."""
    folder = comfy_base / "models" / "deadiff"
    folder.mkdir(exist_ok=True)
    core.save_deadiff(models.random_model(core, models.tiny_config(core), scale=3.0), folder / "tiny.safetensors")
    return "tiny.safetensors"


@pytest.fixture
def deadiff(run_node, deadiff_file):
    return run_node("StyleInjectLoadDeadiff", deadiff_name=deadiff_file)[0]


@pytest.fixture
def tokens(core, deadiff):
    """tokens(stream, seed, images, count): of the loaded model, without an image."""

    def make(stream="style", seed=0, images=1, count=4):
        values = torch.randn(images, count, 24, generator=torch.Generator().manual_seed(seed))
        return core.Tokens(values, stream, deadiff.model.stream_id(stream))

    return make


@pytest.fixture
def apply(run_node, deadiff):
    return lambda model, **inputs: run_node("StyleInjectApplyDeadiff", model=model, deadiff=deadiff, **inputs)[0]


@pytest.fixture
def paper(pack, deadiff):
    """paper(model, tokens by stream, ...): a clone whose attn2 replace patches compute the joint attention by hand.

    Nothing of it is this pack's but the layer names: ComfyUI gives q, k and v of the text alone, cond_or_uncond says
    which rows are negative (1).
    """
    names_of = pack.submodule("integration.places").unet_modules

    def patched(model, style=None, content=None, weights=(1.0, 1.0), negative=None, repeats=None):
        clone = model.clone()
        sites = deadiff.model.config.sites
        names = names_of(model.model, [f"{site.name}.to_k" for site in sites])
        for place, site in enumerate(sites):
            side, number, *_ = names[f"{site.name}.to_k"].split(".")
            key = ("middle", 0) if side == "middle_block" else (side.split("_")[0], int(number))
            own, weight = (style, weights[0]) if site.stream == "style" else (content, weights[1])
            count = (own if own is not None else style if style is not None else content).count
            pieces = [torch.zeros(1, count, site.width)] * 4 if own is None else None
            if pieces is None:
                pieces = [weight * own.values @ deadiff.model.to_kv[place][part].float().T for part in ("i_to_k", "i_to_v")]
                against = negative is not None and site.stream == negative.stream
                pieces += [
                    weight * negative.values @ deadiff.model.to_kv[place][part].float().T
                    if against
                    else torch.zeros_like(pieces[0][:1])
                    for part in ("i_to_k", "i_to_v")
                ]
            clone.set_model_attn2_replace(joint(*pieces, repeats), *key)
        return clone

    def joint(keys, values, negative_keys, negative_values, copies):
        def attention(q, k, v, options):
            entries = options["cond_or_uncond"]
            images = q.shape[0] // len(entries)
            times = copies or max(1, round(k.shape[1] / 77))
            more = [
                torch.cat([(b if entry == 1 else a)[[n % len(b if entry == 1 else a) for n in range(images)]] for entry in entries])
                .repeat(1, times, 1)
                for a, b in ((keys, negative_keys), (values, negative_values))
            ]  # fmt: skip
            k, v, heads = torch.cat([k, more[0]], 1), torch.cat([v, more[1]], 1), options["n_heads"]
            q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2).double() for x in (q, k, v))
            weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
            return (weights @ v).transpose(1, 2).flatten(2).float()

        return attention

    return patched


def leftovers(model) -> list[str]:
    modules = model.model.diffusion_model.named_modules()
    return [name for name, m in modules if any(key == "forward" or "styleinject" in key for key in m.__dict__)]


# --- what sampling gives ----------------------------------------------------------------------------------------


def test_sampling_is_the_papers_and_leaves_no_trace(model, apply, tokens, paper, sample) -> None:
    style, content = tokens(), tokens("content", 1)
    vanilla = sample(model)
    for given in ({"style": style}, {"content": content}, {"style": style, "content": content}):
        found = sample(apply(model, **given, weight_style=0.8, weight_content=1.3))
        assert close(found, sample(paper(model, **given, weights=(0.8, 1.3))))
        assert not close(found, vanilla, 0.05)
    assert torch.equal(sample(model), vanilla)
    assert leftovers(model) == []


def test_weight_0_is_the_model_bit_for_bit_and_so_is_an_unused_part_of_sampling(model, apply, tokens, sample) -> None:
    style, vanilla = tokens(), sample(model)
    assert torch.equal(sample(apply(model, style=style, weight_style=0.0)), vanilla)
    assert torch.equal(
        sample(apply(model, style=style, content=tokens("content"), weight_style=0.0, weight_content=0.0)), vanilla
    )
    assert not close(sample(apply(model, style=style, weight_style=1e-6)), vanilla, 0.001)  # null tokens are not nothing
    halves = [sample(apply(model, style=style, **part), steps=4) for part in ({"end_percent": 0.5}, {"start_percent": 0.5}, {})]
    assert all(not close(a, b, 0.01) for a, b in ((halves[0], halves[1]), (halves[0], halves[2]), (halves[1], halves[2])))


def test_a_reference_without_effect_is_said(pack, model, apply, tokens, sample, caplog, tmp_path) -> None:
    """Percents that no step falls into; and where the model is saved, which cannot hold it."""
    import comfy.sd

    patched = apply(model, style=tokens(), start_percent=0.4, end_percent=0.41)
    assert torch.equal(sample(patched), sample(model))
    (line,) = [r.getMessage() for r in caplog.records if "had no effect" in r.getMessage()]
    assert '"reference tiny" had no effect in this run: none of its 3 steps is inside of start_percent 0.4' in line
    sample(apply(model, style=tokens()))
    sample(apply(model, style=tokens(), weight_style=0.0, weight_content=0.0, start_percent=0.4, end_percent=0.41))
    sample(cached(apply(model, style=tokens())))
    assert len([r for r in caplog.records if "had no effect" in r.getMessage()]) == 1
    with torch.inference_mode():
        comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), apply(model, style=tokens()))
    assert '"reference tiny" is not saved: what it changes depends on the picture' in caplog.text


def test_a_replace_patch_of_another_pack_sees_the_joint_keys(model, apply, tokens, sample) -> None:
    from comfy.ldm.modules.attention import optimized_attention

    seen = []

    def other(q, k, v, options):
        seen.append(k.shape[1])
        return optimized_attention(q, k, v, options["n_heads"])

    style = tokens()
    expected = sample(apply(model, style=style))
    for first in (True, False):
        patched = model.clone() if first else apply(model, style=style)
        for key in (("input", 1), ("middle", 0), ("output", 2)):
            patched.set_model_attn2_replace(other, *key)
        patched = apply(patched, style=style) if first else patched
        assert close(sample(patched), expected)
    assert set(seen) == {81}


@pytest.mark.parametrize(("positive", "negative"), [(77, 154), (154, 77), (77, 231), (154, 231)])
def test_prompts_of_other_lengths(model, apply, tokens, paper, sample, conditioning, monkeypatch, positive, negative) -> None:
    """ComfyUI repeats the shorter one in a batch: the result is that of each prompt for itself."""
    import comfy.model_base

    prompts = {"positive": conditioning(0, tokens=positive), "negative": conditioning(1, tokens=negative)}
    patched = apply(model, style=tokens())
    together = sample(patched, **prompts)
    assert close(together, sample(paper(model, style=tokens()), **prompts))
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *_a, **_k: 1e30)
    assert close(sample(patched, **prompts), together, 1e-3), "one call for each prompt, as with little memory"


def test_batches_and_areas(model, apply, tokens, paper, sample, conditioning) -> None:
    style = tokens()
    assert close(sample(apply(model, style=style), batch=3), sample(paper(model, style=style), batch=3))
    area = [[features, {**options, "area": (4, 4, 0, 0)}] for features, options in conditioning(2)]
    mask = [
        [features, {**options, "mask": torch.ones(1, 8, 8) * 0.5, "set_area_to_bounds": False}]
        for features, options in conditioning(3)
    ]
    for extra in (area, mask):
        given = {"positive": conditioning(0) + extra, "negative": conditioning(1)}
        found = sample(apply(model, style=style), **given)
        assert close(found, sample(paper(model, style=style), **given))
        assert not close(found, sample(apply(model, style=style)), 0.01)


def test_a_reference_for_each_picture_of_a_batch(model, core, apply, tokens, paper, sample) -> None:
    several = tokens(images=3)
    found = sample(apply(model, style=several), batch=3)
    assert close(found, sample(paper(model, style=several), batch=3))
    alone = core.Tokens(several.values[1:2], "style", several.model_id)
    assert close(found[1:2], sample(apply(model, style=alone), batch=3)[1:2], 1e-3)


def test_a_negative_reference(model, apply, tokens, paper, sample) -> None:
    style, against = tokens(), tokens(seed=5)
    found = sample(apply(model, style=style, negative=against))
    assert close(found, sample(paper(model, style=style, negative=against)))
    assert not close(found, sample(apply(model, style=style)), 0.01)


def test_several_apply_nodes_are_side_by_side(model, core, apply, tokens, sample, run_node) -> None:
    a, b = tokens(seed=1), tokens(seed=2)
    chained = sample(apply(apply(model, style=a), style=b))
    (both,) = run_node("StyleInjectMixTokens", tokens_a=a, tokens_b=b, how="side by side")
    assert close(chained, sample(apply(model, style=both)), 1e-3)
    (between,) = run_node("StyleInjectMixTokens", tokens_a=a, tokens_b=b, weight_a=3.0, weight_b=1.0)
    torch.testing.assert_close(between.values, 0.75 * a.values + 0.25 * b.values)
    assert not close(chained, sample(apply(model, style=between)), 0.01)


def test_weights_of_layers(model, apply, tokens, sample, run_node) -> None:
    style = tokens()
    everywhere = sample(apply(model, style=style, weight_style=0.5))
    assert close(sample(apply(model, style=style, layers="all = 0.5")), everywhere)
    (weights,) = run_node("StyleInjectLayerWeights", cross_attention=0.5, convolutions=0.0)
    assert close(sample(apply(model, style=style, layer_weights=weights)), everywhere)
    assert not close(sample(apply(model, style=style, layers="up = 0")), everywhere, 0.01)
    with pytest.raises(Exception, match="conv"):
        apply(model, style=style, layers="conv = 0.5")


def test_masks(model, apply, tokens, sample) -> None:
    style = tokens()
    whole, vanilla = sample(apply(model, style=style)), sample(model)
    assert close(sample(apply(model, style=style, mask=torch.ones(1, 64, 64))), whole, 1e-3)
    halves, base = torch.zeros(2, 1, 64, 64), sample(model, steps=1)
    halves[0, ..., :32], halves[1, ..., 32:] = 1, 1
    found = [sample(apply(model, style=style, mask=half), steps=1) for half in halves]
    left, right = slice(0, 3), slice(5, 8)  # of 8 columns; convolutions and self-attention carry some of it over the edge
    changes = [[(latent - base).abs()[..., side].mean() for side in (left, right)] for latent in found]
    assert changes[0][0] > 1.3 * changes[1][0] and changes[1][1] > 1.3 * changes[0][1]
    found = found[0]
    assert not close(found, vanilla, 0.01)
    assert leftovers(model) == []


@pytest.mark.parametrize("foreign", [False, True])
def test_a_masked_layer_is_joint_inside_and_text_alone_outside(pack, model, core, apply, tokens, foreign) -> None:
    """One attention: with ComfyUI's own, and through a patch of another pack."""
    from comfy.ldm.modules.attention import optimized_attention

    reference = pack.submodule("integration.reference")
    halves = torch.zeros(2, 1, 8, 8)
    halves[0, :, :4], halves[1, :, 4:] = 1, 1
    masks = [halves[0], None, halves[1]]
    applied = [
        reference.AppliedReference(core.Reference(apply.__closure__[0].cell_contents.model, tokens(seed=k)), mask=mask)
        for k, mask in enumerate(masks)
    ]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 32, generator=g) for n in (64, 77 + 12, 77 + 12))
    call = pack.submodule("styleinject_core.call").ModelCall(find_roles=lambda: ("positive", "negative"))
    inner = (lambda q, k, v, options: optimized_attention(q, k, v, options["n_heads"])) if foreign else None
    options = {"patches_replace": {"attn2": {("input", 1): inner} if inner else {}}, "n_heads": 4}
    patched = reference.masked_options(applied, model.model, torch.zeros(2, 4, 8, 8), [call] * 3, options)
    assert options["patches_replace"]["attn2"].get(("input", 1, 0)) is None, "the caller's options were changed"
    found = patched["patches_replace"]["attn2"]["input", 1, 0](q, k, v, {"n_heads": 4})

    def of(*columns):
        kept = torch.cat([torch.arange(77), *(torch.arange(77 + 4 * c, 81 + 4 * c) for c in columns)])
        return optimized_attention(q, k[:, kept], v[:, kept], 4)

    torch.testing.assert_close(found[:, :32], of(0, 1)[:, :32], atol=1e-5, rtol=1e-5)  # the upper half: the first two
    torch.testing.assert_close(found[:, 32:], of(1, 2)[:, 32:], atol=1e-5, rtol=1e-5)


def test_masks_on_latents_of_odd_sizes(model, apply, tokens, sample) -> None:
    found = sample(apply(model, style=tokens(), mask=torch.ones(1, 50, 70)), height=9, width=13)
    assert close(found, sample(apply(model, style=tokens()), height=9, width=13), 1e-3)


# --- beside what else is done to a model ------------------------------------------------------------------------


def test_beside_a_lora_and_an_adapter_in_any_order(pack, model, apply, tokens, run_node, sample) -> None:
    import comfy.sd

    adapter = random_adapter(pack, model, "attn2.to_k", "attn2.to_v")
    style = tokens()

    def adapted(m):
        return run_node("StyleInjectApply", model=m, adapter=adapter)[0]

    expected = sample(adapted(apply(model, style=style)))
    assert close(sample(apply(adapted(model), style=style)), expected)
    assert not close(sample(adapted(model)), expected, 0.01) and not close(sample(apply(model, style=style)), expected, 0.01)
    assert close(
        sample(run_node("StyleInjectStrength", model=adapted(apply(model, style=style)), strength=0.0)[0]),
        sample(apply(model, style=style)),
    )
    lora = {}
    for name, module in model.model.diffusion_model.named_modules():
        if name.endswith("attn2.to_k"):
            key = "lora_unet_" + name.replace(".", "_")
            lora[f"{key}.lora_down.weight"] = 0.2 * torch.randn(
                4, module.in_features, generator=torch.Generator().manual_seed(1)
            )
            lora[f"{key}.lora_up.weight"] = 0.2 * torch.randn(
                module.out_features, 4, generator=torch.Generator().manual_seed(2)
            )
    first = sample(apply(comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0], style=style))
    second = sample(comfy.sd.load_lora_for_models(apply(model, style=style), None, lora, 1.0, 0)[0])
    assert close(first, second) and not close(first, sample(apply(model, style=style)), 0.001)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("order", ["pack last", "pack first"])
def test_packs_that_run_the_blocks_themselves(model, apply, tokens, sample, order, mask) -> None:
    given = {"style": tokens(), "end_percent": 0.6}
    if mask:
        given["mask"] = torch.zeros(1, 64, 64)
        given["mask"][..., :32] = 1
    expected, vanilla = sample(apply(model, **given), batch=2), sample(model, batch=2)
    patched = cached(apply(model, **given)) if order == "pack last" else apply(cached(model), **given)
    assert close(sample(patched, batch=2), expected) and not close(expected, vanilla, 0.01)
    assert torch.equal(sample(model, batch=2), vanilla) and leftovers(model) == []


def test_packs_that_call_the_model_have_the_reference_once_and_other_models_none(model, apply, tokens, sample) -> None:
    """Through a mask's replace patch too, which what the pack passes on must not bring along."""
    mask, seen = torch.ones(1, 64, 64), []
    mask[..., 32:] = 0
    patched = apply(model, style=tokens(), mask=mask)
    expected = sample(patched, steps=1)

    def both(apply_model, args):
        options = {**args["c"]["transformer_options"], "wrappers": {}}
        base = model.model.apply_model(args["input"], args["timestep"], **{**args["c"], "transformer_options": options})
        seen.append((args, base, apply_model(args["input"], args["timestep"], **args["c"])))
        return seen[-1][2]

    patched.set_model_unet_function_wrapper(both)
    assert torch.equal(sample(patched, steps=1), expected)
    ((args, base, referenced),) = seen
    with torch.inference_mode():
        bare = model.model.apply_model(args["input"], args["timestep"], **{**args["c"], "transformer_options": {}})
    assert torch.equal(base, bare) and not close(referenced, bare, 0.001)


def test_little_memory(model, apply, tokens, sample, monkeypatch) -> None:
    import comfy.model_management
    import comfy.model_patcher

    patched = apply(model, style=tokens())
    expected = sample(patched)

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        self.patch_model(device_to, lowvram_model_memory=1, load_weights=True)
        return 0

    comfy.model_management.unload_all_models()
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "partially_load", partially_load)
    assert close(sample(patched), expected)


def test_fp8_weights(apply, tokens, paper, sample) -> None:
    fp8, twin = tiny_model.fp8_model()
    style = tokens()
    assert close(sample(apply(fp8, style=style)), sample(paper(twin, style=style)))


def test_half_precision(tiny_unet_model, apply, tokens, sample) -> None:
    half, whole = tiny_unet_model(dtype=torch.bfloat16), tiny_unet_model()
    found = sample(apply(half, style=tokens()), steps=2)
    assert torch.isfinite(found).all()
    assert close(found, sample(apply(whole, style=tokens()), steps=2), 0.3)


def test_torch_compile(model, apply, tokens, sample) -> None:
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    torch._dynamo.reset()
    patched = apply(model, style=tokens(), end_percent=0.5)
    expected = sample(patched, steps=2)
    compiled = patched.clone()
    set_torch_compile_wrapper(compiled, backend="eager", keys=["diffusion_model.middle_block.1.transformer_blocks.0.attn2"])
    assert close(sample(compiled, steps=2), expected)


def test_two_models_do_not_mix(model, apply, tokens, sample) -> None:
    first, second = apply(model, style=tokens(seed=1)), apply(model, style=tokens(seed=2))
    results = [sample(m) for m in (model, first, second)]
    for _ in range(2):
        assert all(torch.equal(sample(m), r) for m, r in zip((model, first, second), results, strict=True))


def test_an_interrupt_leaves_the_model_clean(model, apply, tokens, sample) -> None:
    import comfy.model_management

    vanilla = sample(model)

    def stop(*_):
        raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(apply(model, style=tokens()), steps=4, callback=stop)
    assert torch.equal(sample(model), vanilla) and leftovers(model) == []


def test_a_guider_without_a_negative_prompt(pack, model, apply, tokens, sample) -> None:
    assert close(sample(apply(model, style=tokens()), cfg=1.0), sample(apply(model, style=tokens()), cfg=1.0))
    reference = pack.submodule("integration.reference")
    applied = pack.submodule("integration.patcher").references_of(apply(model, style=tokens()))[0]
    call = pack.submodule("styleinject_core.call").ModelCall

    def roles(found, entries, images=2):
        return applied.call(call(images=images, extras={"cond_or_uncond": entries}, find_roles=lambda: found)).roles

    assert roles(("positive",), [0]) == ("positive",)
    assert roles(("middle", "negative", "positive"), [2, 1, 0], 3) == ("positive", "negative", "positive")
    assert roles(("unknown",), [1, 0]) == ("negative", "positive")
    assert roles(("unknown",), []) == ("positive",)
    assert roles(("unknown",), [1, 0], 3) == ("positive",)
    assert roles(("cond 1", "cond 0"), [1, 0]) == ("negative", "positive")
    assert reference.block_key("output_blocks.11.1.transformer_blocks.0.attn2.to_k") == ("output", 11, 0)


def test_training_on_a_model_with_a_reference(model, apply, tokens, train) -> None:
    losses = {}
    for name, patched, options in (
        ("plain", model, {}),
        ("reference", apply(model, style=tokens()), {}),
        ("checkpointed", apply(model, style=tokens()), {"gradient_checkpointing": True}),
    ):
        _, history, _ = train(model=patched, name=name, options=options)
        losses[name] = torch.tensor(history.losses)
    torch.testing.assert_close(losses["reference"], losses["checkpointed"], atol=1e-5, rtol=1e-4)
    assert (losses["plain"] - losses["reference"]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="a reference image is on this model for 0% to 50% of sampling"):
        train(model=apply(model, style=tokens(), end_percent=0.5), name="refused")


# --- from an image ----------------------------------------------------------------------------------------------


@pytest.fixture
def vision(tmp_path, deadiff):
    """vision(class_embedding=None, **config): a CLIP_VISION of two blocks, ViT-L's sizes unless config says otherwise."""
    import comfy.clip_vision

    def build(class_embedding=None, **config):
        values = {
            "attention_dropout": 0.0, "dropout": 0.0, "hidden_act": "quick_gelu", "hidden_size": 1024, "image_size": 224,
            "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 64, "layer_norm_eps": 1e-5,
            "model_type": "clip_vision_model", "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 2,
            "patch_size": 14, "projection_dim": 768, "torch_dtype": "float32", **config,
        }  # fmt: skip
        path = tmp_path / "vision.json"
        path.write_text(json.dumps(values))
        clip = comfy.clip_vision.ClipVisionModel(str(path))
        models.randomize(clip.model)
        own = deadiff.model.class_embedding if class_embedding is None else class_embedding
        if own.shape == clip.model.vision_model.embeddings.class_embedding.shape:
            with torch.no_grad():
                clip.model.vision_model.embeddings.class_embedding.copy_(own)
        return clip

    return build


def image(seed=0, height=90, width=120, images=1):
    return torch.rand(images, height, width, 3, generator=torch.Generator().manual_seed(seed))


def test_an_image_becomes_tokens(core, deadiff, vision, run_node) -> None:
    clip = vision()
    style, content = run_node(
        "StyleInjectEncodeReference", deadiff=deadiff, image=image(), stream="style & content", clip_vision=clip
    )
    assert style.stream == "style" and content.stream == "content" and style.values.shape == (1, 4, 24)
    pixels = core.vision.squash(image())
    features = clip.encode_image(pixels, crop=False)["penultimate_hidden_states"]
    torch.testing.assert_close(style.values, deadiff.model.encode(features, "style").values, atol=1e-5, rtol=1e-4)
    only, none = run_node("StyleInjectEncodeReference", deadiff=deadiff, image=image(), clip_vision=clip)
    assert none is None and torch.equal(only.values, style.values)
    mask = torch.zeros(1, 90, 120)
    mask[..., :60] = 1
    masked, _ = run_node("StyleInjectEncodeReference", deadiff=deadiff, image=image(), clip_vision=clip, mask=mask)
    assert (masked.values - only.values).abs().max() > 1e-3
    two = torch.cat([image(), image(1)])
    by = {how: run_node("StyleInjectEncodeReference", deadiff=deadiff, image=two, batch=how, clip_vision=clip)[0]
          for how in ("average", "side by side", "one per image")}  # fmt: skip
    each = by["one per image"].values
    assert each.shape == (2, 4, 24) and by["side by side"].values.shape == (1, 8, 24)
    torch.testing.assert_close(by["average"].values, each.mean(0, keepdim=True))


def test_the_q_formers_are_not_loaded_while_sampling(model, deadiff, vision, apply, run_node, sample) -> None:
    import comfy.model_management

    style, _ = run_node("StyleInjectEncodeReference", deadiff=deadiff, image=image(), clip_vision=vision())
    assert any(loaded.model is deadiff.patcher for loaded in comfy.model_management.current_loaded_models)
    comfy.model_management.unload_all_models()
    sample(apply(model, style=style))
    assert all(loaded.model is not deadiff.patcher for loaded in comfy.model_management.current_loaded_models)


def test_the_one_node_path(model, deadiff_file, deadiff, vision, apply, run_node, sample) -> None:
    clip = vision()
    (patched,) = run_node(
        "StyleInjectReference", model=model, image=image(), deadiff_name=deadiff_file, clip_vision=clip, weight=0.7
    )
    style, _ = run_node("StyleInjectEncodeReference", deadiff=deadiff, image=image(), clip_vision=clip)
    assert close(sample(patched), sample(apply(model, style=style, weight_style=0.7)))


def test_cards(model, core, deadiff, tokens, apply, run_node, sample, monkeypatch, tmp_path) -> None:
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    folder = str(tmp_path / "style_cards")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "styleinject_saved_cards", ([folder], {".safetensors"}))
    style = tokens()
    (path,) = run_node("StyleInjectSaveStyleCard", filename_prefix="../../wave", style=style, image=image())
    assert path == f"{folder}/wave_00001_.safetensors"
    loaded, content, thumbnail, info = run_node("StyleInjectLoadStyleCard", card_name="output/wave_00001_.safetensors")
    assert content is None and thumbnail.shape == (1, 90, 120, 3) and "4 style tokens" in info
    assert close(sample(apply(model, style=loaded)), sample(apply(model, style=style)), 0.01)
    with pytest.raises(ValueError, match="not a path that leads out of it"):
        run_node("StyleInjectLoadStyleCard", card_name="../secret.safetensors")
    with pytest.raises(core.TokensError, match="found none"):
        run_node("StyleInjectSaveStyleCard")


# --- wrong input ------------------------------------------------------------------------------------------------


def test_wrong_vision_encoders(core, deadiff, vision, run_node) -> None:
    def encode(clip, picture=None, **inputs):
        run_node(
            "StyleInjectEncodeReference",
            deadiff=deadiff,
            image=image() if picture is None else picture,
            clip_vision=clip,
            **inputs,
        )

    with pytest.raises(ValueError, match="tiny needs a vision encoder: load OpenAI's CLIP ViT-L/14"):
        encode(None)
    with pytest.raises(ValueError, match="vision encoder is 1280 wide, tiny was trained with one of 1024"):
        encode(vision(hidden_size=1280))
    with pytest.raises(ValueError, match="returns 577 x 1024 .* returns 257 x 1024"):
        encode(vision(image_size=336))
    with pytest.raises(ValueError, match="right size and other weights .* OpenCLIP"):
        encode(vision(torch.randn(1024, generator=torch.Generator().manual_seed(3))))
    with pytest.raises(ValueError, match="not a CLIP model"):
        encode(object())
    with pytest.raises(core.TokensError, match="image has NaN or Inf"):
        encode(vision(), image() / 0)
    with pytest.raises(core.TokensError, match="reference mask is empty"):
        encode(vision(), mask=torch.zeros(1, 8, 8))


def test_models_that_do_not_fit(core, apply, tokens, tiny_unet_model, sample) -> None:
    style = tokens()
    for other, title in (
        (tiny_unet_model(context_dim=32), "Stable Diffusion 1.x"),
        (tiny_model.sdxl_model(), "Stable Diffusion XL"),
    ):
        with pytest.raises(
            core.ReferenceMismatchError, match=f'DEADiff "tiny" was made for Stable Diffusion 1.x, this model is {title}'
        ):
            apply(other, style=style)
        assert leftovers(other) == []
    apply(tiny_unet_model(in_channels=9), style=style)  # inpainting: the cross-attentions are the same


def test_other_wrong_input(core, model, deadiff, apply, tokens, sample, run_node) -> None:
    stranger = core.Tokens(tokens().values, "style", "0000000000000000")
    for inputs, message in (
        ({}, "no tokens to apply"),
        ({"style": stranger}, "made by another DEADiff file"),
        ({"style": tokens("content")}, "expected style tokens, found content"),
        ({"style": tokens(), "weight_style": 3.0}, "weight_style is 3.0, expected 0 to 2"),
        ({"style": tokens(), "mask": torch.zeros(1, 8, 8)}, "the mask is empty"),
        ({"style": tokens(), "mask": torch.full((1, 8, 8), torch.nan)}, "the mask has NaN"),
        ({"style": tokens(), "start_percent": 0.6, "end_percent": 0.4}, "start_percent 0.6 is after end_percent 0.4"),
    ):
        with pytest.raises(ValueError, match=message):
            apply(model, **inputs)
    couple = apply(model, style=tokens())
    couple.set_model_attn2_patch(lambda q, k, v, _: (q.repeat(2, 1, 1), k.repeat(2, 1, 1), v.repeat(2, 1, 1)))
    with pytest.raises(core.TokensError, match="the text has 4 rows and the batch 2 images"):
        sample(couple)
    assert leftovers(model) == []


def test_files_are_chosen_by_name_only(run_node, pack, deadiff_file) -> None:
    loader = pack["StyleInjectLoadDeadiff"]
    assert deadiff_file in loader.GET_SCHEMA().inputs[0].options
    assert loader.validate_inputs(deadiff_file) is True and loader.validate_inputs(None) is True
    assert "not found" in loader.validate_inputs("none.safetensors")
    assert "leads out" in loader.validate_inputs("../tiny.safetensors")
    assert loader.fingerprint_inputs(deadiff_file) and not loader.fingerprint_inputs("none.safetensors")
    _, info = run_node("StyleInjectLoadDeadiff", deadiff_name=deadiff_file)
    assert "style in 5 cross-attentions, content in 2; 4 tokens a reference" in info and "OpenAI's CLIP ViT-L/14" in info


def test_the_report_says_what_was_done(run_node, model, deadiff, tokens) -> None:
    patched, report = run_node("StyleInjectApplyDeadiff", model=model, deadiff=deadiff, style=tokens(), weight_style=0.5)
    assert (
        "5 style + 2 content layers matched" in report and "4 style tokens, weight 0.5" in report and "content: idle" in report
    )
    _, report = run_node("StyleInjectApplyDeadiff", model=patched, deadiff=deadiff, style=tokens(), weight_style=0.0)
    assert "bit for bit" in report and "side by side with 1 other" in report
