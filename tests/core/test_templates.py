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
                assert offered[name]["directory"] in ("checkpoints", "clip_vision", "controlnet")
                assert re.fullmatch(r"https://huggingface\.co/[\w./-]+\.safetensors", offered[name]["url"])


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_each_says_what_to_do_and_has_a_picture(path: Path) -> None:
    (note,) = [node for node in nodes(path) if node["type"] in NOTES]
    assert note["title"] in ("Read me first", "What this shows") and len(note["widgets_values"][0]) > 200
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.size == (640, 480)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 500, "a picture of results"


def test_the_picture_templates_differ_in_the_loader_and_in_amounts() -> None:
    """4 runs on the embedded model, 5 on SDXL: the same nodes and links, but for the loader and the options."""
    small, large = (nodes(path) for path in TEMPLATES if path.stem.startswith(("04 ", "05 ")))
    kinds = [sorted(node["type"] for node in graph) for graph in (small, large)]
    assert sorted([*kinds[0], "CheckpointLoaderSimple", "StyleInjectTrainOptions"]) == sorted(
        [*kinds[1], "StyleInjectDemoModel"]
    )
    (options,) = [node for node in large if node["type"] == "StyleInjectTrainOptions"]
    assert options["widgets_values"][10] is True, "gradient checkpointing"
