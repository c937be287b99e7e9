"""Writing a file whole or not at all: every file of the pack is written here, or appended to line by line."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

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


def check_writable(path: str | Path, size: int = 0) -> None:
    """See whether a file of `size` bytes could be written now, by writing as many; nothing of it stays.

    Raises:
        WriteError: the folder, the disk or the name refuses, or something else has that name.
    """
    path = Path(path)
    try:
        if path.exists():
            if not path.is_file() or not os.access(path, os.W_OK):
                raise OSError("there is something else of that name" if not path.is_file() else "the file may not be changed")
        else:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            path.unlink()
        trial = path.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            with open(trial, "xb") as file:
                _fill(file, size)
        finally:
            with suppress(OSError):
                trial.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(f"{path.name}: cannot be written to {path.parent}: {error}") from error


def _fill(file: BinaryIO, size: int) -> None:
    """Make a new file `size` bytes long, with room for them on the disk."""
    if size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    block = bytes(2**20)
    while size > 0:
        size -= file.write(block[:size])


def save_tensors(tensors: dict[str, Tensor], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whatever its suffix. Raises WriteError."""
    with replacing(path) as temporary:
        save_file(tensors, temporary, dict(metadata))
