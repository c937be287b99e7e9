"""Saving a run while it trains: what its folder refuses is said, tried again, and at last kept elsewhere."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...files import AdapterFileError
from ..parallel import Processes
from .checkpoints import RunFolder

_REFUSED = 2  # checkpoints in a row, after which a run stops while what it has reached can be kept


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, why, and what is on disk."""


class CheckpointsRefusedError(TrainingError):
    """The run's folder has refused several checkpoints in a row; the message says where the last state is instead."""


class Saver:
    """What of a run is on disk.

    Args:
        run: None writes nothing.
        write: a checkpoint of the step reached into a folder. Raises AdapterFileError, OSError.
        problem: told what the disk refuses.
    """

    def __init__(
        self, run: RunFolder | None, write: Callable[[RunFolder], None], problem: Callable[[str], None], processes: Processes
    ):
        self.run, self._write, self._problem, self._processes = run, write, problem, processes
        self.saved_at = 0  # the step of the newest checkpoint
        self._refused = 0  # checkpoints in a row
        self._complained = False  # that the loss file cannot be written

    def save(self, step: int) -> None:
        """A checkpoint of the step reached. What the disk refuses is reported, and training goes on: it may be mended."""
        if self.run is None or self.saved_at == step:
            return
        self._note_deleted(self.run)
        self._refused += 1
        with self.surviving(f"checkpoint of step {step}"):
            self._write(self.run)
            self.saved_at, self._refused = step, 0

    def save_at_last(self, step: int) -> None:
        """The checkpoint that no other follows; what the folder refuses is kept elsewhere."""
        self.save(step)
        if self._refused:
            self._problem(self._saved_elsewhere(step))

    def stop_if_refused(self, step: int) -> None:
        """Raises CheckpointsRefusedError, in all processes."""
        if self._processes.any(self._refused >= _REFUSED):
            raise CheckpointsRefusedError(
                f"{self._refused} checkpoints in a row could not be written, so training stopped at step {step}. "
                f"{self._saved_elsewhere(step)}"
            )

    def append(self, line: Mapping[str, Any]) -> None:
        """A line for the loss file. That it cannot be written is said once: checkpoints say it again."""
        if self.run is None:
            return
        self._note_deleted(self.run)
        try:
            self.run.append(line)
        except OSError as error:
            if not self._complained:
                self._complained = True
                self._problem(f"loss of step {line['step']}: {error}")

    @contextmanager
    def surviving(self, what: str) -> Iterator[None]:
        """Report what the disk refuses instead of raising it."""
        try:
            yield
        except (AdapterFileError, OSError) as error:
            self._problem(f"{what}: {error}")

    def on_disk(self) -> str:
        """What there is to go on from, in words."""
        if self.run is None:
            return "The adapter is as it was after the last good step"
        if not self.run.has_state:
            return "No checkpoint had been written yet"
        where = f"The last checkpoint is step {self.saved_at}, in {self.run.path.name}"
        return f"{where}; a run with another rate is a new one, in a folder of its own"

    def _saved_elsewhere(self, step: int) -> str:
        """Save what the run's folder refuses in the system's folder for temporary files; says what became of it."""
        if self.run is None:
            return ""
        at = f"the last one in {self.run.path.name} is step {self.saved_at}" if self.saved_at else "none is on disk"
        try:
            other = self.run.at(Path(tempfile.mkdtemp(prefix=f"styleinject-{self.run.path.name}-")))
            self._write(other)
            other.write_lines()
        except (AdapterFileError, OSError) as error:
            return f"Nothing could be saved elsewhere either ({error}); {at}"
        return (
            f"Step {step} is saved in {other.path}: once {self.run.path} can be written to again, move these files there, and "
            "the same run goes on from them"
        )

    def _note_deleted(self, run: RunFolder) -> None:
        if not run.path.exists():
            self._problem(f"the run's folder {run.path} is gone, deleted or renamed, with all that was in it; it is made again")
