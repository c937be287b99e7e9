"""The embedded model inside ComfyUI: the same network as in diffusers, sampled by ComfyUI's own nodes."""

from __future__ import annotations

import math

import pytest
import torch
from random_adapters import close, random_adapter


@pytest.fixture(scope="module")
def model(run_node):
    return run_node("StyleInjectDemoModel")[0]


@pytest.fixture(scope="module")
def draw(model, run_node):
    """draw(prompt, model=...) -> (latent, image), with EmptyLatentImage and KSampler as in a workflow."""

    def run(prompt: str, *, patched=None, seed: int = 3, steps: int = 8, batch: int = 1):
        import nodes

        with torch.inference_mode():
            (latent,) = nodes.EmptyLatentImage().generate(64, 64, batch)
            positive, negative = (run_node("StyleInjectDemoPrompt", text=text)[0] for text in (prompt, ""))
            (result,) = nodes.KSampler().sample(
                patched or model, seed, steps, 3.0, "dpmpp_2m", "normal", positive, negative, latent
            )
        return result, run_node("StyleInjectDemoDecode", samples=result, upscale=1)[0]

    return run


def random_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights that depend on nothing but names and shapes."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, value in sorted(state.items()):
        if value.ndim == 1:
            made[name] = 0.1 * torch.randn(value.shape, generator=generator) + (1.0 if name.endswith("weight") else 0.0)
        else:
            made[name] = torch.randn(value.shape, generator=generator) / math.sqrt(math.prod(value.shape[1:]))
    return made


def test_unet_equals_the_diffusers_one(pack) -> None:
    """Pinned: what diffusers' UNet2DConditionModel(**UNET_CONFIG) gives for these weights and inputs."""
    state = pack.submodule("styleinject_core.demo.model").read_base("unet")[0]
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 16, 8, 8, generator=generator), torch.randn(2, 8, 128, generator=generator)
    timesteps = torch.tensor([900.0, 13.0])
    with torch.inference_mode():
        unet = pack.submodule("integration.demo_model").base_model(random_weights(state)).diffusion_model
        out = unet(x, timesteps, context=context)
    expected = [0.2092806, -0.5196215, -0.4024335, -0.8202262, 0.2269492, 0.6883150, 0.2010228, -0.8260315]
    assert out[:, ::5, 3, 4].flatten().tolist() == pytest.approx(expected, abs=1e-4)


def test_noise_schedule_and_prediction_are_the_trained_ones(pack, model) -> None:
    import comfy.model_sampling

    schedule = pack.submodule("styleinject_core.demo.model").NOISE_SCHEDULE
    start, end = schedule["beta_start"] ** 0.5, schedule["beta_end"] ** 0.5
    alphas = torch.cumprod(1 - torch.linspace(start, end, 1000, dtype=torch.float64) ** 2, 0)
    expected = ((1 - alphas) / alphas).sqrt()
    sampling = model.model.model_sampling
    assert isinstance(sampling, comfy.model_sampling.V_PREDICTION) and schedule["prediction_type"] == "v_prediction"
    assert torch.allclose(sampling.sigmas.double(), expected, rtol=1e-4)


def test_a_picture_from_core_nodes(draw) -> None:
    latent, image = draw("red apple")
    assert latent["samples"].shape == (1, 16, 8, 8)
    assert image.shape == (1, 64, 64, 3)
    assert image.min() >= 0 and image.max() <= 1
    red, green, blue = image[0, 24:48, 20:44].mean((0, 1))
    assert red > green + 0.1 and red > blue + 0.1, "not a red apple"
    assert torch.equal(draw("red apple")[1], image)
    assert not close(draw("blue book")[1], image, 0.1)


def test_larger_pictures_and_other_latents(draw, run_node) -> None:
    latent, image = draw("red apple", batch=2, steps=2)
    (large,) = run_node("StyleInjectDemoDecode", samples=latent)
    assert image.shape == (2, 64, 64, 3) and large.shape == (2, 256, 256, 3)
    assert large.min() >= 0 and large.max() <= 1
    with pytest.raises(ValueError, match=r"shape \(1, 4, 8, 8\), those of the demo model have 16 channels"):
        run_node("StyleInjectDemoDecode", samples={"samples": torch.zeros(1, 4, 8, 8)})


def test_prompt_names_the_words_it_does_not_know(run_node) -> None:
    conditioning, unknown = run_node("StyleInjectDemoPrompt", text="a Red apple, qwertz")
    assert conditioning[0][0].shape == (1, 8, 128)
    assert unknown.split(", ")[-1] == "qwertz"
    with pytest.raises(ValueError, match="knows none of these words: qwertz. Some that it knows: "):
        run_node("StyleInjectDemoPrompt", text="qwertz")
    assert run_node("StyleInjectDemoPrompt", text="")[1] == ""


def test_adapters_of_the_demo_apply(pack, model, run_node, draw) -> None:
    architectures = pack.submodule("styleinject_core.hosts.architectures").ARCHITECTURES
    adapter = random_adapter(pack, model, "to_q", "to_v", "conv", name="ink")
    assert set(adapter.names) <= set(architectures["demo"].shapes())
    patched, report, *_ = run_node("StyleInjectApply", model=model, adapter=adapter)
    assert "made for StyleInject demo; this model is StyleInject demo" in report
    assert not close(draw("red apple", patched=patched)[1], draw("red apple")[1], 0.01)
    xl = architectures["sdxl"].shapes()
    core = pack.submodule("styleinject_core")
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    other = core.Adapter.create({name: xl[name]}, core.AdapterConfig(r=2, target_modules=("all",)), "oil")
    with pytest.raises(core.AdapterMismatchError, match="this model is StyleInject demo"):
        run_node("StyleInjectApply", model=model, adapter=other)
