"""The harness itself: a real server samples the small checkpoint, and the client sees what happens."""

from __future__ import annotations

import json

import comfyui
import numpy as np
import pytest
from client import Client, Event, ExecutionError, PromptRejected
from comfy_process import ComfyProcess
from ui_workflow import WorkflowError, to_prompt


def vanilla(checkpoint: str, seed: int = 1, steps: int = 2, size: int = 64) -> dict:
    """Text to image with core nodes only."""
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a lighthouse"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": size, "height": size, "batch_size": 1}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
                "seed": seed,
                "steps": steps,
                "cfg": 5.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "vanilla"}},
    }


def saved_by_the_editor(checkpoint: str) -> dict:
    """The same graph as the editor saves it, with a muted, a bypassed, a Reroute and a Note node."""

    def slot(name: str, kind: str, link: int | None) -> dict:
        return {"name": name, "type": kind, "link": link}

    def out(*kinds: str) -> list[dict]:
        return [{"name": kind, "type": kind} for kind in kinds]

    return {
        "nodes": [
            {
                "id": 1,
                "type": "CheckpointLoaderSimple",
                "mode": 0,
                "inputs": [],
                "outputs": out("MODEL", "CLIP", "VAE"),
                "widgets_values": [checkpoint],
            },
            {
                "id": 2,
                "type": "CLIPTextEncode",
                "mode": 0,
                "inputs": [slot("clip", "CLIP", 2)],
                "outputs": out("CONDITIONING"),
                "widgets_values": ["a lighthouse"],
            },
            {
                "id": 3,
                "type": "CLIPTextEncode",
                "mode": 0,
                "inputs": [slot("clip", "CLIP", 3)],
                "outputs": out("CONDITIONING"),
                "widgets_values": [""],
            },
            {
                "id": 4,
                "type": "EmptyLatentImage",
                "mode": 0,
                "inputs": [],
                "outputs": out("LATENT"),
                "widgets_values": [64, 64, 1],
            },
            {
                "id": 5,
                "type": "KSampler",
                "mode": 0,
                "outputs": out("LATENT"),
                "inputs": [
                    slot("model", "MODEL", 12),
                    slot("positive", "CONDITIONING", 4),
                    slot("negative", "CONDITIONING", 5),
                    slot("latent_image", "LATENT", 6),
                ],
                "widgets_values": [1, "randomize", 2, 5.0, "euler", "normal", 1.0],
            },
            {
                "id": 6,
                "type": "VAEDecode",
                "mode": 0,
                "outputs": out("IMAGE"),
                "inputs": [slot("samples", "LATENT", 7), slot("vae", "VAE", 8)],
            },
            {
                "id": 7,
                "type": "SaveImage",
                "mode": 0,
                "inputs": [slot("images", "IMAGE", 9)],
                "outputs": [],
                "widgets_values": ["vanilla"],
            },
            {"id": 8, "type": "PreviewImage", "mode": 2, "inputs": [slot("images", "IMAGE", 10)], "outputs": []},
            {
                "id": 9,
                "type": "LoraLoaderModelOnly",
                "mode": 4,
                "inputs": [slot("model", "MODEL", 1)],
                "outputs": out("MODEL"),
                "widgets_values": ["none.safetensors", 1.0],
            },
            {"id": 10, "type": "Reroute", "mode": 0, "inputs": [slot("", "*", 11)], "outputs": out("MODEL")},
            {"id": 11, "type": "Note", "mode": 0, "inputs": [], "outputs": [], "widgets_values": ["a note"]},
        ],
        "links": [
            [1, 1, 0, 9, 0, "MODEL"],
            [2, 1, 1, 2, 0, "CLIP"],
            [3, 1, 1, 3, 0, "CLIP"],
            [4, 2, 0, 5, 1, "CONDITIONING"],
            [5, 3, 0, 5, 2, "CONDITIONING"],
            [6, 4, 0, 5, 3, "LATENT"],
            [7, 5, 0, 6, 0, "LATENT"],
            [8, 1, 2, 6, 1, "VAE"],
            [9, 6, 0, 7, 0, "IMAGE"],
            [10, 6, 0, 8, 0, "IMAGE"],
            [11, 9, 0, 10, 0, "MODEL"],
            [12, 10, 0, 5, 0, "MODEL"],
        ],
    }


def test_vanilla_checkpoint_samples(client: Client, server: ComfyProcess, checkpoint: str) -> None:
    images = []
    for _ in range(2):
        client.free()
        run = client.queue(vanilla(checkpoint))
        assert "5" in run.executed, "the sampler's output came from the cache"
        assert {data["max"] for data in run.of_type("progress")} == {2}
        images.append(client.fetch_image(run.images[0]))
    assert images[0].shape == (64, 64, 3)
    assert images[0].std() > 5, "the image is blank"
    assert np.array_equal(images[0], images[1])
    other = client.queue(vanilla(checkpoint, seed=2))
    assert not np.array_equal(images[0], client.fetch_image(other.images[0]))
    log = server.log()
    for phrase in ("unet missing", "unet unexpected", "clip missing", "Missing VAE keys", "left over keys"):
        assert phrase not in log, "ComfyUI does not take the checkpoint for a whole one"


def test_server_is_the_one_asked_for(client: Client, server: ComfyProcess) -> None:
    stats = client.system_stats()
    assert stats["system"]["comfyui_version"] == comfyui.comfyui_version(server.root)
    assert (stats["devices"][0]["type"] == "cpu") == comfyui.on_cpu()
    assert "KSampler" in client.object_info()


def test_workflow_saved_by_the_editor_is_the_same_prompt(client: Client, checkpoint: str, tmp_path) -> None:
    info = client.object_info()
    file = tmp_path / "workflow.json"
    file.write_text(json.dumps(saved_by_the_editor(checkpoint)), encoding="utf-8")
    assert to_prompt(file, info) == vanilla(checkpoint)
    out_of_step = saved_by_the_editor(checkpoint)
    out_of_step["nodes"][4]["widgets_values"].insert(0, "euler")
    with pytest.raises(WorkflowError, match="seed is INT"):
        to_prompt(out_of_step, info)


def test_invalid_prompt_is_rejected(client: Client, checkpoint: str) -> None:
    prompt = vanilla(checkpoint)
    prompt["5"]["inputs"]["sampler_name"] = "no such sampler"
    with pytest.raises(PromptRejected) as caught:
        client.queue(prompt)
    assert "5" in caught.value.node_errors


def test_error_in_a_node_is_raised(client: Client, server: ComfyProcess, checkpoint: str) -> None:
    broken = server.base / "models" / "checkpoints" / "broken.safetensors"
    broken.write_bytes(b"not a checkpoint")
    with pytest.raises(ExecutionError) as caught:
        client.queue(vanilla(broken.name))
    assert caught.value.details["node_type"] == "CheckpointLoaderSimple"
    assert client.queue(vanilla(checkpoint)).error is None


def test_interrupt(client: Client, checkpoint: str) -> None:
    def interrupt_from_the_second_step(event: Event) -> None:
        if event.type == "progress" and event.data["value"] >= 2:
            client.interrupt()

    run = client.queue(vanilla(checkpoint, seed=3, steps=200), on_event=interrupt_from_the_second_step)
    assert run.interrupted
    assert not run.images
    assert client.queue(vanilla(checkpoint, seed=3)).images
