"""Adapters in a running ComfyUI: the committed workflows, and latents compared bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import checkpoints
import deadiff_models
import pytest
import torch
from client import Client, Event, ExecutionError, Prompt, PromptRejected
from comfy_process import ComfyProcess
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from styleinject_core import Adapter, AdapterConfig, LayerShape, deadiff, save_adapter
from styleinject_core.deadiff.config import DEMO_ENCODER
from styleinject_core.files.names import diffusers_name
from styleinject_core.hosts.architectures import ARCHITECTURES

STYLES = {"style": 1, "other": 2}  # file stem -> seed


def checkpoint_shapes() -> dict[str, LayerShape]:
    """Every Linear and Conv2d of the small checkpoint's U-Net, diffusers names."""
    shapes = {}
    with safe_open(checkpoints.small_checkpoint(), framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            size = file.get_slice(key).get_shape()
            if key.startswith("model.diffusion_model.") and key.endswith(".weight") and len(size) in (2, 4):
                name = diffusers_name(key.removesuffix(".weight"), layers_per_block=1)
                shapes[name] = LayerShape(size[1], size[0], tuple(size[2:]) or None)
    return shapes


@pytest.fixture(scope="session")
def adapters(server: ComfyProcess) -> dict[str, str]:
    """Random adapters for the small checkpoint in models/styleinject, by what they are; and one for another model."""
    folder = server.base / "models" / "styleinject"
    folder.mkdir(parents=True, exist_ok=True)
    shapes = checkpoint_shapes()
    for stem, seed in STYLES.items():
        torch.manual_seed(seed)
        adapter = Adapter.create(shapes, AdapterConfig(r=4, n_styles=3, target_modules=("attention", "conv")))
        for name, parameter in adapter.named_parameters():
            if not name.endswith(".A"):
                parameter.data.normal_(0, 0.05)
        save_adapter(adapter, folder / f"{stem}.safetensors")
    sdxl = Adapter.create(ARCHITECTURES["sdxl"].shapes(), AdapterConfig(r=1, n_styles=1, target_modules=("down.2 & to_q",)))
    save_adapter(sdxl, folder / "for_sdxl.safetensors", {"modelspec.architecture": "stable-diffusion-xl-v1-base/styleinject"})
    return {stem: f"{stem}.safetensors" for stem in (*STYLES, "for_sdxl")}


def sampler(model: list[Any], steps: int = 3, seed: int = 1) -> dict[str, Any]:
    inputs = {"model": model, "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0], "seed": seed,
              "steps": steps, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}  # fmt: skip
    return {"class_type": "KSampler", "inputs": inputs}


def prompt(checkpoint: str, samplers: dict[str, dict[str, Any]], **nodes: dict[str, Any]) -> Prompt:
    """Text to latents: `samplers` by node id, each with its latent saved; `nodes` are added."""
    graph: Prompt = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a lighthouse"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        **nodes,
    }
    for node_id, node in samplers.items():
        graph[node_id] = node
        graph[f"{node_id}_save"] = {
            "class_type": "SaveLatent",
            "inputs": {"samples": [node_id, 0], "filename_prefix": f"latents/{node_id}"},
        }
    return graph


def apply(adapter: str, model: list[Any] | None = None, **inputs: Any) -> dict[str, Any]:
    """An Apply node on the loader's node "load_<stem>"."""
    values = {
        "strength": 1.0,
        "dma_strength": 1.0,
        "sta_strength": 1.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "layers": "all",
    }
    return {
        "class_type": "StyleInjectApply",
        "inputs": {"model": model or ["1", 0], "adapter": [f"load_{adapter}", 0], **values, **inputs},
    }


def load(stem: str) -> dict[str, Any]:
    return {"class_type": "StyleInjectLoader", "inputs": {"adapter_name": f"{stem}.safetensors"}}


@pytest.fixture
def latents(client: Client, server: ComfyProcess, checkpoint: str) -> Callable[..., dict[str, torch.Tensor]]:
    """Run samplers and return their latents by node id."""

    def run(samplers: dict[str, dict[str, Any]], **nodes: dict[str, Any]) -> dict[str, torch.Tensor]:
        client.free()  # else ComfyUI answers from its cache
        result = client.queue(prompt(checkpoint, samplers, **nodes))
        found = {}
        for node_id in samplers:
            saved = result.outputs[f"{node_id}_save"]["latents"][0]
            found[node_id] = load_file(server.base / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"]
        return found

    return run


@pytest.fixture
def vanilla(latents: Callable[..., dict[str, torch.Tensor]]) -> torch.Tensor:
    return latents({"base": sampler(["1", 0])})["base"]


def test_strength_zero_and_untouched_clones_are_vanilla_bit_for_bit(latents, vanilla, adapters) -> None:
    """Base, strength 0, adapter and two adapters in one graph: nobody sees another's."""
    nodes = {
        "load_style": load("style"),
        "load_other": load("other"),
        "zero": apply("style", strength=0.0),
        "one": apply("style"),
        "two": apply("other", ["one", 0]),
        "back": {"class_type": "StyleInjectStrength", "inputs": {"model": ["two", 0], "adapter_name": "all", "strength": 0.0}},
        "only": {"class_type": "StyleInjectLoadAndApply",
                 "inputs": {"model": ["1", 0], "adapter_name": adapters["style"], "strength": 1.0}},
    }  # fmt: skip
    samplers = {f"sample_{name}": sampler([name, 0]) for name in ("two", "zero", "one", "back", "only")}
    found = latents({"sample_base": sampler(["1", 0]), **samplers}, **nodes)
    assert torch.equal(found["sample_base"], vanilla)
    assert torch.equal(found["sample_zero"], vanilla)
    assert torch.equal(found["sample_back"], vanilla)
    assert torch.equal(found["sample_only"], found["sample_one"])
    assert not torch.allclose(found["sample_one"], vanilla, atol=1e-3)
    assert not torch.allclose(found["sample_two"], found["sample_one"], atol=1e-3)
    again = latents({"sample_base": sampler(["1", 0]), **samplers}, **nodes)
    assert all(torch.equal(found[name], again[name]) for name in found), "re-queued after /free, it is not the same"


@pytest.mark.parametrize("end_percent", [0.5, 0.4])
def test_schedule_ends_at_the_right_step(latents, adapters, end_percent) -> None:
    """4 steps of the normal schedule lie at 0, 1/3, 2/3 and 1 of sampling: an end at 0.5 or 0.4 is after the second."""

    def advanced(model: str, latent: list[Any], start: int, end: int) -> dict[str, Any]:
        inputs = sampler([model, 0], steps=4)["inputs"]
        inputs = {k: v for k, v in inputs.items() if k not in ("seed", "denoise")}
        inputs |= {"latent_image": latent, "noise_seed": 1, "start_at_step": start, "end_at_step": end,
                   "add_noise": "enable" if start == 0 else "disable",
                   "return_with_leftover_noise": "enable" if end < 4 else "disable"}  # fmt: skip
        return {"class_type": "KSamplerAdvanced", "inputs": inputs}

    found = latents(
        {
            "scheduled": sampler(["part", 0], steps=4),
            "first": advanced("whole", ["4", 0], 0, 2),
            "second": advanced("1", ["first", 0], 2, 4),
        },
        load_style=load("style"),
        part=apply("style", end_percent=end_percent),
        whole=apply("style"),
    )
    torch.testing.assert_close(found["scheduled"], found["second"], rtol=1e-4, atol=1e-4)


def test_an_interrupt_leaves_the_base_clean(client, latents, vanilla, checkpoint, adapters) -> None:
    def interrupt_from_the_second_step(event: Event) -> None:
        if event.type == "progress" and event.data["value"] >= 2:
            client.interrupt()

    graph = prompt(checkpoint, {"long": sampler(["one", 0], steps=200)}, load_style=load("style"), one=apply("style"))
    assert client.queue(graph, on_event=interrupt_from_the_second_step).interrupted
    assert torch.equal(latents({"base": sampler(["1", 0])})["base"], vanilla)


@pytest.mark.parametrize(
    ("stem", "inputs", "message"),
    [
        ("for_sdxl", {}, "made for Stable Diffusion XL, this model is Stable Diffusion 1.x"),
        ("style", {"layers": "crosss"}, "'crosss' matches none"),
        ("style", {"start_percent": 0.8, "end_percent": 0.2}, "start_percent 0.8 is after end_percent 0.2"),
    ],
)
def test_errors_name_what_is_wrong_and_leave_the_base_clean(
    client, latents, vanilla, checkpoint, adapters, stem, inputs, message
):
    graph = prompt(checkpoint, {"x": sampler(["one", 0])}, **{f"load_{stem}": load(stem), "one": apply(stem, **inputs)})
    with pytest.raises(ExecutionError) as caught:
        client.queue(graph)
    assert message in caught.value.message
    assert torch.equal(latents({"base": sampler(["1", 0])})["base"], vanilla)


@pytest.mark.parametrize("name", ["../style.safetensors", "nowhere.safetensors"])
def test_a_bad_file_name_is_refused_when_queued(client, checkpoint, adapters, name) -> None:
    graph = prompt(checkpoint, {"x": sampler(["one", 0])}, load_style=load("style"), one=apply("style"))
    graph["load_style"]["inputs"]["adapter_name"] = name
    with pytest.raises(PromptRejected) as caught:
        client.queue(graph)
    assert "load_style" in caught.value.node_errors


def test_the_demo_workflow_draws_in_two_styles(client, example) -> None:
    """As committed, with fewer steps: the same seed with and without the adapter."""
    graph = example("01 First look - one picture with and without a style.json")
    for node in graph.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 6
    run = client.queue(graph)
    pictures = [client.fetch_image(image) for image in run.images]
    assert len(pictures) == 2
    assert all(picture.shape == (512, 512, 3) and picture.std() > 5 for picture in pictures)
    colors = [picture.max(2).astype(int) - picture.min(2) for picture in pictures]
    saturation = {
        image["filename"].startswith("styleinject_demo_base"): c.mean() for image, c in zip(run.images, colors, strict=True)
    }
    assert saturation[False] < 0.5 * saturation[True], "line art has less color than the base model's drawings"


@pytest.mark.parametrize("name", ["02 Your own model with and without a style.json", "03 Two styles on your own model.json"])
def test_the_sd15_workflows_run(client, server, example, checkpoint, adapters, name) -> None:
    """As committed, but with adapters chosen, the checkpoint there is, and a small size."""
    folder = server.base / "models" / "styleinject"
    shutil.copy(folder / adapters["style"], folder / "my_style.safetensors")
    shutil.copy(folder / adapters["other"], folder / "my_other_style.safetensors")
    chosen = iter(["my_style.safetensors", "my_other_style.safetensors"])
    graph = example(name)
    with pytest.raises(PromptRejected, match="no adapter chosen"):
        client.queue(graph)
    for node in graph.values():
        inputs = node["inputs"]
        inputs |= {"ckpt_name": checkpoint} if "ckpt_name" in inputs else {}
        inputs |= {"adapter_name": next(chosen)} if "adapter_name" in inputs else {}
        inputs |= {"width": 64, "height": 64} if "width" in inputs else {}
        inputs |= {"steps": 3} if "steps" in inputs else {}
    run = client.queue(graph)
    assert len(run.images) == (2 if name.startswith("02") else 1)
    assert all(client.fetch_image(image).std() > 5 for image in run.images)


def test_the_deadiff_demo_workflow_draws_like_its_references(client, example) -> None:
    """As committed, with fewer steps: one prompt and noise, three references, four pictures each."""
    graph = example("11 Draw in the style of a picture.json")
    for node in graph.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 8
    run = client.queue(graph)
    colors = {}
    for image in run.images:
        picture = client.fetch_image(image).astype(int)
        assert picture.shape == (256, 256, 3) and picture.std() > 5
        colors.setdefault(image["filename"].rsplit("_", 2)[0], []).append((picture.max(2) - picture.min(2)).mean())
    assert {name: len(values) for name, values in colors.items()} == {
        "deadiff_openmoji-line": 4, "deadiff_openmoji": 4, "deadiff_twemoji": 4,
    }  # fmt: skip
    assert sum(colors["deadiff_openmoji-line"]) < 0.5 * sum(colors["deadiff_twemoji"]), "line art has less color"


@pytest.mark.parametrize(
    "name",
    [
        "12 Style from one picture and subject from another - SD 1.5.json",
        "13 Style of a picture with ControlNet and a LoRA - SD 1.5.json",
    ],
)
def test_the_sd15_deadiff_workflows_run(client, server, example, checkpoint, name) -> None:
    """As committed, but for the size and the models that are chosen: a DEADiff for the small checkpoint whose vision encoder is the demo's,
    without the ControlNet and the LoRA that nobody has here."""
    layers = tuple((layer, checkpoints.CHANNELS) for layer, _ in deadiff_models.TINY_LAYERS)
    sizes = {"context": checkpoints.CONTEXT, "layers": layers, "vision_tokens": 64, "vision_width": 128}
    config = deadiff_models.tiny_config(deadiff, encoder=DEMO_ENCODER, **sizes)
    folder = server.base / "models" / "deadiff"
    folder.mkdir(parents=True, exist_ok=True)
    deadiff.save_deadiff(deadiff_models.random_model(deadiff, config), folder / "deadiff_v1.safetensors")
    Image.effect_noise((96, 64), 90).convert("RGB").save(server.base / "input" / "example.png")
    graph = example(name)
    by_type = {node["class_type"]: key for key, node in graph.items()}
    instead = {}  # (node, output) -> what takes its place
    if name != "12 Style from one picture and subject from another - SD 1.5.json":
        control, lora = graph[by_type["ControlNetApplyAdvanced"]]["inputs"], by_type["CheckpointLoaderSimple"]
        instead = {(by_type["ControlNetApplyAdvanced"], 0): control["positive"], (by_type["ControlNetApplyAdvanced"], 1): control["negative"],
                   (by_type["LoraLoader"], 0): [lora, 0], (by_type["LoraLoader"], 1): [lora, 1]}  # fmt: skip
    left_out = {
        by_type.get(kind) for kind in ("CLIPVisionLoader", "LoraLoader", "ControlNetLoader", "ControlNetApplyAdvanced", "Canny")
    }
    graph = {key: node for key, node in graph.items() if key not in left_out}
    for node in graph.values():
        inputs = node["inputs"]
        inputs.pop("clip_vision", None)
        inputs |= {"ckpt_name": checkpoint} if "ckpt_name" in inputs else {}
        inputs |= {"deadiff_name": "deadiff_v1.safetensors"} if "deadiff_name" in inputs else {}
        inputs |= {"width": 64, "height": 64} if "width" in inputs else {}
        inputs |= {"steps": 2} if "steps" in inputs else {}
        inputs |= {
            key: instead[tuple(value)] for key, value in inputs.items() if isinstance(value, list) and tuple(value) in instead
        }
    run = client.queue(graph)
    assert len(run.images) == 1 and client.fetch_image(run.images[0]).std() > 5
