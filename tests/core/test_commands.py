"""styleinject train | dreambooth | distill, as their user meets them: config files, real pictures, the embedded model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
from PIL import Image
from safetensors import safe_open

from styleinject_core import load_adapter
from styleinject_core.cli import main
from styleinject_core.commands import training as run_module
from styleinject_core.commands.build import build
from styleinject_core.commands.config_files import (
    ConfigError,
    DistilConfig,
    DreamBoothConfig,
    OutputTable,
    TrainConfig,
    load_config,
    template,
)
from styleinject_core.demo import data
from styleinject_core.train.parallel import Processes

ROOT = Path(__file__).parents[2]
COMMON = {
    "model": {"path": "demo"},
    "data": {"folder": "pictures", "resolution": 64},
    "adapter": {"rank": 2, "styles": 2, "targets": ["mid & attention"]},
    "train": {"steps": 3, "batch_size": 2, "learning_rate": 1e-3},
    "output": {"folder": "run", "name": "noto style"},
}


def toml(tables):
    lines = []
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def merged(**changes):
    return {name: {**COMMON.get(name, {}), **changes.get(name, {})} for name in {**COMMON, **changes}}


def picture_folder(folder, count=6, style="noto", captions=True):
    folder.mkdir()
    for concept, image in list(zip(data.concepts(), data.images(style), strict=True))[:count]:
        pixels = ((image.permute(1, 2, 0) + 1) * 127.5).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{concept.code}.png")
        if captions:
            (folder / f"{concept.code}.txt").write_text(concept.name)
    return folder


@pytest.fixture
def here(tmp_path):
    picture_folder(tmp_path / "pictures")
    return tmp_path


def write(here, **changes):
    path = here / "config.toml"
    path.write_text(toml(merged(**changes)))
    return path


@pytest.mark.parametrize("kind", [TrainConfig, DreamBoothConfig, DistilConfig])
def test_templates_are_the_defaults(kind, tmp_path):
    path = tmp_path / "t.toml"
    path.write_text(template(kind).replace('folder = ""', 'folder = "x"', 1))
    config = load_config(kind, path)
    assert config.train == TrainConfig(model=config.model, output=config.output, data=config.data).train
    assert config.output == OutputTable("...")
    assert config.data.folder == "x"
    assert config.adapter.config().n_styles == 16
    assert main([{"TrainConfig": "train", "DreamBoothConfig": "dreambooth"}.get(kind.__name__, "distill"), "--template"]) == 0


@pytest.mark.parametrize(("changes", "message"), [
    ({"train": {"step": 3}}, r"config.toml: train.step: unknown field, did you mean steps\?"),
    ({"trian": {}}, r"trian: unknown field, did you mean train\?"),
    ({"train": {"steps": "3"}}, "train.steps: expected a whole number, found '3'"),
    ({"train": {"steps": True}}, "train.steps: expected a whole number, found True"),
    ({"train": {"steps": 0}}, "train.steps: expected at least 1, found 0"),
    ({"adapter": {"targets": "to_q"}}, "adapter.targets: expected a list of strings, found 'to_q'"),
    ({"adapter": {"method": "dora"}}, "adapter.method: expected one of styleinject, lora, kronecker, dma-only, sta-only, found 'dora'"),
    ({"output": {"name": "../x"}}, "output.name: expected the name of a file, without folders, found '../x'"),
    ({"output": {"name": "Best"}}, "output.name: 'Best' is what other files of a run"),
    ({"output": {"name": "step-000010"}}, "output.name: 'step-000010' is what other files of a run"),
    ({"data": {"folder": "", "shards": ""}}, "data.folder or data.shards: one of them is needed"),
    ({"data": {"shards": "x.tar"}}, "data.folder and shards: give one of them"),
    ({"train": {"validate_every": 5}}, "train.validate_every: set data.validation"),
    ({"train": {"sample_every": 5}}, "train.sample_every: set output.prompts to what is to be drawn"),
    ({"data": {"validation": -1}}, "data.validation: expected at least 0, found -1"),
    ({"data": {"resolution": 0}}, "data.resolution: expected at least 1, found 0"),
    ({"data": {"folder": "", "shards": "x.tar", "validation": 2}}, "data.validation: images can be held out of a folder only"),
])  # fmt: skip
def test_config_errors(here, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_config(TrainConfig, write(here, **changes))


@pytest.mark.parametrize(("path", "found"), [
    (r"C:\models\sd15", "Unescaped"), (r"C:\Users\me", "Invalid hex value"), (r"C:\temp\new", "model.path: .* has a tab, a line break"),
])  # fmt: skip
def test_windows_paths(tmp_path, path, found):
    (tmp_path / "c.toml").write_text(f'[model]\npath = "{path}"\n[output]\nfolder = "x"\n[data]\nfolder = "y"\n')
    with pytest.raises(ConfigError, match=f"^c.toml: {found}.*; write a path with / or in single quotes"):
        load_config(TrainConfig, tmp_path / "c.toml")
    (tmp_path / "c.toml").write_text(f"[model]\npath = '{path}'\n[output]\nfolder = 'x'\n[data]\nfolder = 'y'\n")
    assert load_config(TrainConfig, tmp_path / "c.toml").model.path == path
    (tmp_path / "c.toml").write_text(
        '[model]\npath = "x"\n[output]\nfolder = "x"\nlicense = """MIT\nsee file"""\n[data]\nfolder = "y"\n'
    )
    assert load_config(TrainConfig, tmp_path / "c.toml").output.license == "MIT\nsee file"


@pytest.mark.parametrize("error", [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
], ids=["CUDA", "CPU"])  # fmt: skip
def test_out_of_memory_says_what_helps(here, capsys, monkeypatch, error):
    def loss(*_):
        raise error

    monkeypatch.setattr("styleinject_core.train.objectives.tasks.FineTune.loss", loss)
    for more in ([], ["--dry-run"]):
        assert main(["train", str(write(here)), *more]) == 1
        told = capsys.readouterr().err
        assert str(error) in told and "train.gradient_checkpointing = true" in told and "Traceback" not in told


@pytest.mark.parametrize(("kind", "changes", "message"), [
    (DreamBoothConfig, {"dreambooth": {"class_images": 0}}, "dreambooth.class_images: expected at least 1, found 0; prior_weight = 0 does"),
    (DreamBoothConfig, {"dreambooth": {"prior_weight": -1}}, "dreambooth.prior_weight: expected at least 0, found -1.0"),
    (DistilConfig, {"distil": {"images_per_prompt": 0}}, "distil.images_per_prompt: expected at least 1, found 0"),
    (DistilConfig, {"distil": {"output_weight": 0.0, "feature_weight": 0.0}}, "both 0: there is nothing to learn"),
    (DistilConfig, {"train": {"min_snr_gamma": 5.0}}, "train.min_snr_gamma: it weights the error of fine-tuning"),
    (DistilConfig, {"data": {"folder": "", "validation": 2}, "distil": {"prompts": "p.txt"}}, "data.validation: images can be held out"),
])  # fmt: skip
def test_config_errors_of_the_others(here, kind, changes, message):
    needed = {
        "dreambooth": {"instance_prompt": "sks cat", "class_prompt": "cat"},
        "teacher": {"path": "demo:noto"},
        "distil": {},
    }
    own = {"dreambooth"} if kind is DreamBoothConfig else {"teacher", "distil"}
    tables = {name: {**needed.get(name, {}), **changes.get(name, {})} for name in {*own, *changes}}
    with pytest.raises(ConfigError, match=message):
        load_config(kind, write(here, **tables))


def test_texts_of_other_systems(here):
    """A byte order mark, UTF-16 as PowerShell's > writes it, and a console without Greek."""
    path = write(here)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_config(TrainConfig, path).output.name == "noto style"
    path.write_text(path.read_text(encoding="utf-8-sig"), encoding="utf-16")
    with pytest.raises(
        ConfigError, match=r"config.toml: not UTF-8 text; it is UTF-16, as some shells write it: save it as UTF-8"
    ):
        load_config(TrainConfig, path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    commands = "[main([command, '--template']) for command in ('train', 'dreambooth', 'distill')]"
    script = f"from styleinject_core.cli import main; raise SystemExit(any({commands}))"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count(b"[output]") == 3 and b"?" not in done.stdout.replace(b"?,", b"")


def test_missing_parts_and_files(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing.toml: no such file"):
        load_config(TrainConfig, tmp_path / "nothing.toml")
    for text, message in [("[model]\npath = 'demo'", "output: this table is needed"),
                          ("[model]\n[output]\nfolder = 'x'", r"model.path: this field is needed"),
                          ("[model", "bad.toml: ")]:  # fmt: skip
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(TrainConfig, tmp_path / "bad.toml")


def test_dry_run_writes_nothing(here, capsys):
    path = write(here)
    before = sorted(here.rglob("*"))
    assert main(["train", str(path), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "fine-tune on demo: 6 images, 8 layers" in text
    assert "MiB activations" in text
    assert sorted(here.rglob("*")) == before


def test_train_stop_and_go_on(here, capsys, monkeypatch):
    """The whole of it, and again in two parts: the same file, to the bit."""
    extra = {"train": {"steps": 4, "validate_every": 2, "sample_every": 2, "checkpoint_every": 3}, "data": {"validation": 2},
             "output": {"prompts": ["red apple"], "trigger_phrase": "noto", "author": "me"}}  # fmt: skip
    assert main(["train", str(write(here, **extra))]) == 0
    assert "noto style.safetensors: step" in capsys.readouterr().out
    out = here / "run"
    adapter = load_adapter(out / "noto style.safetensors")
    assert adapter.metadata["modelspec.architecture"] == "styleinject-demo/styleinject"
    assert adapter.metadata["modelspec.trigger_phrase"] == "noto"
    assert json.loads(adapter.metadata["styleinject.data"])["data"]["images"] == 6
    assert str(here) not in json.dumps(adapter.metadata)
    assert {p.name for p in (out / "samples").iterdir()} == {"step-000002.png", "step-000004.png"}
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    lines = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]

    whole = {key: value.clone() for key, value in adapter.state_dict().items()}
    out.rename(here / "whole")
    pressed = run_module._Watch.progress

    def interrupt(self, progress):
        if progress.step == 2:
            signal.raise_signal(signal.SIGTERM)
        pressed(self, progress)

    monkeypatch.setattr(run_module._Watch, "progress", interrupt)
    assert main(["train", str(here / "config.toml")]) == 130
    printed = capsys.readouterr()
    assert "The same command goes on from the last checkpoint" in printed.out
    assert not (out / "noto style.safetensors").exists()
    monkeypatch.setattr(run_module._Watch, "progress", pressed)
    assert main(["train", str(here / "config.toml")]) == 0
    again = load_adapter(out / "noto style.safetensors").state_dict()
    assert all(torch.equal(again[key], value) for key, value in whole.items())

    for changed, message in [({"adapter": {"rank": 3}}, "adapter.r: was 2, is 3"),
                             ({"data": {**extra["data"], "flip": True}}, "data.flip: was False, is True")]:  # fmt: skip
        assert main(["train", str(write(here, **{**extra, **changed}))]) == 1
        printed = capsys.readouterr()
        assert message in printed.err and "another output.folder" in printed.err
        assert "The same command goes on" not in printed.out


def test_what_cannot_be_written_ends_no_run(here, capsys, monkeypatch):
    """The loss plot and the pictures: reported, and the adapter is there."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_module, "loss_plot", full)
    monkeypatch.setattr(run_module, "save_picture", full)
    monkeypatch.setattr(run_module, "PLOT_EVERY", 0.0)
    changes = {"train": {"sample_every": 2}, "output": {"prompts": ["red apple"]}}
    assert main(["train", str(write(here, **changes))]) == 0
    assert load_adapter(here / "run" / "noto style.safetensors")


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("", "output.folder: it is empty, name a folder for the run"),
        ("config.toml", "output.folder: .*config.toml cannot be made: File exists"),
        ("x" * 300, "output.folder: x{200} cannot be made: File name too long"),
        ("gone/run", "output.folder: 'gone' is not a folder, create it first"),
    ],
)
def test_folders_that_cannot_be_made(here, capsys, folder, message):
    assert main(["train", str(write(here, output={"folder": folder}))]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_the_run_is_not_its_own_data(here, capsys):
    for folder, out in (("pictures", "pictures/run"), (".", "run")):
        assert main(["train", str(write(here, data={"folder": folder}, output={"folder": out}))]) == 1
        assert "output.folder: it is inside data.folder" in capsys.readouterr().err
    assert not (here / "run").exists() and not (here / "pictures" / "run").exists()


def test_every_held_out_image_is_measured_once(here):
    from styleinject_core.commands import build as build_module
    from styleinject_core.train.parallel import Processes

    for k, picture in enumerate(sorted((here / "pictures").glob("*.png"))):
        Image.open(picture).resize((64, 64) if k % 2 else (64, 128)).save(picture)
    changes = {"data": {"validation": 4, "bucket_step": 32}, "train": {"validate_every": 1, "batch_size": 3}}
    job = build_module.build(load_config(TrainConfig, write(here, **changes)), here, Processes(), dry=True)
    task, seen = job.task, []
    folder = task.validation.folder
    read = folder.read
    folder.read = lambda index, *rest: seen.append(index) or read(index, *rest)
    task.validation_loss()
    assert sorted(seen) == sorted(task.validation.indices) and len(seen) == 4
    assert not {*task.source.indices} & {*seen}


def test_styles_are_named_by_folders_and_captions(here, capsys):
    """Each trains its own style of the adapter, which has its name; what names none is counted; what does not fit is refused."""
    picture_folder(here / "data")
    for style in ("noto", "fluent3d"):
        picture_folder(here / "data" / style, 3, style)
    for k, path in enumerate(sorted((here / "data").glob("*.txt"))):
        path.write_text("a twemoji drawing" if k else "twemoji, not noto")
    table = {"styles": ["Twemoji", "noto", "fluent3d"], "style_dropout": 0.0}
    path = write(here, data={**table, "folder": "data"}, adapter={"styles": 4, "rank": 2}, train={"steps": 3})
    job = build(load_config(TrainConfig, path), here, Processes())
    assert job.adapter.style_names == ("Twemoji", "noto", "fluent3d", "style 4")
    folder = job.task.source.folder
    expected = {folder.name(k): {"noto": 1, "fluent3d": 2}.get(folder.name(k).split("/")[0], 0) for k in range(len(folder))}
    expected[min(expected, key=lambda name: ("/" in name, name))] = -1  # its caption has two of the words
    seen = {}
    for index in range(20):
        batch = job.task.source.batch(index)
        for k, style in zip(job.task.source.order.batch(index), batch.styles.tolist(), strict=True):
            seen[folder.name(job.task.source.indices[k])] = style
    assert seen == expected
    assert "1 of 12 images name no style, or several" in job.task.advice
    assert main(["train", str(path)]) == 0
    assert "styles: Twemoji (5), noto (3), fluent3d (3); the router reads the prompt" in capsys.readouterr().out
    saved = load_adapter(here / "run" / "noto style.safetensors")
    assert saved.style_names[:3] == ("Twemoji", "noto", "fluent3d")

    for changes, message in (
        ({"data": {**table, "folder": "data", "styles": ["a", "A"]}}, "styles: 'a' is there twice"),
        ({"data": {**table, "folder": "data"}, "adapter": {"styles": 2}}, "data.styles: 3 names, but the adapter has 2 styles"),
        ({"data": {**table, "folder": "data"}, "adapter": {"method": "lora"}}, "the method 'lora' has no styles"),
        ({"data": {**table, "folder": "data", "style_dropout": 1.0}}, "style_dropout: expected 0 to below 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(TrainConfig, write(here, **changes))
    path = write(here, data={**table, "folder": "data", "styles": ["noto", "cubism"]}, adapter={"styles": 4, "rank": 2})
    assert main(["train", str(path), "--dry-run"]) == 1
    assert "no image is in a folder 'cubism', or has it as the only style" in capsys.readouterr().err


def test_baselines(here):
    for method, styles, parts in [("lora", 1, {"A", "B"}), ("dma-only", 2, {"A", "B", "router_weight", "router_bias"}),
                                  ("sta-only", 1, None)]:  # fmt: skip
        changes = {"adapter": {"method": method}, "train": {"steps": 1}, "output": {"folder": method}}
        assert main(["train", str(write(here, **changes))]) == 0
        adapter = load_adapter(here / method / "noto style.safetensors")
        layer = next(iter(adapter.layers.values()))
        assert layer.config.n_styles == styles
        assert parts is None or set(layer.tensors()) == parts


def test_kronecker(here, capsys):
    """Factors and the paper's layers from a config, the file's header, going on, and what a changed method says."""
    size = {"rank": 2, "styles": 2, "factors": [8, 3]}
    kronecker = {"model": {"path": "demo"}, "adapter": {"method": "kronecker", "targets": [], **size}}
    path = write(here, **kronecker)
    assert main(["train", str(path)]) == 0
    adapter = load_adapter(here / "run" / "noto style.safetensors")
    assert adapter.config.method == "kronecker" and adapter.config.factors == (8, 3)
    assert adapter.config.target_modules == ("queries", "keys", "values", "outputs") and len(adapter.names) == 56
    assert {tuple(layer.A.shape) for layer in adapter.layers.values()} == {(8, 3), (8, 2)}, "of inputs 96 and 192, and 128"
    assert all(layer.B.any() for layer in adapter.layers.values())
    assert adapter.metadata["modelspec.architecture"] == "styleinject-demo/kronecker"
    assert adapter.metadata["modelspec.implementation"] == "https://arxiv.org/abs/2402.17412"
    losses = [json.loads(line)["loss"] for line in (here / "run" / "loss.jsonl").read_text().splitlines()]
    capsys.readouterr()

    changed = {"adapter": {"method": "lora", "targets": ["to_q", "to_k", "to_v", "to_out.0"], **size}, "train": {"steps": 5}}
    assert main(["train", str(write(here, **changed))]) == 1
    told = capsys.readouterr().err
    assert "another run" in told and "adapter.method: was kronecker, is lora" in told
    other = {"adapter": {"method": "kronecker", "targets": [], "factors": [4, 4]}, "train": {"steps": 5}}
    assert main(["train", str(write(here, **other))]) == 1
    assert "adapter.factors: was [8, 3], is [4, 4]" in capsys.readouterr().err
    assert main(["train", str(write(here, **kronecker, train={"steps": 5}))]) == 0, "it goes on"
    again = [json.loads(line)["loss"] for line in (here / "run" / "loss.jsonl").read_text().splitlines()]
    assert again[:3] == losses and len(again) == 5


def test_a_state_that_does_not_say_its_method_goes_on(here):
    """As version 0.1.0 wrote them."""
    from safetensors.torch import load_file, save_file

    assert main(["train", str(write(here))]) == 0
    state = here / "run" / "resume.state"
    with safe_open(state, framework="pt") as file:
        header = json.loads(file.metadata()["styleinject_training"])
    assert header["plan"]["adapter"].pop("method") == "styleinject"
    header["version"] = 1
    save_file(load_file(state), state, {"styleinject_training": json.dumps(header)})
    assert main(["train", str(write(here, train={"steps": 4}))]) == 0
    assert len((here / "run" / "loss.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([4], r"adapter.factors: expected two integers of at least 1, found \(4,\)"),
        ([0, 4], r"adapter.factors: expected two integers of at least 1, found \(0, 4\)"),
        (["a", "b"], r"adapter.factors: expected a list of whole numbers, found \['a', 'b'\]"),
    ],
)
def test_factors_that_are_none(here, factors, message):
    with pytest.raises(ConfigError, match=message):
        load_config(TrainConfig, write(here, adapter={"method": "kronecker", "factors": factors}))


def test_bad_pictures(here, capsys):
    broken = here / "pictures" / "broken.png"
    broken.write_bytes(next((here / "pictures").glob("*.png")).read_bytes()[:60])
    (here / "pictures" / "broken.txt").write_text("a cat")
    with pytest.warns(UserWarning, match=r"broken\.png: .*\(skipped\)"):
        assert main(["train", str(write(here, train={"steps": 4}))]) == 0
    capsys.readouterr()
    assert main(["train", str(write(here, data={"on_corrupt": "stop"}, output={"folder": "other"}))]) == 1
    assert "broken.png" in capsys.readouterr().err
    broken.unlink()
    assert main(["train", str(write(here, output={"folder": "third"}))]) == 1
    assert "broken.txt" in capsys.readouterr().err


def test_dreambooth_draws_its_class_once(here, capsys):
    own = {"instance_prompt": "sks cat face", "class_prompt": "cat face", "class_images": 3, "class_steps": 3}
    path = write(here, dreambooth=own)
    assert main(["dreambooth", str(path)]) == 0
    (drawn,) = (here / "run").glob("generated-*.latents")
    with safe_open(drawn, framework="pt") as file:
        assert file.get_tensor("latents").shape == (3, 16, 8, 8)
    metadata = load_adapter(here / "run" / "noto style.safetensors").metadata
    assert metadata["modelspec.trigger_phrase"] == "sks cat face"
    assert json.loads(metadata["styleinject.data"])["prior"]["images"] == 3
    written = drawn.stat().st_mtime_ns
    assert main(["dreambooth", str(write(here, dreambooth=own, train={"steps": 5}))]) == 0
    assert drawn.stat().st_mtime_ns == written
    assert main(["dreambooth", str(write(here, dreambooth={**own, "class_steps": 2}))]) == 1, "another run"
    assert drawn.stat().st_mtime_ns == written, "and its images stay"
    picture_folder(here / "class", 2, captions=False)
    given = {**own, "class_folder": "class"}
    assert main(["dreambooth", str(write(here, dreambooth=given, output={"folder": "given"}))]) == 0
    assert not list((here / "given").glob("generated-*"))


def test_drawing_goes_on_after_an_interrupt(here, capsys, monkeypatch):
    from styleinject_core.demo.training import DemoTrainingModel

    own = {"instance_prompt": "sks cat face", "class_prompt": "cat face", "class_images": 10, "class_steps": 2}
    sample, seeds = DemoTrainingModel.sample, []

    def stopping(self, prompts, resolution, seed, *rest):
        seeds.append(seed)
        if len(seeds) == 3:
            raise KeyboardInterrupt
        return sample(self, prompts, resolution, seed, *rest)

    monkeypatch.setattr(DemoTrainingModel, "sample", stopping)
    assert main(["dreambooth", str(write(here, dreambooth=own))]) == 130
    assert main(["dreambooth", str(write(here, dreambooth=own))]) == 0
    assert seeds == [0, 4, 8, 8]
    (drawn,) = (here / "run").glob("generated-*.latents")
    with safe_open(drawn, framework="pt") as file:
        parts = file.get_tensor("latents")
    assert main(["dreambooth", str(write(here, dreambooth=own, output={"folder": "whole"}))]) == 0
    (drawn,) = (here / "whole").glob("generated-*.latents")
    with safe_open(drawn, framework="pt") as file:
        assert torch.equal(file.get_tensor("latents"), parts)


def test_distil_without_and_with_pictures(here, capsys):
    (here / "prompts.txt").write_text("red apple\ncat face\n\n")
    (here / "teacher.txt").write_bytes("apple\r\n\0\r\ncat\r\n".encode("utf-16"))  # as a shell of Windows writes it
    table = {"prompts": "prompts.txt", "sampling_steps": 2, "images_per_prompt": 2}
    no_pictures = {"data": {"folder": ""}, "teacher": {"path": "demo:noto"}}
    assert main(["distill", str(write(here, **no_pictures, distil=table))]) == 0
    metadata = load_adapter(here / "run" / "noto style.safetensors").metadata
    assert metadata["styleinject.objective"] == "distil"
    assert metadata["styleinject.teacher"] == "demo:noto"

    unshared = {**table, "teacher_prompts": "teacher.txt", "shared_text_encoder": False}
    assert main(["distill", str(write(here, **no_pictures, distil=unshared, output={"folder": "unshared"}))]) == 0
    assert main(["distill", str(write(here, teacher={"path": "demo:noto"}, output={"folder": "pictures too"}))]) == 0
    capsys.readouterr()

    (here / "teacher.txt").write_text("apple\nlion\n")
    assert main(["distill", str(write(here, **no_pictures, distil=unshared, output={"folder": "unshared"}))]) == 1
    assert "teacher_reads: was" in capsys.readouterr().err
    assert main(["distill", str(write(here, teacher={"path": "demo"}, output={"folder": "same"}))]) == 1
    assert "teacher.path: teacher and student are the same model" in capsys.readouterr().err
    (here / "teacher.txt").write_text("apple\n")
    assert main(["distill", str(write(here, **no_pictures, distil=unshared, output={"folder": "x"}))]) == 1
    assert "distil.prompts has 2 lines, distil.teacher_prompts 1" in capsys.readouterr().err
    wrong = {**table, "shared_text_encoder": False, "feature_weight": 1.0}
    assert main(["distill", str(write(here, **no_pictures, distil=wrong, output={"folder": "x"}))]) == 1
    assert "feature_weight: with text encoders that are not shared only outputs are compared" in capsys.readouterr().err


def test_shards(here):
    import tarfile

    with tarfile.open(here / "set-0.tar", "w") as tar:
        for path in sorted((here / "pictures").iterdir()):
            tar.add(path, path.name)
    changes = {"data": {"folder": "", "shards": "set-{0..0}.tar", "bucket_step": 64}}
    assert main(["train", str(write(here, **changes))]) == 0
    assert load_adapter(here / "run" / "noto style.safetensors").metadata["styleinject.steps"] == "3"


def test_two_processes_are_one_with_twice_the_batch(here):
    pytest.importorskip("accelerate")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    exact = {"dtype": "float32"}
    single = write(here, train={"batch_size": 4}, output={"folder": "one", **exact})
    assert main(["train", str(single)]) == 0
    double = write(here, train={"batch_size": 2}, output={"folder": "two", **exact})
    # what `accelerate launch` starts for several GPUs; on CPUs it wants MPI instead
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d",
              "--rdzv_endpoint", "127.0.0.1:0", "-m", "styleinject_core.cli", "train", str(double)]  # fmt: skip
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "4 images a step" in done.stdout
    one, two = (load_adapter(here / name / "noto style.safetensors").state_dict() for name in ("one", "two"))
    changed = [key for key in one if key.endswith("B")]  # zero before training
    difference = torch.cat([(one[key] - two[key]).flatten() for key in changed]).norm()
    assert difference < 0.01 * torch.cat([one[key].flatten() for key in changed]).norm()  # AdamW magnifies rounding
    losses = [
        [json.loads(line)["loss"] for line in (here / name / "loss.jsonl").read_text().splitlines()] for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_models_that_are_none(here, capsys):
    (here / "empty").mkdir()
    (here / "model.ckpt").write_bytes(b"x")
    (here / "model.safetensors").write_bytes(b"x")
    for path, message in [("nowhere", "no such file or folder"), ("empty", "model empty: cannot be loaded"),
                          ("model.ckpt", "expected a diffusers folder or a .safetensors file"),
                          ("model.safetensors", "set model.config"), ("demo:apple", "demo style 'apple': expected one of")]:  # fmt: skip
        assert main(["train", str(write(here, model={"path": path}))]) == 1
        assert message in capsys.readouterr().err
