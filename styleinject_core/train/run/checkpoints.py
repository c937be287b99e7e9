"""A training run on disk: the adapter at every checkpoint, and one state file from which the run goes on exactly.

Everything is safetensors and JSON. Each file is written under another name and renamed, so that whatever is there loads.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...adapter import Adapter
from ...files import save_adapter
from ...files.atomic import replacing, save_tensors

STATE_VERSION = 1
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


class RunFolder:
    """The folder of one training run.

    resume.state, the newest state (safetensors inside, but no file that a list of adapters would show);
    step-001000.safetensors, the adapters on the way; best.safetensors; loss.jsonl, one line per step; pictures in samples/.

    Args:
        path: created where it is missing; its parent must exist.
        metadata: entries for the header of every adapter file.
        dtype: what adapter files are stored in.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str] | None = None, dtype: torch.dtype = torch.float16):
        self.path, self.metadata, self.dtype = Path(path), dict(metadata or {}), dtype
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
    def loss_file(self) -> Path:
        return self.path / "loss.jsonl"

    def adapter_file(self, step: int) -> Path:
        return self.path / f"step-{step:06}.safetensors"

    @property
    def best_file(self) -> Path:
        return self.path / "best.safetensors"

    def save_adapter(self, adapter: Adapter, path: Path, step: int) -> None:
        """Write the adapter with how it was made. Raises AdapterFileError."""
        save_adapter(adapter, path, {**self.metadata, "styleinject.steps": str(step)}, self.dtype)

    def save_state(self, state: TrainState) -> None:
        """Replace the state file. Raises WriteError where the disk refuses; the former one stays."""
        tensors: dict[str, Tensor] = {}
        header = {"version": STATE_VERSION, "step": state.step, "plan": state.plan, "parts": _pack(state.parts, tensors)}
        save_tensors(tensors, self.state_file, {"styleinject_training": json.dumps(header)})

    def chosen_before(self) -> dict[str, Any]:
        """What a memory choice may choose, as this run has it: fields of its settings and of its adapter's config."""
        try:
            with safe_open(self.state_file, framework="pt") as file:
                plan = json.loads((file.metadata() or {})["styleinject_training"])["plan"]
            values = {**plan["settings"], **plan["adapter"]}
            return {
                name: values[name] for name in ("batch_size", "accumulation", "optimizer", "r", "n_styles") if name in values
            }
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError):
            return {}  # load_state says what is wrong with it

    def load_state(self, plan: Mapping[str, Any], steps: int) -> TrainState | None:
        """The newest state, or None where the run has none.

        Args:
            plan, steps: of the run that wants to go on from it.

        Raises:
            CheckpointError: a damaged file, a newer version, the state of a run with another plan, or of a later step.
        """
        name = f"{self.path.name}/{self.state_file.name}"
        if not self.state_file.exists():
            return None
        try:
            with safe_open(self.state_file, framework="pt") as file:
                header = json.loads((file.metadata() or {})["styleinject_training"])
                if header["version"] > STATE_VERSION:
                    raise CheckpointError(f"{name}: version {header['version']}, this version reads up to {STATE_VERSION}")
                state = TrainState(header["step"], header["plan"], _unpack(header["parts"], file))
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{name}: damaged, or no training state ({error}): delete it to start anew") from None
        with suppress(KeyError, AttributeError):  # version 0.1.0 did not say the method: other fields tell it
            state.plan["adapter"].setdefault("method", plan["adapter"]["method"])
        if different := _differences(state.plan, plan):
            lines = "\n".join(f"  {field}: was {was}, is {now}" for field, was, now in different[:8])
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
        """The lines of the loss file. With `until`, later ones are cut off the file: the run goes on from there."""
        if not self.loss_file.exists():
            return []
        lines = []
        for line in self.loss_file.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:  # the last one of a killed process
                continue
        if until is not None:
            lines = [line for line in lines if line["step"] <= until]
            with replacing(self.loss_file) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return lines

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line to the loss file."""
        with self.loss_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


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


def _unpack(value: Any, file: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return file.get_tensor(value[_TENSOR]).clone()  # not mapped to the file, which is replaced while they live
    if "list" in value:
        return [_unpack(item, file) for item in value["list"]]
    return {key: _unpack(item, file) for key, item in value["pairs"]}


def _differences(was: Any, now: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """(field, was, is) of everything that differs between two nested dicts."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        return [
            difference
            for key in dict.fromkeys([*was, *now])
            for difference in _differences(was.get(key), now.get(key), f"{where}.{key}".lstrip("."))
        ]
    was, now = (list(v) if isinstance(v, tuple) else v for v in (was, now))
    return [] if was == now else [(where, was, now)]
