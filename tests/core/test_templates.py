"""The templates, as files: what the editor and ComfyUI-Manager read of them without a server."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

FOLDER = Path(__file__).parents[2] / "example_workflows"
TEMPLATES = sorted(FOLDER.glob("*.json"))
NOTES = ("MarkdownNote", "Note")


def nodes(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["nodes"]


def test_titles_are_words_in_order() -> None:
    """The file's name is the title in the template browser."""
    assert [int(path.stem.split(" ")[0]) for path in TEMPLATES] == list(range(1, len(TEMPLATES) + 1))
    for path in TEMPLATES:
        assert re.fullmatch(r"\d\d [A-Z][A-Za-z0-9'. -]+", path.stem), path.stem
        assert "_" not in path.stem


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_nodes_say_where_they_come_from(path: Path) -> None:
    """cnr_id: by it ComfyUI-Manager knows what to install; models: what the editor offers to download."""
    for node in nodes(path):
        if node["type"] in NOTES:
            continue
        ours = node["type"].startswith("StyleInject")
        assert node["properties"]["cnr_id"] == ("styleinject" if ours else "comfy-core"), node["type"]
        assert node["properties"]["ver"]
        files = [v for v in node.get("widgets_values", []) if isinstance(v, str) and v.endswith(".safetensors")]
        offered = {model["name"]: model for model in node["properties"].get("models", [])}
        for name in files:
            if ours:
                assert name.startswith("demo/"), f"{name} is on nobody's disk"
            else:
                assert offered[name]["directory"] in (
                    "checkpoints",
                    "clip_vision",
                    "controlnet",
                    "diffusion_models",
                    "text_encoders",
                    "vae",
                )
                assert re.fullmatch(r"https://huggingface\.co/[\w./-]+\.safetensors", offered[name]["url"])


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_each_says_what_to_do_and_has_a_picture(path: Path) -> None:
    (note,) = [node for node in nodes(path) if node["type"] in NOTES]
    assert note["title"] in ("Read me first", "What this shows") and len(note["widgets_values"][0]) > 200
    assert "`" not in note["widgets_values"][0], "code is blue on blue in the notes of Nodes 2.0"
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.size == (640, 480)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 500, "a picture of results"


LOADERS = {"04 ": ["StyleInjectDemoModel"], "05 ": ["CheckpointLoaderSimple"], "06 ": ["CLIPLoader", "UNETLoader", "VAELoader"]}


def test_the_picture_templates_differ_in_the_loader_alone() -> None:
    """4 runs on the embedded model, 5 on SDXL, 6 on Z-Image: the same nodes and links between them."""
    kinds = []
    for start, loaders in LOADERS.items():
        (path,) = (path for path in TEMPLATES if path.stem.startswith(start))
        graph = json.loads(path.read_text(encoding="utf-8"))
        by_id = {node["id"]: node for node in graph["nodes"]}
        assert sorted(node["type"] for node in graph["nodes"] if node["type"] in loaders) == loaders
        links = [
            (by_id[a], by_id[b]["title" if "title" in by_id[b] else "type"], slot) for _, a, _, b, slot, _ in graph["links"]
        ]
        others = sorted(node["type"] for node in graph["nodes"] if node["type"] not in loaders)
        inside = sorted((str(a.get("title", a["type"])), b, s) for a, b, s in links if a["type"] not in loaders)
        from_loader = sorted((b, s) for a, b, s in links if a["type"] in loaders)
        kinds.append((others, inside, from_loader))
        (train,) = (node for node in graph["nodes"] if node["type"] == "StyleInjectTrain")
        assert train["widgets_values"][-1] == "auto", "memory"
        if start != "04 ":
            assert train["widgets_values"][5:7] == [0, 0], "rank and styles are chosen by memory"
    assert kinds[0] == kinds[1] == kinds[2]
