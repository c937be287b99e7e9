"""What encoders made of pictures and captions: as much as fits in memory, the rest on disk."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from ...files.checked import load_checked, save_checked

MEMORY = 2**30  # bytes

Tensors = dict[str, Tensor]


class Kept:
    """Tensors by what they depend on. The oldest in memory go to disk when there are more than fit, and are made again where
    there is no disk for them, or where it gives back something else. A file is named by a hash of all that its content depends
    on: what has changed is not found.

    Args:
        folder: created when it is needed; None for memory alone.
        identity: of the encoders; another one finds nothing.
        memory: bytes kept in memory.
        problem: told once that the disk refuses.
    """

    def __init__(
        self,
        folder: Path | None = None,
        identity: str = "",
        memory: int = MEMORY,
        problem: Callable[[str], None] = lambda _: None,
    ):
        self.folder, self.identity, self.memory, self._problem = folder, identity, memory, problem
        self._there: OrderedDict[str, Tensors] = OrderedDict()
        self._size = 0
        self._refused = False
        self._whole: set[str] = set()  # keys whose files are as they should be

    def get(self, key: str, make: Callable[[], Tensors]) -> Tensors:
        """What is kept under a key; made where it is not."""
        if key in self._there:
            self._there.move_to_end(key)
            return self._there[key]
        value = self._load(key)
        if value is None:
            value = make()
        self._there[key] = value
        self._size += size_of(value)
        while self._size > self.memory and len(self._there) > 1:
            oldest, tensors = self._there.popitem(last=False)
            self._size -= size_of(tensors)
            self._store(oldest, tensors)
        return value

    def _path(self, key: str) -> Path | None:
        name = hashlib.blake2b(f"{self.identity}\0{key}".encode(errors="surrogatepass"), digest_size=16).hexdigest()
        return None if self.folder is None else self.folder / f"{name}.kept"

    def _load(self, key: str) -> Tensors | None:
        path = self._path(key)
        found = None if path is None else load_checked(path)
        if found is not None:
            self._whole.add(key)
        return found

    def _store(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        path = self._path(key)
        if path is None or self._refused or (key in self._whole and path.is_file()):
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_checked(tensors, path)
            self._whole.add(key)
        except OSError as error:
            self._refused = True
            self._problem(f"encoded images are not kept on disk, and will be encoded again: {error}")


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
