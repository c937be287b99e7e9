"""Damaged files of every kind, seeded: each is read, or refused by the one error that names it, in little time and memory.

FUZZ_CASES=10000 FUZZ_SEED=7 python -m pytest tests/fuzz -k traces -s       # by hand: other seeds are other cases
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tarfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import adapter_files
import damage
import pytest
import torch
from deadiff_models import random_model, tiny_config
from PIL import Image
from safetensors.torch import save
from torch import nn

from styleinject_core import Adapter, AdapterConfig, AdapterFileError, LayerShape, attach, deadiff, load_adapter, save_adapter
from styleinject_core.commands.config_files import (
    ConfigError,
    DistilConfig,
    DreamBoothConfig,
    TrainConfig,
    load_config,
    template,
)
from styleinject_core.commands.reference import ReferenceConfig
from styleinject_core.deadiff.blip_diffusion import SPELLINGS, start_from_blip_diffusion
from styleinject_core.deadiff.cards import StyleCard, load_card, save_card
from styleinject_core.deadiff.convert import open_checkpoint
from styleinject_core.deadiff.file import DeadiffFileError, load_deadiff, save_deadiff
from styleinject_core.deadiff.spelling import stream_keys
from styleinject_core.deadiff.tokens import Tokens
from styleinject_core.files.alphas import HEADER_KEY
from styleinject_core.files.checked import load_checked, save_checked
from styleinject_core.router.trace import RouterTrace, TraceError, load_trace, save_trace
from styleinject_core.summary import as_text, summarize
from styleinject_core.train.data.drawn import kept_latents
from styleinject_core.train.data.folder import ImageFolder
from styleinject_core.train.data.images import DataError
from styleinject_core.train.data.pairs import pictures_in_folder, pictures_in_shards
from styleinject_core.train.data.webdataset import ImageStream
from styleinject_core.train.models.pipeline import ModelError, sampling_of_file
from styleinject_core.train.run.checkpoints import CheckpointError, RunFolder
from styleinject_core.train.run.loop import train
from styleinject_core.train.settings import TrainSettings

CASES = int(os.environ.get("FUZZ_CASES", "300"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
SECONDS_PER_MB, SECONDS = 1.0, 1.0  # the more of the two: a pause of the machine is no fault of a small file's
BYTES_PER_BYTE, BYTES = 64, 32 * 2**20  # the sum of the two: a Python list of a JSON file's "[]" takes 56 bytes
LONGEST_MESSAGE = 2500


@dataclass(frozen=True)
class Kind:
    """What is damaged: good files of one name, how, what reads them, and the only error that reading may raise."""

    name: str
    good: list[bytes]
    damage: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], object]
    error: type[Exception]


LAYERS = {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": ("input_blocks.1.1.transformer_blocks.0.attn1.to_q", (6, 4)),
          "conv_in": ("input_blocks.0.0", (6, 4, 3, 3))}  # fmt: skip


def adapters(folder: Path) -> list[Kind]:
    """Every kind and spelling of adapter."""
    found = []
    for kind in adapter_files.KINDS:
        spelling = ("kohya", "ComfyUI", "diffusers", "LyCORIS")[len(found) % 4]
        found.append(save(adapter_files.file_of(LAYERS, kind, spelling), {"ss_network_dim": "3"}))
    metadata = {
        HEADER_KEY: json.dumps({"unet.r": adapter_files.RANK, "unet.lora_alpha": 8, "unet.alpha_pattern": {"conv_in": 2}})
    }
    found.append(save(adapter_files.file_of(LAYERS, "LoRA", "diffusers", "PEFT, adapter name"), metadata))
    shapes = {name: LayerShape(shape[1], shape[0], shape[2:] or None) for name, (_, shape) in LAYERS.items()}
    for config in (AdapterConfig(2, 3), AdapterConfig(2, 1, sta="none"), AdapterConfig(2, 2, 4.0, "token", "additive")):
        kept = {name: s for name, s in shapes.items() if config.router_pool != "token" or not s.is_conv}
        save_adapter(Adapter.create(kept, replace(config, target_modules=("all",))), folder / "good.safetensors")
        found.append((folder / "good.safetensors").read_bytes())

    def read(path: Path) -> object:
        adapter = load_adapter(path)
        assert sum(p.numel() * p.element_size() for p in adapter.parameters()) <= 4 * path.stat().st_size
        assert all(torch.isfinite(p.float()).all() for p in adapter.parameters())
        assert adapter.style_names and as_text(summarize(adapter))
        return adapter

    return [Kind("style.safetensors", found, damage.adapter_file, read, AdapterFileError)]


def traces(folder: Path) -> list[Kind]:
    good = []
    for styles in (2, 3):
        probabilities = torch.rand(4, 2, 1, styles)
        trace = RouterTrace("a", ("x", "y"), ("y",), tuple("abc"[:styles]), ("positive", "negative") * 2, probabilities,
                            torch.rand(4, 2, 1, 2), torch.tensor([0, 0, 1, 1]), torch.rand(4), 2)  # fmt: skip
        save_trace(trace, folder / "good.safetensors")
        good.append((folder / "good.safetensors").read_bytes())

    def read(path: Path) -> object:
        trace = load_trace(path)
        return trace.title, trace.remarks, trace.rows().sum()

    return [Kind("trace.safetensors", good, damage.safetensors_file, read, TraceError)]


class Tiny:
    """The smallest task there is."""

    is_float16, advice = False, ""

    def __init__(self) -> None:
        self.host = nn.ModuleDict({"to_q": nn.Linear(3, 3)}).requires_grad_(False)
        self.seen = 0

    def adapter(self) -> Adapter:
        return Adapter.create(self.host, AdapterConfig(r=1, n_styles=2, target_modules=("to_q",)))

    @contextmanager
    def installed(self, adapter: Adapter):
        with attach(self.host, adapter) as attachment:
            yield attachment

    def loss(self, rng: Any) -> torch.Tensor:
        return self.host["to_q"](torch.ones(1, 2, 3)).square().mean()

    def validation_loss(self) -> float:
        return float(self.loss(None))

    def plan(self) -> dict[str, Any]:
        return {"objective": "tiny", "data": {"images": 1}}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Any) -> None:
        self.seen = state["seen"]


def states(folder: Path) -> list[Kind]:
    """The file as it is written, and as the version before checksums wrote it: whose damage only its form can tell."""
    task, settings, good = Tiny(), TrainSettings(2, validate_every=1), []
    train(task.adapter(), task, settings, run=RunFolder(folder / "good"))
    data = (folder / "good" / "resume.state").read_bytes()
    good.append(data)
    header, body = damage.header_of(data)
    inner = json.loads(header["__metadata__"]["styleinject_training"])
    header["__metadata__"] = {"styleinject_training": json.dumps({**inner, "version": 1})}
    good.append(damage.packed(header, body))
    shutil.rmtree(folder / "good")

    def read(path: Path) -> object:
        run = RunFolder(path.parent)
        run.previous_state_file.unlink(missing_ok=True)  # it would be gone on from
        return train(task.adapter(), task, settings, run=run)  # nothing is left to train

    return [Kind("resume.state", good, damage.safetensors_file, read, CheckpointError)]


def losses(folder: Path) -> list[Kind]:
    """The lines of a run's losses: those that say nothing are left out."""
    good = "".join(json.dumps({"step": k, "loss": 0.5, "rate": 1e-4, "validation": 0.4}) + "\n" for k in range(1, 5)).encode()

    def read(path: Path) -> object:
        return sum(line["loss"] for line in RunFolder(path.parent).history())

    return [Kind("loss.jsonl", [good], damage.json_lines, read, NeverError)]


class NeverError(Exception):
    """Of a kind whose damage is mended, and never refused."""


def configs(_folder: Path) -> list[Kind]:
    """The config of each command."""

    def kind(config: type[TrainConfig]) -> Kind:
        good = template(config).replace('"..."', '"x"').replace('folder = ""', 'folder = "y"').encode()
        return Kind("config.toml", [good], damage.toml_file, lambda path: load_config(config, path), ConfigError)

    return [kind(config) for config in (TrainConfig, DreamBoothConfig, DistilConfig, ReferenceConfig)]


def references(folder: Path) -> list[Kind]:
    """DEADiffs, and style cards."""
    config = tiny_config(
        deadiff, width=4, depth=1, heads=1, feed_forward=4, queries=2, context=4, vision_tokens=3, vision_width=4,
        layers=(("down_blocks.0.attn2", 4), ("mid_block.attn2", 4)), content_layers=(1,),
    )  # fmt: skip
    path = folder / "good.safetensors"
    save_deadiff(random_model(deadiff, config), path)
    slim = path.read_bytes()
    tokens = {stream: Tokens(torch.rand(1, 2, 4), stream, "a", ("b", "c")) for stream in ("style", "content")}
    save_card(StyleCard(tokens, b"no picture"), path)
    return [
        Kind("reference.safetensors", [slim], damage.safetensors_file, load_deadiff, DeadiffFileError),
        Kind("card.safetensors", [path.read_bytes()], damage.safetensors_file, load_card, DeadiffFileError),
    ]


def _picture(color: int, format: str, size: tuple[int, int] = (20, 16)) -> bytes:
    stored = io.BytesIO()
    Image.new("RGB", size, (color, 90, 200)).save(stored, format=format)
    return stored.getvalue()


def images(folder: Path) -> list[Kind]:
    """Captions and pictures of a folder."""
    (folder / "a.png").write_bytes(_picture(3, "PNG"))
    table = b"".join(json.dumps({"file_name": name, "text": f"a {name}"}).encode() + b"\n" for name in ("a.png", "b.jpg"))
    (folder / "b.jpg").write_bytes(_picture(200, "JPEG"))

    def read(path: Path) -> object:
        try:
            found = ImageFolder(path.parent, 16, bucket_step=16, on_corrupt="stop")
            return [found[k].pixels.sum() for k in range(len(found))]
        finally:
            path.unlink()

    def a_picture(name: str, good: bytes) -> Kind:
        def read_picture(path: Path) -> object:
            try:
                found = ImageFolder(path.parent, 16, bucket_step=16, on_corrupt="stop", caption="one")
                return [found[k].pixels.sum() for k in range(len(found))]
            finally:
                path.write_bytes(good)

        return Kind(name, [good], damage.any_file, read_picture, DataError)

    return [
        Kind("metadata.jsonl", [table], damage.json_lines, read, DataError),
        *(a_picture(name, (folder / name).read_bytes()) for name in ("a.png", "b.jpg")),
    ]


def shards(_folder: Path) -> list[Kind]:
    """Streams of pictures with captions."""
    stored = io.BytesIO()
    with tarfile.open(fileobj=stored, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key in "ab":
            caption = json.dumps({"text": f"a {key}"}).encode()
            for suffix, content in (("png", _picture(40, "PNG")), ("json" if key == "a" else "txt", caption)):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    def read(path: Path) -> object:
        stream = ImageStream(path, 16, 1, bucket_step=16, shuffle=2, on_corrupt="stop")
        return [stream.next_batch() for _ in range(3)]

    return [Kind("shard.tar", [stored.getvalue()[:6144]], damage.tar_file, read, DataError)]


def pairs(folder: Path) -> list[Kind]:
    """Pictures of which style and subject are known: in shards, and the texts of folders."""
    stored = io.BytesIO()
    said = json.dumps({"style": "ink", "subject": "cat", "subject_prompt": "a cat"}).encode()
    members = {"ink/style.txt": b"in ink", "ink/a.png": _picture(40, "PNG"), "ink/a.txt": b"a cat", "b.json": said,
               "b.png": _picture(90, "PNG")}  # fmt: skip
    with tarfile.open(fileobj=stored, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    for style in ("ink", "oil"):
        (folder / style).mkdir()
        (folder / style / "red_cat.png").write_bytes(members["b.png"])

    def read(path: Path) -> object:
        return [picture.open().read() for picture in pictures_in_shards(path)]

    def read_text(path: Path) -> object:
        place = folder / "ink" / path.name
        path.replace(place)
        try:
            return pictures_in_folder(folder)
        finally:
            place.unlink()

    return [
        Kind("pairs.tar", [stored.getvalue()[:6144]], damage.tar_file, read, DataError),
        *(
            Kind(name, [b"a cat in ink, \xe7\x8c\xab"], damage.any_file, read_text, DataError)
            for name in ("style.txt", "red_cat.txt")
        ),
    ]


def encodings(folder: Path) -> list[Kind]:
    """Latents that were encoded or drawn: what is damaged counts as not there, and is made again."""
    tensors = {"latents": torch.rand(3, 4, 2, 2), "about.size": torch.rand(1, 6)}
    save_checked(tensors, folder / "good.safetensors")

    def read(path: Path) -> object:
        found = load_checked(path)
        assert found is None or all(torch.equal(found[name], value) for name, value in tensors.items())
        assert found is not None or not kept_latents(path)
        return found

    return [Kind("some.kept", [(folder / "good.safetensors").read_bytes()], damage.safetensors_file, read, NeverError)]


def checkpoints(folder: Path) -> list[Kind]:
    """Checkpoints of other programs: what a DEADiff is converted from, what it begins with, and what says how a model samples."""
    config = tiny_config(
        deadiff, width=4, depth=1, heads=1, feed_forward=4, queries=2, context=4, vision_tokens=3, vision_width=4,
        layers=(("down_blocks.0.attn2", 4),), content_layers=(),
    )  # fmt: skip
    model, found = random_model(deadiff, config), list[bytes]()
    stream = model.streams["style"].state_dict()
    for spelling in SPELLINGS[:2]:
        tensors = {key: stream[own].clone() for own, key in stream_keys(spelling, config.depth).items()}
        tensors |= {f"embeddings.{table}_embeddings.weight": torch.rand(5000, 4).half() for table in ("word", "position")}
        found.append(save(tensors))
    pickled = []
    for form in (True, False):
        stored = io.BytesIO()
        state = {"state_dict": {"a": torch.rand(3, 4), "b": torch.arange(5), "c": torch.rand(2).half()}, "step": 3}
        torch.save(state, stored, _use_new_zipfile_serialization=form)
        pickled.append(stored.getvalue())

    def read(path: Path) -> object:
        return [value.float().sum() for value in open_checkpoint(path).values() if isinstance(value, torch.Tensor)]

    marked = save({"v_pred": torch.zeros(0), "x": torch.rand(3)}, {"modelspec.prediction_type": "v"})
    return [
        Kind("model.ckpt", pickled[:1], damage.any_file, read, DeadiffFileError),  # PyTorch maps no others
        Kind("model.safetensors", [marked], damage.safetensors_file, read, DeadiffFileError),
        Kind("single.safetensors", [marked], damage.safetensors_file, sampling_of_file, ModelError),
        Kind(
            "blip.safetensors",
            found,
            damage.adapter_file,
            lambda path: start_from_blip_diffusion(model, path),
            DeadiffFileError,
        ),
    ]


KINDS = (adapters, traces, states, losses, configs, references, images, shards, pairs, encodings, checkpoints)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused_by_name(tmp_path: Path, kind: Callable[[Path], list[Kind]]) -> None:
    kinds, rng = kind(tmp_path), random.Random(f"{SEED}/{kind.__name__}")
    (tmp_path / "good.safetensors").unlink(missing_ok=True)
    for files in kinds:
        for data in files.good:
            (tmp_path / files.name).write_bytes(data)
            files.read(tmp_path / files.name)
    read = refused = 0
    slowest, largest = 0.0, 0
    for case in range(CASES):
        files = rng.choice(kinds)
        path, data = tmp_path / files.name, rng.choice(files.good)
        for _ in range(rng.choice((1, 1, 2, 3))):
            data = files.damage(data, rng)
        path.write_bytes(data)
        memory, start = Memory(), time.process_time()
        error = _error_of(files, path)
        took, taken = time.process_time() - start, memory.taken()
        slowest, largest = max(slowest, took), max(largest, taken - BYTES_PER_BYTE * len(data))
        problem = ""
        if isinstance(error, files.error):
            refused += 1
            if files.name not in str(error) or len(str(error)) > LONGEST_MESSAGE:
                problem = f"says {str(error)[:3000]!r}"
        elif error is not None:
            problem = f"{type(error).__name__}: {str(error)[:300]}"
        else:
            read += 1
        if took > max(SECONDS, SECONDS_PER_MB * len(data) / 2**20):
            problem = f"took {took:.1f} s for {len(data)} bytes"
        if taken > BYTES + BYTES_PER_BYTE * len(data):
            problem = f"took {taken / 2**20:.0f} MiB for {len(data)} bytes"
        if problem:
            kept = Path(os.environ.get("FUZZ_KEEP", str(tmp_path))) / f"case-{SEED}-{case}-{files.name}"
            kept.write_bytes(data)
            raise AssertionError(f"case {case} of seed {SEED}: {problem}; kept as {kept}") from error
    print(f"{kind.__name__}: {read} read, {refused} refused, {slowest:.2f} s and {max(0, largest) / 2**20:.0f} MiB at most")
    assert read >= CASES // 600 and (refused > CASES // 20 or any(k.error is NeverError for k in kinds)), (
        "too gentle, or too rough"
    )


def _error_of(kind: Kind, path: Path) -> Exception | None:
    try:
        kind.read(path)
    except Exception as error:
        return error
    return None


class Memory:
    """How much more the process holds, at its peak, than when this was made; where the system does not tell, nothing."""

    def __init__(self) -> None:
        self.before = 0
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            self.before = self._peak()
        except OSError:
            pass

    def taken(self) -> int:
        return self._peak() - self.before if self.before else 0

    @staticmethod
    def _peak() -> int:
        """Bytes: VmHWM."""
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split(None, 1)[0]) * 1024
