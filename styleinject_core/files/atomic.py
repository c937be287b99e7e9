"""Writing a file whole or not at all: every file of the pack is written here, or appended to line by line."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


class WriteError(OSError):
    """A file could not be written; what was there before is as it was. The message names file, folder and reason."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new, empty file beside `path` to write to, which takes its place when the block ends well; else nothing is left of it.

    Its name cannot be foreseen and no link is followed, so that nobody who may write to the folder can choose what is
    overwritten; its mode is what the process's umask leaves of rw-rw-rw-.

    Raises:
        WriteError: the folder or the disk refuses, before the block, in it or after it.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = stat.S_IMODE(os.stat(temporary).st_mode)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())  # a name must not outlive a power failure that its content does not
            os.chmod(temporary, mode)  # safetensors writes to another file, only the owner's, and renames it to this one
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        raise WriteError(f"{path.name}: could not be written to {path.parent}: {error}") from error


def save_tensors(tensors: dict[str, Tensor], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whatever its suffix. Raises WriteError."""
    with replacing(path) as temporary:
        save_file(tensors, temporary, dict(metadata))
