"""A training run on disk: the adapter at every checkpoint, and one state file from which the run goes on exactly.

Everything is safetensors and JSON. Each file is written under another name and renamed, so that whatever is there loads.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from ...adapter import Adapter
from ...files import save_adapter
from ...files.atomic import check_writable, replacing
from ...files.checked import CHECKSUM, DAMAGE, checksum, read

# 1 had no checksum, and knew less about model and data; 2 and 3 knew models, encoders and images by other hashes
STATE_VERSION = 4
_HEADER = "styleinject_training"
_TENSOR = "tensor"


class CheckpointError(ValueError):
    """A state that cannot be resumed: damaged, or of a run with another plan. The message names file and fields."""


@dataclass
class TrainState:
    """Where a run stands after `step` optimizer steps.

    Args:
        plan: what decides which adapter comes out (settings, adapter config, objective, data); a resumed run must have
            the same one. Nested dicts of JSON values.
        parts: nested dicts and lists of numbers, strings and tensors: parameters, optimizer, data position.
    """

    step: int
    plan: dict[str, Any]
    parts: dict[str, Any] = field(default_factory=dict)
    version: int = STATE_VERSION


class RunFolder:
    """The folder of one training run. A folder that is deleted meanwhile is made again by the next thing written.

    resume.state, the newest state (safetensors inside, but no file that a list of adapters would show), and the one before
    it, resume.previous.state; step-001000.safetensors, the adapters on the way; best.safetensors; loss.jsonl, one line per
    step; pictures in samples/.

    Args:
        path: created where it is missing; its parent must exist.
        metadata: entries for the header of every adapter file.
        dtype: what adapter files are stored in.
        name: of the final adapter's file, without suffix; empty for the folder's own.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, str] | None = None,
        dtype: torch.dtype = torch.float16,
        name: str = "",
    ):
        self.path, self.metadata, self.dtype, self._name = Path(path), dict(metadata or {}), dtype, name
        self._lines: list[str] = []  # of the loss file, as far as this run knows them
        self._newest_is_damaged = False
        self.path.mkdir(exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other programs out while a run trains here; the lock ends with the process, however it ends.

        Raises:
            CheckpointError: another run trains in this folder.
        """
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            if _is_locked(lock.lock_file):
                raise CheckpointError(
                    f"{self.path.name}: another run is training in this folder; give this one another"
                ) from None
        except (OSError, NotImplementedError):  # a file system without locks
            pass
        try:
            yield
        finally:
            lock.release()

    @property
    def is_busy(self) -> bool:
        """Whether a run trains here at the moment."""
        try:
            with self.locked():
                return False
        except CheckpointError:
            return True

    @property
    def state_file(self) -> Path:
        return self.path / "resume.state"

    @property
    def previous_state_file(self) -> Path:
        return self.path / "resume.previous.state"

    @property
    def has_state(self) -> bool:
        """Whether there is a state to go on from, damaged or not."""
        return self.state_file.exists() or self.previous_state_file.exists()

    @property
    def loss_file(self) -> Path:
        return self.path / "loss.jsonl"

    @property
    def final_file(self) -> Path:
        return self.path / f"{self._name or self.path.name}.safetensors"

    def adapter_file(self, step: int) -> Path:
        return self.path / f"step-{step:06}.safetensors"

    @property
    def best_file(self) -> Path:
        return self.path / "best.safetensors"

    @property
    def samples(self) -> Path:
        """The folder of validation pictures, which is made where it is missing."""
        folder = self.path / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def try_writing(self, size: int, step: int) -> None:
        """Write once what a run has to write, and take it away again: before hours of training, not after.

        Args:
            size: bytes of a checkpoint, all its files together.
            step: one of which a checkpoint will be written.

        Raises:
            WriteError: the folder, the disk or the name of one of the files refuses.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        check_writable(self.state_file, size)
        for path in (self.previous_state_file, self.loss_file, self.adapter_file(step), self.best_file, self.final_file):
            check_writable(path)

    def at(self, path: Path) -> RunFolder:
        """The same run in another place, which is created."""
        other = copy(self)
        other.path, other._name = path, self.final_file.stem
        other.path.mkdir(parents=True, exist_ok=True)
        return other

    def save_adapter(self, adapter: Adapter, path: Path, step: int) -> None:
        """Write the adapter with how it was made. Raises AdapterFileError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_adapter(adapter, path, {**self.metadata, "styleinject.steps": str(step)}, self.dtype)

    def save_state(self, state: TrainState) -> None:
        """Replace the state file, and keep the one there was. Raises WriteError where the disk refuses; both stay."""
        self.path.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        header = {"version": STATE_VERSION, "step": state.step, "plan": state.plan, "parts": _pack(state.parts, tensors)}
        text = json.dumps(header)
        with replacing(self.state_file) as temporary:
            save_file(tensors, temporary, {_HEADER: text, CHECKSUM: checksum(tensors, text)})
            if self.state_file.exists() and not self._newest_is_damaged:
                os.replace(self.state_file, self.previous_state_file)
        self._newest_is_damaged = False

    def chosen_before(self) -> dict[str, Any]:
        """What a memory choice may choose, as this run has it: fields of its settings and of its adapter's config."""
        for path in filter(Path.is_file, (self.state_file, self.previous_state_file)):
            with suppress(_DamagedError, CheckpointError, KeyError, TypeError):  # load_state says what is wrong with it
                plan = _read_state(path).plan
                values = {**plan["settings"], **plan["adapter"]}
                names = ("batch_size", "accumulation", "optimizer", "r", "n_styles")
                return {name: values[name] for name in names if name in values}
        return {}

    def load_state(
        self, plan: Mapping[str, Any], steps: int, problem: Callable[[str], None] = lambda _: None
    ) -> TrainState | None:
        """The newest state that is whole, or None where the run has none.

        Args:
            plan, steps: of the run that wants to go on from it.
            problem: told that the newest is damaged, and the one before it is taken.

        Raises:
            CheckpointError: both damaged, a newer version, the state of a run with another plan, or of a later step.
        """
        errors, state = [], None
        for path in (self.state_file, self.previous_state_file):
            if not path.exists():
                continue
            try:
                state = _read_state(path)
                break
            except _DamagedError as error:
                errors.append(str(error))
                self._newest_is_damaged = True
        if state is None:
            if errors:
                raise CheckpointError(f"{'; '.join(errors)}: delete what is damaged to start anew")
            return None
        name = f"{self.path.name}/{path.name}"
        if errors:
            problem(f"{errors[0]}; going on from {path.name}, at step {state.step}")
        with suppress(KeyError, AttributeError):  # version 0.1.0 did not say the method: other fields tell it
            state.plan["adapter"].setdefault("method", plan["adapter"]["method"])
        if state.version < STATE_VERSION:
            _take_hashes(state.plan, plan)
        if different := _differences(state.plan, plan, known_alone=state.version < STATE_VERSION):
            lines = "\n".join(f"  {field[:99]}: was {str(was)[:200]}, is {str(now)[:200]}" for field, was, now in different[:8])
            raise CheckpointError(
                f"{name} is at step {state.step} of another run; it differs in\n{lines}\n"
                "Set these back to go on with it, or start anew under another name (in a config: another output.folder)."
            )
        if state.step > steps:
            raise CheckpointError(
                f"{name} is at step {state.step} already, and {steps} steps are asked for. Ask for more to go on with it, use "
                "one of the adapters of earlier steps beside it, or start anew under another name (in a config: another "
                "output.folder)."
            )
        return state

    def history(self, until: int | None = None) -> list[dict[str, Any]]:
        """The lines of the loss file. With `until`, later ones are cut off the file: the run goes on from there.

        Raises:
            WriteError: the file cannot be cut.
        """
        lines, there = [], ""
        if self.loss_file.is_file():
            there = self.loss_file.read_text(encoding="utf-8", errors="replace")
            for text in there.splitlines():
                try:
                    line = json.loads(text)
                    values = [line["loss"], line.get("validation", 0.0)]
                    if type(line["step"]) is int and all(type(v) in (int, float) for v in values):
                        lines.append({**line, **{key: float(line[key]) for key in ("loss", "validation") if key in line}})
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
                    continue  # the last one of a killed process, or damaged
        if until is not None:
            lines = [line for line in lines if line["step"] <= until]
            self._lines = [json.dumps(line) + "\n" for line in lines]
            if there != "".join(self._lines):
                self.write_lines()
        return lines

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line to the loss file; where it is gone, the lines before it too. Raises OSError."""
        self._lines.append(json.dumps(line) + "\n")
        self.path.mkdir(parents=True, exist_ok=True)
        if len(self._lines) > 1 and not self.loss_file.exists():
            self.write_lines()
            return
        with self.loss_file.open("a", encoding="utf-8") as file:
            file.write(self._lines[-1])

    def write_lines(self) -> None:
        """Write the loss file from what this run knows of it. Raises OSError."""
        with replacing(self.loss_file) as temporary:
            temporary.write_text("".join(self._lines), encoding="utf-8")


def validations(lines: Iterable[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(step, validation loss) of the lines of a loss file that have one."""
    return [(line["step"], line["validation"]) for line in lines if "validation" in line]


def _is_locked(path: str) -> bool:
    """Whether a lock that could not be had is held: older filelocks cannot tell that from a file system without locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)
    return False


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A nested structure as JSON, its tensors moved to `tensors`. Dicts become lists of pairs: their keys may be numbers."""
    if isinstance(value, Tensor):
        key = f"{_TENSOR}.{len(tensors)}"
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: key}
    if isinstance(value, Mapping):
        return {"pairs": [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_pack(item, tensors) for item in value]}
    return value


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if "list" in value:
        return [_unpack(item, tensors) for item in value["list"]]
    return {key: _unpack(item, tensors) for key, item in value["pairs"]}


class _DamagedError(ValueError):
    """A state file that cannot be read, or is not what was written."""


def _read_state(path: Path) -> TrainState:
    """The state in a file. Raises CheckpointError: a newer version; _DamagedError: not as it was written."""
    name = f"{path.parent.name}/{path.name}"
    try:
        metadata, tensors = read(path)
        header = json.loads(metadata[_HEADER])
        version, step = header["version"], header["step"]
        if type(version) is int and version > STATE_VERSION:
            raise CheckpointError(f"{name}: version {version}, this version reads up to {STATE_VERSION}")
        if version != 1 and metadata.get(CHECKSUM) != checksum(tensors, metadata[_HEADER]):
            raise ValueError("its checksum does not match")
        if type(step) is not int or step < 0 or not isinstance(header["plan"], dict):
            raise ValueError("no step, or no plan")
        parts = _unpack(header["parts"], tensors)
        if not isinstance(parts, dict):
            raise ValueError("no parts")
        return TrainState(step, header["plan"], parts, version)
    except CheckpointError:
        raise
    except (*DAMAGE, RecursionError) as error:
        raise _DamagedError(f"{name}: damaged, or not a training state ({str(error)[:300]})") from error


def _take_hashes(was: dict[str, Any], now: Mapping[str, Any]) -> None:
    """Let a plan of an older version have today's hashes where its own were of less: of the ends of images, of models without
    their configs and tokenizers, and before version 3 of the first values of weights."""
    for key in ("data", "prior", "validation"):
        folders = was.get(key), now.get(key)
        if all(isinstance(folder, Mapping) and "images" in folder and "content" in folder for folder in folders):
            was[key] = {**was[key], "content": now[key]["content"]}
    for key in ("sampling", "teacher_sampling"):
        if isinstance(was.get(key), dict) and "encoders" in was[key]:
            was[key] = {**was[key], "encoders": now.get(key, {}).get("encoders")}
    for key in ("model", "teacher"):
        if key in was and key in now:
            was[key] = now[key]


def _differences(was: Any, now: Any, where: str = "", known_alone: bool = False) -> list[tuple[str, Any, Any]]:
    """(field, was, is) of all that differs between two nested dicts; with `known_alone`, of the fields that `was` has."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        return [
            difference
            for key in dict.fromkeys([*was, *([] if known_alone else now)])
            for difference in _differences(was.get(key), now.get(key), f"{where}.{key}".lstrip("."), known_alone)
        ]
    was, now = (list(v) if isinstance(v, tuple) else v for v in (was, now))
    return [] if was == now else [(where, was, now)]
