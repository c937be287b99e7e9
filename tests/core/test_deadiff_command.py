"""`styleinject deadiff train`, on the embedded model: from a folder of drawings to a DEADiff file, and what is refused."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
import torch
from PIL import Image

from styleinject_core.cli import main
from styleinject_core.commands.config_files import ConfigError
from styleinject_core.commands.reference import _split, run
from styleinject_core.deadiff import load_deadiff
from styleinject_core.demo import data
from styleinject_core.demo.deadiff import DEMO_CONFIG
from styleinject_core.train.data.images import DataError
from styleinject_core.train.data.pairs import pictures_in_folder, pictures_in_shards
from styleinject_core.train.run.checkpoints import CheckpointError

pytest.importorskip("diffusers")
CONFIG = """
[model]
path = "{model}"
[data]
folder = "drawings"
resolution = 64
{data}
[deadiff]
{deadiff}
[train]
steps = 3
batch_size = 2
learning_rate = 1e-3
checkpoint_every = 2
{train}
[output]
folder = "run"
name = "mine"
"""


@pytest.fixture
def folder(tmp_path):
    """Three styles of four things, one of them with a text of its own."""
    for style in ("noto", "openmoji-line", "fluent3d"):
        (tmp_path / "drawings" / style).mkdir(parents=True)
        drawings = data.images(style)
        for k in (3, 40, 80, 120):
            name = data.concepts()[k].name.replace(" ", "_")
            levels = ((drawings[k] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(levels).save(tmp_path / "drawings" / style / f"{name}.png")
    (tmp_path / "drawings" / "noto" / "style.txt").write_text("shaded, soft")
    (tmp_path / "drawings" / "noto" / f"{data.concepts()[3].name.replace(' ', '_')}.txt").write_text("something else\n")
    return tmp_path


def write(folder, model="demo", shards="", **tables):
    text = CONFIG.format(model=model, **{"data": "", "deadiff": "", "train": "", **tables})
    if shards:
        text = text.replace('folder = "drawings"', f'shards = "{shards}"')
    (folder / "my.toml").write_text(text)
    return folder / "my.toml"


def test_labels_and_prompts_come_from_the_folder(folder):
    pictures = pictures_in_folder(folder / "drawings")
    assert len(pictures) == 12 and {p.style for p in pictures} == {"noto", "openmoji-line", "fluent3d"}
    assert len({p.subject for p in pictures}) == 4
    prompts = {(p.style, p.style_prompt) for p in pictures}
    assert prompts == {("noto", "shaded, soft"), ("openmoji-line", "openmoji line"), ("fluent3d", "fluent3d")}
    own = next(p for p in pictures if p.style == "noto" and p.subject == data.concepts()[3].name.replace(" ", "_"))
    assert own.subject_prompt == "something else"
    with pytest.raises(DataError, match="has no folders of pictures"):
        pictures_in_folder(folder / "drawings" / "noto")
    with pytest.raises(DataError, match="'nowhere' is not a folder"):
        pictures_in_folder(folder / "nowhere")


def shard(path, members):
    """A .tar file: name -> bytes, or a file to read them from."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            content = content if isinstance(content, bytes) else content.read_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_what_is_left_out_of_a_folder_is_named(folder):
    """Pictures are known by what is in them; what is none, and what nothing labels, is said."""
    root, said = folder / "drawings", []
    picture = next((root / "noto").glob("*.png"))
    picture.rename(picture.with_suffix(".photo"))
    (root / "noto" / "raw.CR2").write_bytes(b"II*\0")
    (root / "noto" / "layers.procreate").write_bytes(b"PK")
    (root / "noto" / "Thumbs.db").write_bytes(b"x")
    (root / "stray.png").write_bytes(b"x")
    (root / "README").write_text("x")
    assert len(pictures_in_folder(root, said.append)) == 12
    assert said == [
        "noto/layers.procreate: not known as an image (skipped)",
        "noto/raw.CR2: a file of this kind is not read: save it as PNG or JPEG (skipped)",
        "stray.png: it is in no folder, so that nothing says its style (skipped)",
    ]


def test_a_folder_that_refuses_is_said_before_anything_is_encoded(folder, monkeypatch):
    """And that the run is not its own data: loss.png would be a picture of the style "run"."""
    monkeypatch.setattr("styleinject_core.commands.reference.read_images", lambda *_: pytest.fail("it encodes"))
    (folder / "run").write_text("a file")
    with pytest.raises(ConfigError, match="output.folder: .*run cannot be made: File exists"):
        run(write(folder))
    path = write(folder)
    path.write_text(path.read_text().replace('folder = "run"', 'folder = "drawings/run"'))
    with pytest.raises(ConfigError, match="output.folder: it is inside data.folder"):
        run(path)


def test_shards_of_the_folder_are_the_folder(folder):
    """Styles in one shard each, and a style's text in another one than its pictures."""
    root = folder / "drawings"
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name != "style.txt")
    for place, style in enumerate(("noto", "openmoji-line", "fluent3d")):
        shard(folder / f"pairs-{place}.tar", {str(p.relative_to(root)): p for p in files if p.parent.name == style})
    shard(folder / "pairs-3.tar", {"noto/style.txt": root / "noto" / "style.txt"})

    def labels(pictures):
        of = [(p.style, p.subject, p.style_prompt, p.subject_prompt, p.open().read()) for p in pictures]
        return sorted(of)

    found = pictures_in_shards(folder / "pairs-{0..3}.tar")
    assert labels(found) == labels(pictures_in_folder(root)) and len(found) == 12
    run(write(folder, shards="pairs-{0..3}.tar"))
    assert load_deadiff(folder / "run" / "mine.safetensors").config == DEMO_CONFIG


def test_labels_of_a_shard_may_be_in_json(folder):
    png = next((folder / "drawings" / "noto").glob("*.png"))
    said = {"style": "ink", "subject": "a cat", "style_prompt": "drawn in ink", "other": 3}
    shard(folder / "a.tar", {"000.png": png, "000.json": json.dumps(said).encode(), "b/tree-top.png": png})
    first, second = pictures_in_shards(folder / "a.tar")
    assert (first.style, first.subject, first.style_prompt, first.subject_prompt) == ("ink", "a cat", "drawn in ink", "a cat")
    assert (second.style, second.subject, second.style_prompt, second.subject_prompt) == ("b", "tree-top", "b", "tree top")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"000.png": b"x"}, "a.tar/000: nothing says its style"),
        ({"000.png": b"x", "000.json": b"[1]"}, 'a.tar/000.json: expected {"style".*found list'),
        ({"000.png": b"x", "000.json": b"{"}, "a.tar/000.json: "),
        ({"000.png": b"x", "000.json": b'{"style": 3}'}, "a.tar/000.json: style: expected a string, found 3"),
        ({"s/000.png": b"x", "s/000.txt": b"\xff"}, "a.tar/s/000.txt: not UTF-8"),
        ({"notes.txt": b"x"}, "data.shards: no pictures .* in 1 shards, the first is a.tar"),
    ],
)
def test_shards_that_say_nothing_are_refused(tmp_path, members, message):
    shard(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message):
        pictures_in_shards(tmp_path / "a.tar")


def test_damaged_shards_are_refused(folder):
    png = next((folder / "drawings" / "noto").glob("*.png"))
    shard(folder / "a.tar", {"s/a.png": png, "s/b.png": png})
    (folder / "a.tar").write_bytes((folder / "a.tar").read_bytes()[: png.stat().st_size + 700])
    with pytest.raises(DataError, match="a.tar"):
        pictures_in_shards(folder / "a.tar")
    with pytest.raises(DataError, match="1 of 1 shards are not there"):
        pictures_in_shards(folder / "none.tar")
    with pytest.raises(ValueError, match="folder and shards: give one of them"):
        run(write(folder, data='shards = "a.tar"'))


def test_a_config_becomes_a_file_and_goes_on(folder, capsys):
    path = write(folder, data="validation = 2", deadiff="align_steps = 3\nreconstruction = 0.0", train="validate_every = 3")
    assert main(["deadiff", "train", str(path), "--dry-run"]) == 0
    assert "6 pictures in 3 styles of 2 subjects, 6 held out" in capsys.readouterr().out
    assert not (folder / "run").exists()
    first = run(path)
    assert "aligned with the text" in capsys.readouterr().out
    made = load_deadiff(folder / "run" / "mine.safetensors")
    assert made.config == DEMO_CONFIG and made.metadata["deadiff_steps"] == "3"
    assert (folder / "run" / "loss.png").stat().st_size > 1000 and len(first.validation) == 1
    path.write_text(path.read_text().replace("steps = 3\nbatch", "steps = 5\nbatch"))
    second = run(path)
    assert second.resumed_from == 3 and second.losses[:3] == first.losses and len(second.losses) == 5
    path.write_text(
        path.read_text().replace("[deadiff]", '[deadiff]\nstart = "run/mine.safetensors"').replace('"run"', '"again"')
    )
    run(path)
    again = load_deadiff(folder / "again" / "mine.safetensors")
    assert not torch.equal(again.streams["style"].qformer.queries, made.streams["style"].qformer.queries)


def test_another_beginning_and_other_held_out_images_are_another_run(folder, capsys):
    """And the first lines say what the model predicts."""
    path = write(folder, data="validation = 2", train="validate_every = 3")
    run(path)
    assert "predicts" in capsys.readouterr().out
    path = write(folder, data="validation = 2", train="validate_every = 3", deadiff="align_steps = 2")
    with pytest.raises(CheckpointError, match=r"begins: was \w+, aligned for 0 steps, is \w+, aligned for 2 steps"):
        run(path)
    held_out = _split(pictures_in_folder(folder / "drawings"), 2)[1][0]
    Image.new("RGB", (64, 64), "red").save(held_out.path)
    with pytest.raises(CheckpointError) as raised:
        run(write(folder, data="validation = 2", train="validate_every = 3"))
    assert "validation.images: was" in str(raised.value) and "data.images" not in str(raised.value)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"data": "validation = 4"}, "data.validation: 4 of 4 subjects leave none to train on"),
        ({"data": "validation = 1"}, "data.resolution 64, validation 1: expected at least 1, and 0 or at least 2"),
        ({"deadiff": "style = 0.0\ncontent = 0.0\nreconstruction = 0.0"}, "shares of the tasks"),
        ({"deadiff": 'strat = "x"'}, "unknown field, did you mean start"),
        ({"train": "validate_every = 1"}, "set data.validation to how many subjects are held out"),
        ({"train": "gradient_checkpointing = true"}, "not in the training of a DEADiff"),
        ({"deadiff": 'start = "none.safetensors"'}, "none.safetensors: no such file"),
    ],
)
def test_what_does_not_fit_is_said(folder, tables, message):
    with pytest.raises(ValueError, match=message):
        run(write(folder, **tables))
    assert not (folder / "run").exists()


def test_the_template_names_every_field(folder, capsys):
    assert main(["deadiff", "train", "--template"]) == 0
    text = capsys.readouterr().out
    for field in ("align_steps", "reconstruction", "validation", "folder"):
        assert f"{field} = " in text
    assert main(["deadiff", "train"]) == 1
    assert "expected a config file" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no such file"):
        run(folder / "none.toml")
