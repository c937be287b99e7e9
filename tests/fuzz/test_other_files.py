"""Damaged traces, states and configs, seeded: every one is read, or refused by the one error that names it, and none takes long.

FUZZ_CASES=100000 FUZZ_SEED=7 python -m pytest tests/fuzz/test_other_files.py        # by hand, for an hour
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from styleinject_core import Adapter, AdapterConfig, attach
from styleinject_core.commands.config_files import (
    ConfigError,
    DistilConfig,
    DreamBoothConfig,
    TrainConfig,
    load_config,
    template,
)
from styleinject_core.commands.reference import ReferenceConfig
from styleinject_core.router.trace import RouterTrace, TraceError, load_trace, save_trace
from styleinject_core.train.run.checkpoints import CheckpointError, RunFolder
from styleinject_core.train.run.loop import train
from styleinject_core.train.settings import TrainSettings

CASES = int(os.environ.get("FUZZ_CASES", "1500"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
SECONDS_PER_MB, AT_LEAST = 1.0, 5.0

VALUES = [
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    10**400,
    1e308,
    -0.5,
    True,
    None,
    "1",
    "\u00b2",
    [],
    {},
    [[]],
    float("nan"),
    "x" * 3000,
]
TEXTS = ["", "\u00b2", "9" * 5000, "[" * 3000, "{", "null", "NaN", "1e999", "\x00", "[1]", "-1", "true", '"a"', "[[[]]]"]


def _bytes(data: bytes, rng: random.Random) -> bytes:
    if not data or rng.random() < 0.2:
        return data[: rng.randrange(len(data) + 1)]
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 30))):
        changed[rng.randrange(len(changed) if rng.random() < 0.3 else min(len(changed), 3000))] = rng.randrange(256)
    return bytes(changed)


def _value(value: Any, rng: random.Random) -> Any:
    """A nested value with one thing in it changed, left out or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.15:
            return {name: item for name, item in value.items() if name != key}
        if kind < 0.25:
            return {(rng.choice(TEXTS) if name == key else name): item for name, item in value.items()}
        return {**value, key: _value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value[:place] + value[place + 1 :]
        return [_value(item, rng) if n == place else item for n, item in enumerate(value)]
    return rng.choice(VALUES)


def _tensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose bytes, header, texts or nested texts are other ones."""
    try:
        size = struct.unpack("<Q", data[:8])[0]
        header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
        metadata = header.get("__metadata__") or {}
        kind = rng.random()
        if kind < 0.2 or not metadata:
            return _bytes(data, rng)
        if kind < 0.4:
            header = _value(header, rng)
        elif kind < 0.5:
            metadata[rng.choice(list(metadata))] = rng.choice(TEXTS)
        else:
            name = rng.choice([key for key, text in metadata.items() if len(text) > 2] or list(metadata))
            metadata[name] = json.dumps(_value(json.loads(metadata[name]), rng))
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + body
    except (ValueError, struct.error, AttributeError, TypeError, UnicodeError, RecursionError):
        return _bytes(data, rng)


def _toml(data: bytes, rng: random.Random) -> bytes:
    """A config with a value, a name or bytes changed."""
    if rng.random() < 0.2:
        return _bytes(data, rng)
    lines = data.decode(errors="replace").splitlines()
    place = rng.randrange(len(lines))
    name = lines[place].partition("=")[0]
    value = rng.choice(
        ["0", "-1", "1.5", "1e400", "inf", "nan", "9" * 400, "9" * 5000, "true", '""', '"\u00b2"', "[]", "{}", "[[1]]", "[" * 3000,
         "[" * 3000 + "]" * 3000, '["to_q", 1]', "1979-05-27", '"\\u0000"', '"a\\tb"', "0x" + "f" * 3000, '"x"' , "\x00", "a.b.c"]
    )  # fmt: skip
    lines[place] = rng.choice((f"{name} = {value}", f"{name}x = {value}", f"[{name}]", "", f"{lines[place]}\n{lines[place]}"))
    return "\n".join(lines).encode()


@dataclass(frozen=True)
class Kind:
    """What is damaged: good files, how, what reads them, and the only error that reading may raise."""

    name: str
    good: list[bytes]
    damage: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], object]
    error: type[Exception]


def traces(folder: Path) -> Kind:
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

    return Kind("trace.safetensors", good, _tensors, read, TraceError)


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


def states(folder: Path) -> Kind:
    """The file as it is written, and as the version before checksums wrote it: whose damage only its form can tell."""
    task, settings, good = Tiny(), TrainSettings(2, validate_every=1), []
    train(task.adapter(), task, settings, run=RunFolder(folder / "good"))
    data = (folder / "good" / "resume.state").read_bytes()
    good.append(data)
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    inner = json.loads(header["__metadata__"]["styleinject_training"])
    header["__metadata__"] = {"styleinject_training": json.dumps({**inner, "version": 1})}
    text = json.dumps(header).encode()
    good.append(struct.pack("<Q", len(text)) + text + data[8 + size :])
    shutil.rmtree(folder / "good")

    def read(path: Path) -> object:
        run = RunFolder(path.parent)
        run.previous_state_file.unlink(missing_ok=True)  # it would be gone on from
        return train(task.adapter(), task, settings, run=run)  # nothing is left to train

    return Kind("resume.state", good, _tensors, read, CheckpointError)


def configs(_folder: Path) -> Kind:
    kinds = (TrainConfig, DreamBoothConfig, DistilConfig, ReferenceConfig)
    good = [template(kind).replace('"..."', '"x"').replace('folder = ""', 'folder = "y"').encode() for kind in kinds]

    def read(path: Path) -> object:
        found: object = None
        for kind in kinds:
            try:
                found = load_config(kind, path)
            except ConfigError as error:
                refused = error
        if found is None:
            raise refused
        return found

    return Kind("config.toml", good, _toml, read, ConfigError)


@pytest.mark.parametrize("kind", [traces, states, configs])
def test_damaged_files_are_read_or_refused_by_name(tmp_path: Path, kind: Callable[[Path], Kind]) -> None:
    files, rng = kind(tmp_path), random.Random(f"{SEED}/{kind.__name__}")
    path = tmp_path / files.name
    read = refused = 0
    for data in files.good:
        path.write_bytes(data)
        files.read(path)
    for case in range(CASES // 3):
        data = rng.choice(files.good)
        for _ in range(rng.choice((1, 1, 2, 3))):
            data = files.damage(data, rng)
        path.write_bytes(data)
        start = time.process_time()
        try:
            files.read(path)
            read += 1
        except files.error as error:
            said = str(error)
            if files.name not in said or len(said) > 5000:
                raise AssertionError(f"case {case}: {said[:3000]}") from error
            refused += 1
        except Exception as error:
            kept = Path(os.environ.get("FUZZ_KEEP", str(tmp_path))) / f"case-{SEED}-{case}-{files.name}"
            kept.write_bytes(data)
            raise AssertionError(f"case {case} of seed {SEED}: {type(error).__name__}: {str(error)[:300]}") from error
        took = time.process_time() - start
        assert took < max(AT_LEAST, SECONDS_PER_MB * len(data) / 2**20), f"case {case} took {took:.1f} s"
    print(f"{kind.__name__}: {read} read, {refused} refused")
    assert read and refused > CASES // 10, "the damage is too gentle, or too rough, to show anything"
