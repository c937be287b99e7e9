"""The header of a safetensors file, read by ourselves and before any tensor: what is in the file, and what it says of itself.

The library's own reader keeps the last of two tensors with one key and raises errors of many kinds; here each gets the
file's name.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import AdapterFileError

_LARGEST = 100_000_000  # bytes of a header, as the safetensors library has it
_MOST_DIMENSIONS = 16
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
         "U8": 8, "U16": 16, "U32": 32, "U64": 64, "BOOL": 8, "C64": 64}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor as the header describes it: dtype in safetensors' words, shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds: its tensors by key, in the file's order, and its metadata."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a .safetensors file.

    Raises:
        AdapterFileError: no such file, another kind of file, a damaged header, a key that is there twice, a size that
            contradicts the file's.
    """
    if path.suffix.lower() != ".safetensors":
        raise AdapterFileError(f"{path.name}: only .safetensors files are read (pickled files can run code)")
    try:
        if not path.is_file():
            raise AdapterFileError(f"{path.name}: no such file in {path.parent}")
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(9)  # the header's length in 8 bytes, then its "{"
            length = int.from_bytes(start[:8], "little")
            _check_start(path, start, size, length)
            text = start[8:9] + file.read(length - 1)
    except OSError as error:
        raise AdapterFileError(f"{path.name}: cannot be read: {error.strerror or error}") from None
    table = parse_json(path, text, "header")
    if not isinstance(table, dict):
        raise _damaged(path, f"its header is a {type(table).__name__}")
    metadata = table.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its metadata is not a table of texts")
    return Header({key: _entry(path, key, value, size - 8 - length) for key, value in table.items()}, metadata)


def parse_json(path: Path, text: str | bytes, what: str) -> Any:
    """JSON from a file, without keys that are there twice.

    Args:
        path: the adapter's file, for messages.
        what: which text it is, for messages.

    Raises:
        AdapterFileError: no JSON, nested too deep, a number that cannot be one, a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            seen: set[str] = set()
            twice = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise AdapterFileError(f"{path.name}: {what}: {shortened(twice)} is in it twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except AdapterFileError:
        raise
    except RecursionError:
        raise AdapterFileError(f"{path.name}: {what}: nested too deep") from None
    except (ValueError, MemoryError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        if what == "header":
            raise _damaged(path, str(error)) from None
        raise AdapterFileError(f"{path.name}: {what}: {error}") from None


def is_known_version(text: str, newest: int) -> bool:
    """Whether a file's format version, as it stands in the header, is one up to `newest`."""
    return re.fullmatch("[0-9]{1,9}", text) is not None and int(text) <= newest


def shortened(text: str, longest: int = 200) -> str:
    """A name from a file for a message: names have been seen that are as long as the file."""
    return text if len(text) <= longest else f"{text[: longest // 2]}... ({len(text)} characters)"


def _check_start(path: Path, start: bytes, size: int, length: int) -> None:
    if size == 0:
        raise AdapterFileError(f"{path.name}: the file is empty")
    if start[8:] != b"{" and start.startswith((b"PK", b"\x80")):
        raise AdapterFileError(f"{path.name}: this is a pickled PyTorch file, whatever its name says; expected safetensors")
    if len(start) < 9 or start[8:] != b"{" or length > min(size - 8, _LARGEST):
        raise _damaged(path, f"a header of {length} bytes in a file of {size}" if len(start) == 9 else f"{size} bytes")


def _entry(path: Path, key: str, value: Any, data: int) -> Entry:
    """One tensor's entry, checked as far as later code relies on it; the library checks the offsets when it reads."""
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        sound = isinstance(dtype, str) and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound or len(shape) > _MOST_DIMENSIONS or not begin <= end <= data:
        raise _damaged(path, f"{shortened(key)} is described as {shortened(str(value))}, with {data} bytes of data")
    count = 1
    for n in shape:
        count *= n
    if dtype in _BITS and count * _BITS[dtype] != 8 * (end - begin):
        raise _damaged(path, f"{shortened(key)} of shape {shape} and dtype {dtype} has {end - begin} bytes")
    return Entry(dtype, shape)


def _damaged(path: Path, problem: str) -> AdapterFileError:
    return AdapterFileError(f"{path.name}: damaged or truncated, not a whole safetensors file ({problem})")
