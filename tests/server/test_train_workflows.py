"""Training in a running ComfyUI: the committed workflows, cut short, and a training that is interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client import Client, Event, Prompt
from comfy_process import ComfyProcess

from styleinject_core import load_adapter

FINE_TUNE = "08 Train on drawings with every setting.json"
TRAINING = {
    FINE_TUNE: "line_art",
    "09 Turn a checkpoint into a small adapter.json": "distilled_line_art",
}
SEVERAL_STYLES = "14 Several styles in one adapter.json"
MY_PHOTOS = "07 Train one subject from five photos.json"
MY_PICTURES = "04 Train a style from your pictures.json"
ON_Z_IMAGE = "06 Train a style from your pictures - Z-Image.json"
NODES = ("StyleInjectTrain", "StyleInjectDreamBooth", "StyleInjectDistill")


@pytest.fixture
def short(example: Callable[[str], Prompt]) -> Callable[..., Prompt]:
    """``short(FINE_TUNE, steps=4)``: a committed workflow, made to run in seconds."""

    def load(file: str, /, **changes: Any) -> Prompt:
        graph = example(file)
        for node in graph.values():
            inputs = node["inputs"]
            if node["class_type"] in NODES:
                inputs |= {"steps": 4, "batch_size": 2, **({"class_images": 2} if "class_images" in inputs else {}), **changes}
            elif node["class_type"] == "StyleInjectTrainOptions":
                inputs |= {"sampling_steps": 2, "picture_every": 2}
            elif node["class_type"] == "StyleInjectDemoDataset":
                inputs |= {"count": 4}
            elif node["class_type"] == "KSampler":
                inputs |= {"steps": 2}
        return graph

    return load


def losses(server: ComfyProcess, name: str) -> list[dict[str, float]]:
    lines = (Path(server.base) / "output" / "styleinject" / name / "loss.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", TRAINING)
def test_the_training_workflows_run(client: Client, server: ComfyProcess, short, name: str) -> None:
    folder = server.base / "output" / "styleinject" / TRAINING[name]
    run = client.queue(short(name))
    assert [line["step"] for line in losses(server, TRAINING[name])] == [1, 2, 3, 4]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step-000002.png", "step-000004.png"]
    text = " ".join(run.shown("text"))
    assert f"Saved as output/styleinject/{TRAINING[name]}/{TRAINING[name]}.safetensors" in text and "loss" in text
    assert run.binary_messages > 0, "no live picture"
    drawn = [image for image in run.images if image["type"] == "output"]
    assert len(drawn) == sum(node["class_type"] == "SaveImage" for node in short(name).values())
    listed = client.object_info("StyleInjectLoader")["StyleInjectLoader"]["input"]["required"]["adapter_name"]
    assert f"output/{TRAINING[name]}/{TRAINING[name]}.safetensors" in json.dumps(listed)


def test_the_template_for_ones_own_pictures_runs(client: Client, server: ComfyProcess, short) -> None:
    """From the samples to an adapter and a sheet before and after; a graph for another model differs in the loader alone."""
    graph = short(MY_PICTURES)
    run = client.queue(graph)
    text = " ".join(run.shown("text"))
    assert "40 pictures: 40 of 64x64" in text
    assert "choose output/my_style/my_style.safetensors" in text and 'Prompts call it by "inkline7"' in text
    before, after = (client.fetch_image(image) for image in run.images)
    assert before.shape == after.shape and (before != after).any() and before.std() > 5
    asking = {
        "1": {"class_type": "StyleInjectLoader", "inputs": {"adapter_name": "output/my_style/my_style.safetensors"}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 1]}},
    }
    assert client.queue(asking).shown("text") == ["inkline7"], "the loader gives the trigger word"


def test_the_template_for_z_image_runs(client: Client, server: ComfyProcess, short) -> None:
    """All of its nodes, but for the three loaders: a small Z-Image with random weights is in their place."""
    comfy = server.root / "comfy"
    rotated_by_kernel = "ck.apply_rope" in (comfy / "ldm" / "flux" / "math.py").read_text(encoding="utf-8")
    if rotated_by_kernel and "in_training" not in (comfy / "model_management.py").read_text(encoding="utf-8"):
        pytest.skip("this ComfyUI rotates queries and keys by a kernel without a gradient, in training too")
    graph = short(ON_Z_IMAGE, learning_rate=0.05)
    loaders = {key: output for output, kind in enumerate(("UNETLoader", "CLIPLoader", "VAELoader"))
               for key, node in graph.items() if node["class_type"] == kind}  # fmt: skip
    assert len(loaders) == 3
    graph = {key: node for key, node in graph.items() if key not in loaders}
    for node in graph.values():
        links = {name: value for name, value in node["inputs"].items() if isinstance(value, list) and value[0] in loaders}
        node["inputs"] |= {name: ["small", loaders[value[0]]] for name, value in links.items()}
        node["inputs"] |= {name: 64 for name in ("size", "width", "height") if name in node["inputs"]}  # not 1024
    run = client.queue({**graph, "small": {"class_type": "SmallZImage", "inputs": {}}})
    assert [line["step"] for line in losses(server, "my_zimage_style")] == [1, 2, 3, 4]
    text = " ".join(run.shown("text"))
    assert "40 pictures: 40 of 64x64" in text
    assert "choose output/my_zimage_style/my_zimage_style.safetensors" in text and 'Prompts call it by "inkline7"' in text
    assert "fine-tune on Lumina 2" in text
    before, after = (client.fetch_image(image) for image in run.images)
    assert before.shape == after.shape and (before != after).any() and before.std() > 5


def test_the_template_for_one_subject_runs(client: Client, server: ComfyProcess, short) -> None:
    """Five photos, and what the model draws of their class, to an adapter that its word calls."""
    run = client.queue(short(MY_PHOTOS))
    text = " ".join(run.shown("text"))
    assert "5 pictures: 5 of 64x64" in text and '"jack, cat face"' in text
    assert "choose output/my_cat/my_cat.safetensors" in text and 'Prompts call it by "jack"' in text
    assert "Memory auto (" in text and "rank 4, 4 styles" in text
    before, after = (client.fetch_image(image) for image in run.images)
    assert before.shape == after.shape and (before != after).any() and before.std() > 5


def test_the_template_for_several_styles_runs(client: Client, server: ComfyProcess, short) -> None:
    """One adapter with a style for each word, drawn once for each prompt, and what its router chose for each."""
    graph = short(SEVERAL_STYLES)
    kinds = {node["class_type"]: key for key, node in graph.items()}
    graph[kinds["StyleInjectDemoDataset"]]["inputs"]["count"] = 8  # two things in each style
    run = client.queue(graph)
    text = " ".join(run.shown("text"))
    assert "styles flat (2), shaded (2), lineart (2), rendered (2)" in text
    assert "Its styles are flat, shaded, lineart, rendered: the name in a prompt chooses one." in text
    folder = server.base / "output" / "styleinject" / "four_styles"
    assert len(list((folder / "samples").iterdir())) == 2, "pictures on the way, by a router that reads the prompt"
    adapter = load_adapter(folder / "four_styles.safetensors")
    assert adapter.style_names == ("flat", "shaded", "lineart", "rendered") and adapter.config.router_input == "prompt"
    prompts = graph[kinds["StyleInjectPrompts"]]["inputs"]["text"].splitlines()
    heat = run.shown("styleinject", kinds["StyleInjectRouterHeatmap"])
    assert len(heat) == len(prompts) == 8
    assert heat[0]["values"] != heat[1]["values"] and all(len(row) == 4 for row in heat[0]["values"]["positive"])
    sheets = {
        node["inputs"]["title"]: client.fetch_image(*run.shown("images", key))
        for key, node in graph.items()
        if node["class_type"] == "StyleInjectStyleSheet"
    }
    assert len(sheets) == 3 and all(sheet.std() > 5 for sheet in sheets.values())
    assert sheets["Before"].shape == sheets["After"].shape and (sheets["Before"] != sheets["After"]).any()


def test_an_interrupted_training_says_where_it_is_and_goes_on(client: Client, server: ComfyProcess, short) -> None:
    graph = short(FINE_TUNE, steps=400, name="stopped")
    (training,) = [key for key, node in graph.items() if node["class_type"] in NODES]

    def interrupt(event: Event) -> None:
        if event.type == "progress" and event.data.get("node") == training and event.data["value"] >= 3:
            client.interrupt()

    assert client.queue(graph, on_event=interrupt).interrupted
    reached = losses(server, "stopped")[-1]["step"]
    assert 3 <= reached < 400
    assert f"Stopped at step {reached}. Queue again to continue from output/styleinject/stopped." in server.log()
    resumed: list[int] = []

    def stop_soon(event: Event) -> None:
        if event.type == "progress" and event.data.get("node") == training:
            resumed.append(event.data["value"])
            client.interrupt()

    assert client.queue(graph, on_event=stop_soon).interrupted
    assert resumed[0] > reached, "it began anew"
    assert [line["step"] for line in losses(server, "stopped")] == list(range(1, losses(server, "stopped")[-1]["step"] + 1))


def test_a_new_run_each_time_and_another_where_it_was_deleted(client: Client, server: ComfyProcess, short) -> None:
    """ComfyUI keeps what a node put out: a run that must be new, or is gone from the disk, is made all the same."""
    root = server.base / "output" / "styleinject"
    runs = []
    for existing in ("new", "new", "go on or new", "go on or new"):
        graph = short(FINE_TUNE, name="again")
        for node in graph.values():
            if node["class_type"] == "StyleInjectTrainOptions":
                node["inputs"]["existing_run"] = existing
        client.queue(graph)
        runs.append({path.name for path in root.glob("again*")})
    assert runs[0] == {"again"} and runs[1] == runs[2] == runs[3] == {"again", "again_2"}
    for name in runs[3]:
        shutil.rmtree(root / name)
    client.queue(graph)
    assert (root / "again" / "again.safetensors").is_file()
