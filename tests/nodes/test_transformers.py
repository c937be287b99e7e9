"""Diffusion transformers, small ones of ComfyUI's own classes: trained, saved, loaded, applied, recorded and steered.

What Apply does is compared with the method written out plainly on the places that a file names: those are found by ComfyUI's
own table, and where the image's tokens are stands here by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfyui
import dit_models
import pytest
import tiny_model
import torch
from random_adapters import close
from training import assert_clean, mean

PROMPT = 7  # tokens
RANK, STYLES = 3, 3
NO_GRADIENT = "0.8" <= comfyui.comfyui_version(comfyui.find_comfyui()) < "0.9"  # of its rotary embedding


@dataclass(frozen=True)
class Host:
    """An architecture.

    Args:
        latent: shape of one, without the batch.
        default: what the word "default" chooses, by the ends of their names, in how many layers.
        prompt_first: tokens of the prompt before the image's in layers of one stream; the image has 16.
        video: whether its latents have frames.
        masked: whether its text encoder gives a mask of the prompt's tokens.
    """

    make: Any
    latent: tuple[int, ...]
    default: tuple[set[str], int]
    prompt_first: int = PROMPT
    video: bool = False
    masked: bool = False


CHANNELS = dit_models.CHANNELS
IMAGE = (CHANNELS, 8, 8)
HOSTS = {
    "Flux": Host(dit_models.flux, IMAGE, ({"to_q", "to_v"}, 8)),
    "Flux 2": Host(dit_models.flux2, (128, 4, 4), ({"to_q", "to_v"}, 8), 512),
    "Chroma": Host(dit_models.chroma, IMAGE, ({"to_q", "to_v"}, 8)),
    "Z-Image": Host(
        partial(dit_models.z_image, padded=True), IMAGE, ({"to_q", "to_v"}, 6), 32, masked=True
    ),  # the prompt is padded to 32, and so is the image
    "Lumina 2": Host(dit_models.lumina2, IMAGE, ({"qkv"}, 3), masked=True),
    "Qwen-Image": Host(dit_models.qwen_image, (CHANNELS, 1, 8, 8), ({"to_q", "to_v"}, 4), masked=True),
    "SD 3": Host(dit_models.sd3, IMAGE, ({"to_q", "to_v"}, 4)),
    "SD 3.5": Host(dit_models.sd35, IMAGE, ({"to_q", "to_v"}, 6)),
    "Wan": Host(dit_models.wan, (CHANNELS, 3, 8, 8), ({"q", "v"}, 12), video=True),
}


@pytest.fixture(params=HOSTS)
def host(request) -> Host:
    return HOSTS[request.param]


@pytest.fixture
def model(host):
    return host.make()


def prompt(seed: int = 0, tokens: int = PROMPT, masked: bool = False) -> list:
    extras = {"pooled_output": torch.ones(1, dit_models.WIDTH)}
    if masked:
        extras["attention_mask"] = torch.ones(1, tokens, dtype=torch.long)
    return [[tiny_model.conditioning(seed, tokens=tokens)[0][0], extras]]


def draw(model, host, cfg: float = 1.0, steps: int = 2, batch: int = 1, positive: list | None = None) -> torch.Tensor:
    import nodes

    with torch.inference_mode():
        latent, prompts = {"samples": torch.zeros(batch, *host.latent)}, [prompt(seed, masked=host.masked) for seed in (0, 1)]
        prompts[0] = positive or prompts[0]
        settings = (model, 5, steps, cfg, "euler", "simple", *prompts, latent)
        return nodes.KSampler().sample(*settings)[0]["samples"]


def made(pack, model, *targets: str, seed: int = 1, **config: Any):
    """An adapter for the layers that the words choose, with random numbers in all of it."""
    core = pack.submodule("styleinject_core")
    shapes = pack.submodule("integration.places").layer_shapes(model.model)
    settings = core.AdapterConfig(**{"r": RANK, "n_styles": STYLES, "target_modules": targets or ("default",), **config})
    adapter = core.Adapter.create(shapes, settings, "ink")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
    return adapter


@contextmanager
def plainly(
    model, adapter, host: Host, strength: float, tokens: str = "image", frames: int = 1
) -> Iterator[dict[str, list[torch.Tensor]]]:
    """The method written out on the places that the adapter names, as forwards of the model's own modules; the s of each."""
    import comfy.lora
    import comfy.utils

    table, by_module = comfy.lora.model_lora_keys_unet(model.model, {}), {}
    used: dict[str, list[torch.Tensor]] = {}
    for name, layer in adapter.layers.items():
        target = table.get(f"transformer.{name}", table.get(f"diffusion_model.{name}"))
        key, offset = (target, None) if isinstance(target, str) else target[:2]
        module = comfy.utils.get_attr(model.model, key.removesuffix(".weight"))
        by_module.setdefault(module, []).append((name, layer, offset))

    def of(module, places):
        frozen = type(module).forward.__get__(module)

        def forward(x: torch.Tensor) -> torch.Tensor:
            h = frozen(x)
            out = h.clone()
            for name, layer, offset in places:
                rows = slice(None) if offset is None else slice(offset[1], offset[1] + offset[2])
                out[..., rows] += strength * increment(layer, x, h[..., rows], name)
            return out

        return forward

    def increment(layer, x, h, name):
        length, start = x.shape[1], 0
        if any(part in name for part in ("single_", "layers.")):
            start = host.prompt_first
        prompts_own = any(part in name for part in ("cross_attn.v", "cross_attn.k", "add_", "context"))
        count = length if prompts_own or tokens == "all" else 16 * (3 if host.video else 1)
        start = 0 if count == length else start
        groups = [slice(start, start + count)]
        if frames > 1 and not prompts_own:
            groups = [slice(start + k * count // frames, start + (k + 1) * count // frames) for k in range(frames)]
        change = torch.zeros_like(h)
        for group in groups:
            s = (x[:, group] @ layer.router_weight.T + layer.router_bias).mean(1).softmax(-1)
            used.setdefault(name, []).append(s)
            delta = sum(s[:, i, None, None] * (x @ layer.A[i].T) for i in range(STYLES)) @ layer.B.T
            seen = h[:, group]
            gain = (s @ layer.hyper_weight.T + layer.hyper_bias)[:, None]
            if len(groups) == 1:
                change += layer.config.scale * delta
            else:
                change[:, group] += layer.config.scale * delta[:, group]
            change[:, group] += gain * (seen - seen.mean(1, keepdim=True))
        return change

    try:
        for module, places in by_module.items():
            module.forward = of(module, places)
        yield used
    finally:
        for module in by_module:
            del module.__dict__["forward"]


def test_the_papers_targets_in_this_architectures_terms(pack, host, model) -> None:
    adapter = made(pack, model)
    names = pack.submodule("styleinject_core.layer_names")
    ends, count = host.default
    assert ({names.parse(name).end for name in adapter.names}, len(adapter.names)) == (ends, count)
    shapes = pack.submodule("integration.places").layer_shapes(model.model)
    assert set(made(pack, model, "all").names) == {name for name in shapes if names.parse(name).has_tokens} < set(shapes)
    everything = made(pack, model, "all", n_styles=1, sta="none")  # LoRA, which may be on modulation too
    found = pack.submodule("integration.places").find_places(model.model, everything)
    assert set(found) == set(shapes) == set(everything.names), "every name is found again"
    places = [(where.place.module, where.place.rows) for where in found.values()]
    assert len(set(places)) == len(places), "and no two are one place"
    for words in (("queries", "values"), ("queries", "keys", "values", "outputs"), ("first",), ("last",), ("block.1",),
                  ("self & image",), ("feed-forward",)):  # fmt: skip
        assert made(pack, model, *words).names


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0, -0.5])
def test_applied_is_the_method_on_the_places_it_names(pack, host, model, run_node, strength) -> None:
    adapter = made(pack, model, "attention, feed-forward & !text" if host.make is dit_models.flux else "attention")
    bare = draw(model, host)
    patched, report, *_ = run_node("StyleInjectApply", model=model, adapter=adapter, strength=strength)
    with plainly(model, adapter, host, strength):
        expected = draw(model, host)
    found = draw(patched, host)
    assert close(found, expected, 1e-3) and torch.equal(found, bare) == (strength == 0)
    assert strength == 0 or not close(expected, bare, 1e-2)
    assert f"{len(adapter.names)} of {len(adapter.names)} layers matched" in report and "cannot be told" not in report
    assert torch.equal(draw(model, host), bare)
    assert_clean(model)


@pytest.mark.parametrize("tokens", ["all", "frame"])
def test_what_it_looks_at_is_the_adapters_to_say(pack, host, model, run_node, tokens) -> None:
    adapter = made(pack, model, tokens=tokens)
    frames = host.latent[1] if tokens == "frame" and len(host.latent) == 4 else 1
    patched, *_ = run_node("StyleInjectApply", model=model, adapter=adapter)
    with plainly(model, adapter, host, 1.0, tokens, frames):
        expected = draw(model, host)
    found = draw(patched, host)
    assert close(found, expected, 1e-3)
    usual = draw(run_node("StyleInjectApply", model=model, adapter=made(pack, model))[0], host)
    mixed = any(part in name for name in adapter.names for part in ("single_", "layers."))
    assert close(found, usual, 1e-3) == (not (mixed if tokens == "all" else host.video))


def test_the_images_tokens_are_comfyuis_own(pack, run_node) -> None:
    """`img_slice`, which ComfyUI gives the blocks of a single stream, says the same."""
    seen = []
    for name, reference in (("Flux", True), ("Flux", False), ("Chroma", False), ("Flux 2", True)):
        host = HOSTS[name]
        model = host.make()
        tokens = pack.submodule("integration.tokens")
        blocks = model.model.diffusion_model.single_blocks
        slices: list = []
        handle = blocks[0].register_forward_pre_hook(
            lambda _block, args, given, slices=slices: slices.append(
                (args[0].shape[1], given["transformer_options"].get("img_slice"))
            ),
            with_kwargs=True,
        )
        given = {"ref_latents": [torch.zeros(1, *host.latent), torch.zeros(1, host.latent[0], 4, 4)]} if reference else {}
        x = torch.zeros(1, *host.latent)
        with torch.no_grad():
            context = torch.zeros(1, PROMPT, tiny_model.CONTEXT)
            extra = {"guidance": torch.ones(1)} if name == "Chroma" else {}
            model.model.apply_model(x, torch.ones(1) * 0.5, c_crossattn=context, transformer_options={}, **given, **extra)
        handle.remove()
        (length, own), where = slices[0], tokens.tokens_of(model.model, x, given)
        seen.append(where.within(length))
        assert where.within(length) == slice(PROMPT, PROMPT + 16)
        assert own is None or (own[0], own[1]) == (PROMPT, length)  # the second is the length of all
        assert length == PROMPT + 16 + where.after and where.after == (0 if not reference else 20 if name == "Flux" else 32)
    assert len(set(map(str, seen))) == 1


@pytest.mark.skipif(NO_GRADIENT, reason="0.8's rotary embedding has no gradient")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_and_the_file_samples_what_training_saw(pack, host, model, train, run_node, checkpointing, tmp_path) -> None:
    latents = {"samples": torch.randn(4, *host.latent, generator=torch.Generator().manual_seed(0))}
    prompts = [prompt(k, PROMPT + k % 2, host.masked) for k in range(4)]  # of two lengths in a batch
    adapter, losses, _ = train(
        model=model, latents=latents, conditioning=prompts, layers="attention, feed-forward", batch_size=4,
        steps=4 if checkpointing else 30, learning_rate=2e-2, rank=RANK, styles=STYLES, memory="off",
        options={"gradient_checkpointing": checkpointing, "dtype": "float32"},
    )  # fmt: skip
    assert all(layer.B.abs().sum() > 0 for name, layer in adapter.layers.items() if reaches(host, name))
    assert checkpointing or mean(losses.losses[-8:]) < 0.95 * mean(losses.losses[:8])
    assert_samples_what_training_saw(pack, model, host, adapter, latents, prompts[:2], run_node, tmp_path)


def assert_samples_what_training_saw(pack, model, host, adapter, latents, prompts, run_node, tmp_path) -> None:
    """Saved, loaded and applied, it predicts for a prompt alone what training predicts for it in a batch of prompts."""
    assert_clean(model)
    core = pack.submodule("styleinject_core")
    core.save_adapter(adapter, tmp_path / "ink.safetensors")
    loaded = core.load_adapter(tmp_path / "ink.safetensors")
    assert set(loaded.names) == set(adapter.names)

    training = pack.submodule("integration.training.comfy_model")
    wrapped = training.ComfyTrainingModel(model)
    encoder = pack.submodule("integration.training.graph_inputs").Encoder(model)
    rows = pack.submodule("styleinject_core.train.data.batches").joined(
        encoder.prompts([tuple(one[0]) for one in prompts], [host.latent] * 2)
    )
    x, sigma = latents["samples"][:1], wrapped.schedule.times(torch.tensor([0.6]))
    with torch.no_grad(), wrapped.attachment(adapter):
        twice = wrapped.predict(torch.cat([x, x]), sigma.repeat(2), rows)
    patched, report, *_ = run_node("StyleInjectApply", model=model, adapter=loaded)
    assert f"made for {wrapped.title}; this model is {wrapped.title}" in report
    given = pack.submodule("integration.training.graph_inputs").called_together(
        encoder.prompts([tuple(prompts[0][0])], [host.latent])[0], torch.device("cpu")
    )[0][1]
    with torch.no_grad():
        alone = training.ComfyTrainingModel(patched)
        model.model.current_patcher = patched
        options = {"wrappers": patched.wrappers, **patched.model_options["transformer_options"]}
        denoised = model.model.apply_model(x, sigma, transformer_options=options, **given)
        model.model.current_patcher = None
    noise = pack.submodule("styleinject_core.train.models.noise")
    expected = noise.prediction_of(alone.schedule, denoised, x, sigma)
    torch.testing.assert_close(twice[:1], expected, rtol=1e-3, atol=1e-4)


def edited(*sizes: tuple[int, int], method: str = "", seed: int = 0, host: Host) -> list:
    """A prompt with reference images of these sizes, as ComfyUI's own nodes for edit models make it."""
    from comfy_extras.nodes_edit_model import ReferenceLatent
    from comfy_extras.nodes_flux import FluxKontextMultiReferenceLatentMethod

    found = prompt(seed, masked=host.masked)
    for k, size in enumerate(sizes):
        latent = torch.randn(1, *host.latent[:-2], *size, generator=torch.Generator().manual_seed(k)) * 3
        (found,) = ReferenceLatent.execute(found, {"samples": latent}).result
    if method:
        (found,) = FluxKontextMultiReferenceLatentMethod.execute(found, method).result
    return found


EDITORS = ["Flux", "Flux 2", "Qwen-Image"]  # Kontext, and Qwen-Image-Edit, are these with reference images


@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize(
    ("sizes", "method"),
    [([(8, 8)], ""), ([(6, 10), (5, 3)], ""), ([(6, 10)], "uxo/uno"), ([(6, 10), (8, 8)], "index_timestep_zero")],
)  # fmt: skip
def test_it_does_not_look_at_reference_images(pack, run_node, name, sizes, method) -> None:
    """Neither router mean nor statistics run over their tokens, which get Δh alone."""
    if name == "Flux" and method == "index_timestep_zero":
        pytest.skip("ComfyUI's Flux 1 fails with it, without any adapter")
    host = HOSTS[name]
    model, seen = host.make(), edited(*sizes, method=method, host=host)
    adapter = made(pack, model, "attention")
    bare = draw(model, host, positive=seen)
    assert not close(bare, draw(model, host), 1e-2), "the model sees them"
    patched, *_ = run_node("StyleInjectApply", model=model, adapter=adapter)
    monitored, monitor = run_node("StyleInjectRouterMonitor", model=patched)
    with plainly(model, adapter, host, 1.0) as used:
        expected = draw(model, host, positive=seen)
    found = draw(monitored, host, positive=seen)
    assert close(found, expected, 1e-3) and not close(expected, bare, 1e-2)
    (trace,) = pack.submodule("integration.monitor").traces_of(monitor, {"samples": found})
    for k, layer in enumerate(trace.layers):
        torch.testing.assert_close(trace.probabilities[:, k], torch.stack(used[layer]), rtol=1e-3, atol=1e-4)
    with plainly(model, adapter, host, 1.0, "all"):
        assert not close(found, draw(model, host, positive=seen), 1e-3), "it would have mattered"
    one_sided = draw(patched, host, cfg=3.0, batch=2, positive=seen)  # the negative prompt has none
    with plainly(model, adapter, host, 1.0):
        assert close(one_sided, draw(model, host, cfg=3.0, batch=2, positive=seen), 1e-3)


@pytest.mark.skipif(NO_GRADIENT, reason="0.8's rotary embedding has no gradient")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", EDITORS)
def test_it_trains_with_reference_images(pack, train, run_node, name, checkpointing, tmp_path) -> None:
    """One or several, of sizes that differ in a batch."""
    host = HOSTS[name]
    model, latents = host.make(), {"samples": torch.randn(4, *host.latent, generator=torch.Generator().manual_seed(0))}
    prompts = [edited(*sizes, seed=k, host=host) for k, sizes in enumerate([[(8, 8)], [(6, 10)], [(8, 8), (4, 4)], []])]
    adapter, losses, _ = train(
        model=model, latents=latents, conditioning=prompts, layers="attention", batch_size=4, learning_rate=2e-2,
        steps=4 if checkpointing else 30, rank=RANK, styles=STYLES, memory="off",
        options={"gradient_checkpointing": checkpointing, "dtype": "float32"},
    )  # fmt: skip
    assert all(layer.B.abs().sum() > 0 for name, layer in adapter.layers.items() if reaches(host, name))
    assert checkpointing or mean(losses.losses[-8:]) < 0.95 * mean(losses.losses[:8])
    assert_samples_what_training_saw(pack, model, host, adapter, latents, prompts[1:3], run_node, tmp_path)


def reaches(host: Host, name: str) -> bool:
    """Whether a gradient reaches a layer: the prompt's tokens of the last block go nowhere."""
    last = "transformer_blocks.1." in name and "single" not in name and ("add_" in name or "context" in name or "txt" in name)
    return not last


def test_recorded_and_steered(pack, host, model, run_node) -> None:
    adapter = made(pack, model)
    (rule,) = run_node("StyleInjectRouterControl", weights="2 = 1")
    steered, *_ = run_node("StyleInjectApply", model=model, adapter=adapter, control=rule)
    monitored, monitor = run_node("StyleInjectRouterMonitor", model=steered)
    found = draw(monitored, host, cfg=3.0)
    (trace,) = pack.submodule("integration.monitor").traces_of(monitor, {"samples": found})
    assert trace.finished and set(trace.layers) == set(adapter.names) and not trace.sizes.isnan().any()
    assert set(trace.roles) == {"positive", "negative"}
    assert torch.allclose(trace.probabilities[..., 1], torch.ones(()))
    plain = made(pack, model)
    with torch.no_grad():
        for layer in plain.layers.values():
            layer.router_weight.zero_()
            layer.router_bias.copy_(torch.tensor([-1e3, 1e3, -1e3]))
    expected = draw(run_node("StyleInjectApply", model=model, adapter=plain)[0], host, cfg=3.0)
    assert close(found, expected, 1e-4)


@pytest.mark.skipif(NO_GRADIENT, reason="0.8's rotary embedding has no gradient")
@pytest.mark.parametrize(
    ("make", "latent"),
    [(dit_models.omnigen2, IMAGE), (dit_models.mochi, (12, 2, 8, 8))],
    ids=["OmniGen 2", "Mochi"],
)  # fmt: skip
def test_others_train_too(pack, make, latent, train, run_node) -> None:
    """Constants beside the prompt, and masks of prompts; the gradients are those of what is drawn."""
    model = make()
    latents = {"samples": torch.randn(4, *latent, generator=torch.Generator().manual_seed(0))}
    prompts = [prompt(k, PROMPT + k % 2, masked=True) for k in range(4)]
    given = {"model": model, "latents": latents, "conditioning": prompts, "layers": "default", "batch_size": 4, "rank": RANK,
             "styles": STYLES, "memory": "off"}  # fmt: skip
    whole, losses, _ = train(**given, steps=30, learning_rate=2e-2, options={"dtype": "float32"})
    assert mean(losses.losses[-8:]) < 0.97 * mean(losses.losses[:8])
    assert_clean(model)
    adapter = made(pack, model)
    gradients = [gradients_of(pack, model, adapter, latents["samples"], prompts[0], again) for again in (False, True)]
    for once, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(twice, once, rtol=1e-3, atol=1e-6)
    _, report, *_ = run_node("StyleInjectApply", model=model, adapter=whole)
    assert f"{len(whole.names)} of {len(whole.names)} layers matched" in report


def gradients_of(pack, model, adapter, latents, one, checkpointing: bool) -> list[torch.Tensor]:
    """Of a squared prediction; as long as its step is the steepest, they are those of the function itself."""
    comfy_model = pack.submodule("integration.training.comfy_model")
    wrapped = comfy_model.ComfyTrainingModel(model)
    encoder = pack.submodule("integration.training.graph_inputs").Encoder(model)
    checkpointed = pack.submodule("styleinject_core.train.objectives.losses").checkpointed
    parameters = list(adapter.parameters())
    loaded = comfy_model.Loaded([wrapped], [1, *latents.shape[1:]])
    with torch.inference_mode(False), torch.enable_grad(), loaded.running(), ExitStack() as stack:
        (row,) = encoder.prompts([tuple(one[0])], [latents.shape[1:]])
        stack.enter_context(wrapped.attachment(adapter))
        if checkpointing:
            stack.enter_context(checkpointed(wrapped.blocks(), wrapped.in_place_blocks(), wrapped.current_calls()))

        def loss() -> torch.Tensor:
            return wrapped.predict(latents[:1].clone(), torch.tensor([0.6]), row).square().mean()

        found = torch.autograd.grad(loss(), parameters)
        slope, step = sum(g.square().sum() for g in found), 1e-2
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                for parameter, g in zip(parameters, found, strict=True):
                    parameter.add_(sign * step * g / slope.sqrt())
                ends.append(loss())
                for parameter, g in zip(parameters, found, strict=True):
                    parameter.sub_(sign * step * g / slope.sqrt())
        assert ((ends[0] - ends[1]) / (2 * step)).item() == pytest.approx(slope.sqrt().item(), rel=0.03)
    return list(found)


def test_what_nobody_can_tell_is_said(pack, run_node, monkeypatch) -> None:
    """A network that mixes prompt and image, and is not in the table."""
    model = dit_models.flux()
    adapter = made(pack, model)
    monkeypatch.delitem(pack.submodule("integration.tokens").LAYOUTS, "Flux")
    patched, report, *_ = run_node("StyleInjectApply", model=model, adapter=adapter)
    assert "in 4 layers the image's tokens cannot be told from the prompt's" in report
    host = HOSTS["Flux"]
    everything, report, *_ = run_node("StyleInjectApply", model=model, adapter=made(pack, model, tokens="all"))
    assert "cannot be told" not in report
    assert close(draw(patched, host), draw(everything, host), 1e-4)


def test_an_adapter_of_another_architecture(pack, run_node) -> None:
    core = pack.submodule("styleinject_core")
    flux, wan = dit_models.flux(), dit_models.wan()
    for metadata, said in (
        ({"styleinject.base": "Flux", "modelspec.architecture": "FluxSchnell/styleinject"}, "Flux"),  # as training writes it
        ({"modelspec.architecture": "flux-1-dev/lora"}, "flux-1-dev"),
        ({}, r"an unknown architecture \(first layer: transformer_blocks.0.attn.to_q\)"),
    ):
        adapter = made(pack, flux)
        adapter.metadata.update(metadata)
        both = f"made for {said}, this model is Wan 2.x text to video. ink: none of its 8 layers is in the model"
        with pytest.raises(core.AdapterMismatchError, match=both):
            run_node("StyleInjectApply", model=wan, adapter=adapter)
    with pytest.raises(core.SelectorError, match="'down' matches none of the .* these have: all, attention, .*block.0-2"):
        made(pack, wan, "down")
    with pytest.raises(core.UnsupportedLayerError, match="see one row per image"):
        made(pack, wan, "time_embedding.0")


@pytest.mark.parametrize(("times", "middle"), [("logit-normal", 0.68), ("uniform", 0.46)])
def test_flow_models_train_the_noise_that_is_asked_for(pack, train, monkeypatch, times, middle) -> None:
    """With the model's own shift, which is 1 here: sigmoid of a normal variable, or evenly."""
    import comfy_extras.nodes_model_advanced as advanced

    (model,) = advanced.ModelSamplingSD3().patch(dit_models.flux(), 1.0)
    module, seen = pack.submodule("integration.training.comfy_model").ComfyTrainingModel, []
    monkeypatch.setattr(module, "predict", lambda self, noisy, t, rows: seen.extend(t.tolist()) or torch.zeros_like(noisy) + sum(
        p.sum() * 0 for p in self._attached and next(iter(self._attached)).applied[0].adapter.parameters()))  # fmt: skip
    latents = {"samples": torch.zeros(4, *IMAGE)}
    train(model=model, latents=latents, conditioning=[prompt()], layers="default", batch_size=4, steps=100, memory="off",
          options={"flow_times": times})  # fmt: skip
    share = sum(0.27 < t < 0.73 for t in seen) / len(seen)
    assert len(seen) == 400 and abs(share - middle) < 0.06


@pytest.mark.parametrize(
    ("make", "why"),
    [(dit_models.ltxv, "LTXV, cannot be trained here: its blocks overwrite what the backward pass needs"),
     (dit_models.cosmos2, "cannot be trained here: expected a model that predicts noise")],
    ids=["LTX Video", "Cosmos Predict 2"],
)  # fmt: skip
def test_what_cannot_be_trained_is_said_before_anything_is_drawn(make, why, train, monkeypatch) -> None:
    import comfy.sample

    monkeypatch.setattr(comfy.sample, "sample", lambda *_args, **_named: pytest.fail("it draws"))
    given = {"model": make(), "latents": {"samples": torch.zeros(2, CHANNELS, 1, 8, 8)}, "conditioning": prompt()}
    with pytest.raises(ValueError, match=why):
        train("StyleInjectDreamBooth", **given, class_conditioning=prompt(1), class_images=3)
