"""The run folder of a DEADiff in training: what a checkpoint holds is a slim DEADiff file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...deadiff import save_deadiff
from .checkpoints import RunFolder


class ReferenceFolder(RunFolder):
    """A RunFolder whose files are DEADiff's."""

    def save_adapter(self, adapter: Any, path: Path, step: int) -> None:
        """Write the Deadiff with how it was made. Raises DeadiffFileError, WriteError."""
        save_deadiff(adapter, path, {**self.metadata, "deadiff_steps": str(step)}, self.dtype)
