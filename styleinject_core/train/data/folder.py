"""Training data: a folder of pictures with captions, or (webdataset.py) a stream of shards."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Literal

from .buckets import Size, bucket_sizes, nearest_bucket
from .captions import TEXTS, folder_captions, one_line
from .images import (
    OTHER_SUFFIXES,
    SUFFIXES,
    CorruptError,
    CorruptImages,
    DataError,
    Example,
    OnCorrupt,
    View,
    crop_of,
    cut_off,
    decode,
    first_names,
    is_picture,
    read_size,
)

NOT_READ = "{}: a file of this kind is not read: save it as PNG or JPEG"
_MUCH = 0.25  # of a picture, which a user should know to be cut off
# What lies beside images and is none of them, whatever its first bytes are.
_TEXTS = (*TEXTS, ".json", ".jsonl", ".csv", ".md", ".npz", ".safetensors", ".toml", ".yaml", ".yml", ".ini", ".db", ".log")


@dataclass(frozen=True)
class _Entry:
    name: str  # relative to the folder
    caption: str
    size: Size
    original: Size  # (H, W), upright
    content: str  # a hash of the file

    @property
    def enlarged(self) -> bool:
        """Smaller than its bucket."""
        return self.original[0] < self.size[0] or self.original[1] < self.size[1]


class ImageFolder:
    """Pictures in a folder and below it, with captions from `metadata.jsonl` or from `NAME.txt` beside `NAME.png`.

    `metadata.jsonl` has one object per line, `{"file_name": "a.png", "text": "a red apple"}`, the name relative to the
    file's own folder (Hugging Face's imagefolder); `metadata.csv` has the same as columns. Where there is one, captions come
    from such files alone. Names that begin with a dot are passed over; pictures are known by their names, or by their first
    bytes; other files are named. The order is that of the names, the same on every system.

    Args:
        folder: where the pictures are.
        resolution: side of the square bucket in pixels. The caller sees to it that the model can take it and `bucket_step`.
        buckets: False cuts every picture to the square.
        bucket_step, bucket_ratio: see `bucket_sizes`.
        on_corrupt: what to do about a picture that cannot be decoded: "skip" names it once through `warn` and in
            `skipped`, "stop" raises. Headers are read now, pixels only later: a picture found broken then is stood in
            for by the next one of its bucket.
        caption: one caption for all pictures; caption files are not looked at.
        center_crop: False places the crop anew each time a picture is read.
        flip: mirror half of the readings.
        seed: of crops and mirrorings.
        warn: called with one line per skipped picture.

    Raises:
        DataError: no such folder, no pictures, pictures without captions, captions without pictures, a caption file
            that cannot be read, or (where `on_corrupt` is "stop") a picture that cannot.
        ValueError: see `bucket_sizes`.
    """

    def __init__(
        self,
        folder: str | Path,
        resolution: int = 512,
        *,
        buckets: bool = True,
        bucket_step: int = 64,
        bucket_ratio: float = 2.0,
        on_corrupt: OnCorrupt = "skip",
        caption: str | None = None,
        center_crop: bool = True,
        flip: bool = False,
        seed: int = 0,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.root = Path(folder)
        self.resolution, self.center_crop, self.flip, self.seed = resolution, center_crop, flip, seed
        self._corrupt = CorruptImages(on_corrupt, warn)
        sizes = bucket_sizes(resolution, bucket_step, bucket_ratio) if buckets else bucket_sizes(resolution, resolution, 1)
        names, other_files, unreadable = _pictures_and_others(self.root)
        for name in unreadable:
            self._corrupt.add(name, CorruptError(NOT_READ.format(name)))
        if caption is None:
            self._captions_from, captions = folder_captions(self.root, names, other_files, unreadable)
        else:
            self._captions_from, captions = "one for all", dict.fromkeys(names, one_line(caption))
        self._no_images = [name for name in other_files if kind_of(self.root / name) == "other"]
        content = hashlib.sha256()
        self._entries: list[_Entry] = []
        for name in names:
            try:
                with self._open(name) as file:
                    width, height = read_size(file, name)
                    hashed = _hash_of(file)
            except CorruptError as error:
                self._corrupt.add(name, error)
                continue
            content.update(f"{captions[name]}\0{hashed}\0".encode())
            size = nearest_bucket(sizes, width, height)
            self._entries.append(_Entry(name, captions[name], size, (height, width), hashed))
        self._content, self._left_out = content.hexdigest(), len(self._corrupt.names)
        if not self._entries:
            raise DataError(
                f"{folder}: none of the {len(self._corrupt.names)} images can be read: "
                f"{first_names(self._corrupt.names.values())}"
            )

    def _open(self, name: str) -> BinaryIO:
        try:
            return (self.root / name).open("rb")
        except OSError as error:  # a folder that is gone is no broken picture: never skipped
            raise DataError(f"{name}: cannot be opened: {error.strerror}") from error

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, index: int) -> str:
        """The file's name relative to the folder."""
        return self._entries[index].name

    def size(self, index: int) -> Size:
        """(H, W) of an example: its bucket."""
        return self._entries[index].size

    @property
    def sizes(self) -> list[Size]:
        """(H, W) of every example, for `BatchOrder`."""
        return [entry.size for entry in self._entries]

    @property
    def skipped(self) -> dict[str, str]:
        """Pictures that could not be decoded so far, and why."""
        return dict(self._corrupt.names)

    @cached_property
    def captions(self) -> list[str]:
        """Of every example."""
        return [entry.caption for entry in self._entries]

    def stamp(self, index: int) -> str:
        """What the pixels of an example depend on, where its crop does not change: the file's content, not its name or date."""
        return f"{self._entries[index].content} {self.size(index)}"

    @property
    def advice(self) -> str:
        """What the user should know about the pictures before training on them; empty where there is nothing."""
        said = []
        if self._left_out:
            said.append(f"{self._left_out} of {self._left_out + len(self)} images are left out, see above")
        if self._no_images:
            names = first_names(self._no_images)
            said.append(f"{len(self._no_images)} other files are not known as images, and are left alone ({names})")
        if empty := [entry.name for entry in self._entries if not entry.caption]:
            said.append(f"{len(empty)} of {len(self)} captions are empty ({first_names(empty)})")
        cut = {entry.name: cut_off(entry.original, entry.size) for entry in self._entries}
        if much := sorted((name for name in cut if cut[name] > _MUCH), key=lambda name: -cut[name]):
            said.append(
                f"{len(much)} of {len(self)} images lose more than {_MUCH:.0%} of themselves to be cut to their size (most: "
                f"{much[0]}, {cut[much[0]]:.0%})"
            )
        return "; ".join(said)

    def __getitem__(self, index: int) -> Example:
        return self.read(index)

    def read(self, index: int, step: int = 0, among: Container[int] | None = None) -> Example:
        """Decode an example.

        Args:
            step: the training step it is read for; crop and mirroring depend on it, and on nothing that went before.
            among: which others may stand in for it where it is broken; None allows all.

        Raises:
            DataError: it cannot be decoded and `on_corrupt` is "stop", or no other of its bucket can be either.
        """
        view = View.draw(f"{self.seed}/{index}/{step}", self.center_crop, self.flip)
        for entry in self._candidates(index, among):
            if entry.name in self._corrupt.names:
                continue
            try:
                with self._open(entry.name) as file:
                    pixels = decode(file, entry.name, entry.size, view)
                crop = crop_of(entry.original, entry.size, view)
                return Example(pixels, entry.caption, entry.name, entry.original, crop)
            except CorruptError as error:
                self._corrupt.add(entry.name, error)
        height, width = self.size(index)
        raise DataError(f"none of the {width}x{height} images can be decoded: {first_names(self._corrupt.names.values())}")

    def _candidates(self, index: int, among: Container[int] | None) -> Iterator[_Entry]:
        """The example itself, then those that stand in for it."""
        first = self._entries[index]
        yield first
        for offset in range(1, len(self)):
            other = (index + offset) % len(self)
            entry = self._entries[other]
            if entry.size == first.size and (among is None or other in among):
                yield entry

    def summary(self) -> dict:
        """What the data is, for an adapter's metadata and to recognize it by: counts and a hash, no names.

        It does not change while the data is read. `skipped` counts pictures left out for their headers, `enlarged` those
        smaller than their bucket, `buckets` all by "width x height". `content` is a hash over captions and files in order,
        whole: the same on any machine, another for other data.
        """
        counts = Counter(self.sizes)
        return {
            "images": len(self),
            "skipped": self._left_out,
            "captions": self._captions_from,
            "resolution": self.resolution,
            "center_crop": self.center_crop,
            "flip": self.flip,
            "buckets": {f"{width}x{height}": counts[height, width] for height, width in sorted(counts)},
            "enlarged": sum(entry.enlarged for entry in self._entries),
            "content": f"sha256:{self._content}",
        }


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each folder from `root` down, with the names of its files, sorted; linked folders are followed, each once, and names that
    begin with a dot are passed over."""
    been: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in been:
            folders[:] = []
            continue
        been.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(folder), sorted(name for name in files if not name.startswith("."))


def _pictures_and_others(root: Path) -> tuple[list[str], list[str], list[str]]:
    """Names of pictures, of all other files, and of pictures of kinds that are not read, relative to the folder, with forward
    slashes, sorted. Linked folders are followed, each once."""
    if not root.is_dir():
        raise DataError(f"{root}: expected a folder, found {'a file' if root.exists() else 'nothing'}")
    pictures: list[str] = []
    other_files: list[str] = []
    unreadable: list[str] = []
    for folder, files in walk(root):
        for file in files:
            name = (folder / file).relative_to(root).as_posix()
            kind = kind_of(root / name)
            (pictures if kind == "picture" else unreadable if kind == "unreadable" else other_files).append(name)
    if not pictures and not unreadable:
        found = f"; there are {first_names(sorted(other_files))}" if other_files else ""
        raise DataError(f"{root}: no images; looked for {', '.join(SUFFIXES)}, in subfolders too{found}")
    return sorted(pictures), sorted(other_files), sorted(unreadable)


def _hash_of(file: BinaryIO) -> str:
    """Of all its bytes: what is edited in the middle of an uncompressed picture changes neither its size nor its ends."""
    digest = hashlib.sha256()  # most processors have instructions for it
    file.seek(0)
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def kind_of(path: Path) -> Literal["picture", "unreadable", "text", "other"]:
    """What a file is, by its name, or where that says nothing by its first bytes; "text" is what lies beside pictures."""
    name = path.name.lower()
    if name.endswith(SUFFIXES):
        return "picture"
    if name.endswith(OTHER_SUFFIXES):
        return "unreadable"
    if name.endswith(_TEXTS):
        return "text"
    try:
        with path.open("rb") as file:
            return "picture" if is_picture(file.read(32)) else "other"
    except OSError:
        return "other"
