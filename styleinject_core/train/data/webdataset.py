"""Training data in WebDataset shards, read as a stream: for sets that are too large to list.

A shard is a .tar file with `KEY.jpg` and `KEY.txt` (or `KEY.json`) next to each other
(https://github.com/webdataset/webdataset). It is read with Python's own tarfile: the webdataset library gives each process
shards of its own, and no position to resume from that is exact. Here every process runs through the headers of all shards
and builds the same batches out of references, so that N processes see what one would see; it reads and decodes
only the pictures of its own rows. A reference is shard and offset: the shuffle buffer costs next to no memory, and the
whole state of the stream is a list of numbers.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import re
import tarfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from .buckets import Size, bucket_sizes, check_share, nearest_bucket
from .captions import caption_in, decoded, one_line
from .images import (
    SUFFIXES,
    CorruptError,
    CorruptImages,
    DataError,
    Example,
    OnCorrupt,
    View,
    crop_of,
    decode,
    first_names,
    read_size,
)

_HEAD = 65536  # bytes of a shard that go into the content hash
_PACKED = {b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
_TOGETHER = "; the files of a sample must follow one another in the tar file, as with tar --sort=name"
_HOPELESS = 100  # broken samples at the start, or batches without one good picture, before it is the data's fault


@dataclass(frozen=True)
class _Sample:
    shard: int
    offset: int  # of its first tar header
    image: tuple[int, int]  # offset and length of the picture's bytes
    caption: str
    name: str
    size: Size
    original: Size  # (H, W), upright


@dataclass(frozen=True)
class Group:
    """Neighboring members of a tar file that have one key: the name up to its first dot."""

    tar: tarfile.TarFile
    key: str
    members: dict[str, tarfile.TarInfo]  # by suffix
    offset: int
    end: int  # where the next group begins
    links: tuple[str, ...] = ()  # suffixes of members that are links: where they lead may be another shard

    def has(self) -> str:
        """What it consists of, in words."""
        linked = f" ({', '.join(self.links)}: links, which are not followed)" if self.links else ""
        return f"{', '.join(self.members)}{linked}"


class ImageStream:
    """Batches of one bucket each, without end, from tar files.

    The order of shards is shuffled per epoch, the samples in a buffer. Samples wait in one list per bucket until
    there are enough for a batch of all processes. A sample without a usable picture and caption is passed over.
    A picture whose pixels turn out broken is stood in for by the next one of its batch.

    Args:
        shards: a folder of .tar files, a file, a glob, a brace range as in `photos-{000..127}.tar`, or several of these.
        resolution, buckets, bucket_step, bucket_ratio, center_crop, flip: as in `ImageFolder`.
        batch_size: pictures per batch and process.
        shuffle: samples in the shuffle buffer; 0 keeps the order of the shards.
        seed: of all shuffles, crops and mirrorings.
        rank, world: this process and how many there are; N processes of batch b see what one of batch N * b sees.
        on_corrupt: "skip" names broken samples and shards once, through `warn` and in `skipped`; "stop" raises.
        warn: called with one line per skipped sample.

    Raises:
        DataError: no shards, or shards of a brace range that are not there.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        resolution: int = 512,
        batch_size: int = 1,
        *,
        buckets: bool = True,
        bucket_step: int = 64,
        bucket_ratio: float = 2.0,
        shuffle: int = 1000,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        on_corrupt: OnCorrupt = "skip",
        center_crop: bool = True,
        flip: bool = False,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        check_share(batch_size, rank, world)
        if shuffle < 0:
            raise ValueError(f"shuffle: expected at least 0, found {shuffle}")
        self.shards = find_shards(shards)
        self.resolution, self.center_crop, self.flip = resolution, center_crop, flip
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self._rows = range(rank * batch_size, (rank + 1) * batch_size)
        self._whole = batch_size * world
        self._sizes = (
            bucket_sizes(resolution, bucket_step, bucket_ratio) if buckets else bucket_sizes(resolution, resolution, 1)
        )
        self._corrupt = CorruptImages(on_corrupt, warn)
        self._content = _content(self.shards)

        self.epoch = 0
        self._turn, self._offset = 0, 0  # of the next sample: which shard in the epoch's order, and where in it
        self._drawn = 0  # samples out of the shuffle buffer since the beginning
        self._buffer: list[_Sample] = []
        self._waiting: dict[Size, list[tuple[int, _Sample]]] = {size: [] for size in self._sizes}  # with the number drawn
        self._draws = self._shuffled()

    @property
    def skipped(self) -> dict[str, str]:
        """Samples and shards that could not be used so far, and why."""
        return dict(self._corrupt.names)

    def next_batch(self) -> list[Example]:
        """This process's pictures of the next batch, all of one size.

        Raises:
            DataError: a broken sample where `on_corrupt` is "stop"; no usable one at all; a shard that cannot be opened.
        """
        for _ in range(_HOPELESS):
            rows = self._next_rows()
            examples = [self._decode_row(rows, row) for row in self._rows]
            good = [example for example in examples if example is not None]
            if good:  # then all are: they stand in for one another, in other processes too
                return good
        raise DataError(f"{_HOPELESS} batches without one picture that can be decoded: {first_names(self.skipped.values())}")

    def _next_rows(self) -> list[tuple[int, _Sample]]:
        """The next batch of all processes together."""
        while True:
            sample = next(self._draws)
            waiting = self._waiting[sample.size]
            waiting.append((self._drawn, sample))
            if len(waiting) == self._whole:
                self._waiting[sample.size] = []
                return waiting

    def _decode_row(self, rows: list[tuple[int, _Sample]], row: int) -> Example | None:
        """The picture of a row, or the next that can be decoded; None if there is none in the whole batch."""
        for drawn, sample in rows[row:] + rows[:row]:
            if sample.name in self._corrupt.names:
                continue
            view = View.draw(f"{self.seed}/{drawn}", self.center_crop, self.flip)
            offset, length = sample.image
            with _open(self.shards[sample.shard]) as file:
                file.seek(offset)
                content = io.BytesIO(file.read(length))
            try:
                pixels = decode(content, sample.name, sample.size, view)
                crop = crop_of(sample.original, sample.size, view)
                return Example(pixels, sample.caption, sample.name, sample.original, crop)
            except CorruptError as error:
                self._corrupt.add(sample.name, error)
        return None

    def _shuffled(self) -> Iterator[_Sample]:
        """Samples without end, each once per epoch."""
        while True:
            for sample in self._one_epoch():
                self._buffer.append(sample)
                if len(self._buffer) > self.shuffle:
                    yield self._draw()
            while self._buffer:
                yield self._draw()
            if not self._drawn:
                reason = first_names(self.skipped.values()) or f"nothing in {first_names(shard.name for shard in self.shards)}"
                raise DataError(f"no usable sample in {len(self.shards)} shards: {reason}")
            self.epoch, self._turn, self._offset = self.epoch + 1, 0, 0

    def _draw(self) -> _Sample:
        place = random.Random(f"{self.seed}/draw/{self._drawn}").randrange(len(self._buffer))
        self._buffer[place], self._buffer[-1] = self._buffer[-1], self._buffer[place]
        sample = self._buffer.pop()
        self._drawn += 1
        return sample

    def _one_epoch(self) -> Iterator[_Sample]:
        """The usable samples that are left of this epoch, in the order of the shards."""
        order = list(range(len(self.shards)))
        if self.shuffle:
            random.Random(f"{self.seed}/shards/{self.epoch}").shuffle(order)
        while self._turn < len(order):
            shard = order[self._turn]
            try:
                for group in groups(self.shards[shard], self._offset):
                    self._offset = group.end  # before the yield: a state taken there goes on behind this sample
                    if sample := self._usable(shard, group):
                        yield sample
            except CorruptError as error:
                self._corrupt.add(self.shards[shard].name, error)
            self._turn, self._offset = self._turn + 1, 0

    def _usable(self, shard: int, group: Group) -> _Sample | None:
        try:
            return self._sample(shard, group)
        except CorruptError as error:
            self._corrupt.add(f"{self.shards[shard].name}/{group.key}", error)
        if len(self._corrupt.names) >= _HOPELESS and not (self._drawn or self._buffer):
            raise DataError(f"the first {_HOPELESS} samples are all unusable: {first_names(self.skipped.values())}")
        return None

    def _sample(self, shard: int, group: Group) -> _Sample:
        name = f"{self.shards[shard].name}/{group.key}"
        picture = next((info for suffix, info in group.members.items() if f".{suffix}" in SUFFIXES), None)
        if picture is None:
            raise CorruptError(f"{name}: no picture, only {group.has()}{_TOGETHER}")
        caption = _caption(group, name)
        width, height = read_size(member(group, picture), name)
        size = nearest_bucket(self._sizes, width, height)
        return _Sample(shard, group.offset, (picture.offset_data, picture.size), caption, name, size, (height, width))

    def _made_for(self) -> dict:
        """What a position means something for."""
        return {
            "content": self._content,
            "batch": self._whole,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "buckets": [list(size) for size in self._sizes],
        }

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch, in plain numbers and strings (JSON). The same in every process."""
        return {
            "made_for": self._made_for(),
            "epoch": self.epoch,
            "turn": self._turn,
            "offset": self._offset,
            "drawn": self._drawn,
            "buffer": [[sample.shard, sample.offset] for sample in self._buffer],
            "waiting": [[n, sample.shard, sample.offset] for row in self._waiting.values() for n, sample in row],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position. Reads the headers of the samples in the buffer again, and nothing before them.

        Raises:
            DataError: a state of other shards, seed, buckets, shuffle buffer or whole batch (batch_size * world).
        """
        for key, here in self._made_for().items():
            if (there := state["made_for"].get(key)) != here:
                raise DataError(f"cannot resume this data: {key} is {here} here, and was {there} when the state was saved")
        self.epoch, self._turn, self._offset, self._drawn = (state[key] for key in ("epoch", "turn", "offset", "drawn"))
        self._buffer = [self._sample_at(shard, offset) for shard, offset in state["buffer"]]
        self._waiting = {size: [] for size in self._sizes}
        for drawn, shard, offset in state["waiting"]:
            sample = self._sample_at(shard, offset)
            self._waiting[sample.size].append((drawn, sample))
        self._draws = self._shuffled()

    def _sample_at(self, shard: int, offset: int) -> _Sample:
        for group in groups(self.shards[shard], offset):
            return self._sample(shard, group)
        raise DataError(f"{self.shards[shard].name}: nothing at byte {offset}: the shard has changed since the state was saved")

    def summary(self) -> dict:
        """What the data is, for an adapter's metadata and to recognize it by: counts and a hash, no names.

        It does not change while the data is read. `content` is a hash over lengths and beginnings of the shards, in order.
        """
        return {
            "shards": len(self.shards),
            "bytes": sum(shard.stat().st_size for shard in self.shards),
            "resolution": self.resolution,
            "center_crop": self.center_crop,
            "flip": self.flip,
            "buckets": [f"{width}x{height}" for height, width in self._sizes],
            "content": f"sha256:{self._content}",
        }


def find_shards(shards: str | Path | Sequence[str | Path]) -> list[Path]:
    """The tar files that a folder, a file, a glob, a brace range, or several of these stand for.

    Raises:
        DataError: none, or one that is not there.
    """
    patterns = [shards] if isinstance(shards, (str, Path)) else shards
    found = list(dict.fromkeys(path for pattern in patterns for path in _expand(str(pattern))))
    if not found:
        raise DataError(f"{', '.join(map(str, patterns))}: no .tar files")
    if missing := [str(path) for path in found if not path.is_file()]:
        raise DataError(f"{len(missing)} of {len(found)} shards are not there: {first_names(missing)} (expected local files)")
    return found


def _expand(pattern: str) -> list[Path]:
    if braces := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        before, after = pattern[: braces.start()], pattern[braces.end() :]
        numbers = range(int(braces[1]), int(braces[2]) + 1)
        return [path for n in numbers for path in _expand(f"{before}{n:0{len(braces[1])}}{after}")]
    path = Path(pattern)
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    return [path] if path.is_file() or not re.search(r"[*?\[]", pattern) else [Path(name) for name in sorted(glob(pattern))]


class _Shard(io.BufferedReader):
    """An open file that gives what it has, however much is asked for: Python would make room for all of that first."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def _open(shard: Path) -> _Shard:
    try:
        return _Shard(shard)
    except OSError as error:
        raise DataError(f"{shard.name}: cannot be opened: {error.strerror}") from error


def groups(shard: Path, offset: int = 0) -> Iterator[Group]:
    """The samples of a shard from a byte offset on, which is 0 or that of a group.

    Raises:
        CorruptError: no whole tar file; after the samples before the damage.
    """
    with _open(shard) as file:
        file.seek(offset)
        damage: Exception | None = None
        key, members, links, start, end = "", dict[str, tarfile.TarInfo](), list[str](), offset, offset
        try:
            if packed := next((kind for mark, kind in _PACKED.items() if file.peek(8).startswith(mark)), ""):
                raise tarfile.ReadError(f"it is compressed ({packed}), unpack it first: shards are read at any place")
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115, it owns nothing: the file is closed above
            while info := _next(tar):
                path = PurePosixPath(info.name)
                stem, _, suffix = path.name.partition(".")
                end = tar.offset
                if not (info.isreg() or info.issym() or info.islnk()) or not stem or stem.startswith("__"):
                    continue
                if members and key != str(path.with_name(stem)):
                    yield Group(tar, key, members, start, info.offset, tuple(links))
                    members, links = {}, []
                if not info.isreg():
                    links.append(suffix)
                    continue
                if not members:
                    key, start = str(path.with_name(stem)), info.offset
                members[suffix.lower()] = info
            end = tar.offset
            file.seek(end)
            if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes a header it cannot read for the end
                raise tarfile.ReadError("no header where one belongs")
        except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
            damage = error
        if members:
            yield Group(tar, key, members, start, end, tuple(links))
        if damage is not None:
            raise CorruptError(f"{shard.name}: not a whole, uncompressed tar file: {damage}") from damage


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next member; headers with sizes that cannot be would be read again and again. Raises what tarfile does."""
    try:
        info = tar.next()
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place that is too far for a file
            raise
        raise tarfile.ReadError("a size that cannot be") from error
    tar.members = []  # type: ignore[attr-defined]  # it would keep every header it has seen
    if info is not None and (info.size < 0 or tar.offset <= info.offset):
        raise tarfile.ReadError(f"{info.name[:100]} has a size of {info.size} bytes")
    if info is not None and info.issparse():  # of a few bytes on disk tarfile would make as many zeros as it is told
        raise tarfile.ReadError(f"{info.name[:100]} is a sparse file; expected one that is stored as it is")
    return info


def member(group: Group, info: tarfile.TarInfo) -> BinaryIO:
    """The bytes of one of its members. Raises what tarfile does."""
    file = group.tar.extractfile(info)
    assert file is not None  # only regular files are in a group
    return file  # type: ignore[return-value]  # as good as one


def _caption(group: Group, name: str) -> str:
    try:
        if info := group.members.get("txt"):
            return one_line(decoded(member(group, info).read()))
        if info := group.members.get("json"):
            return caption_in(json.loads(decoded(member(group, info).read())))
    except (ValueError, OverflowError, RecursionError, tarfile.TarError, OSError) as error:  # bad UTF-8 and bad JSON too
        raise CorruptError(f"{name}: caption: {error}") from error
    raise CorruptError(f"{name}: no caption (.txt or .json), only {group.has()}{_TOGETHER}")


def _content(shards: list[Path]) -> str:
    content = hashlib.sha256()
    for shard in shards:
        with _open(shard) as file:
            content.update(f"{shard.stat().st_size}\0".encode() + file.read(_HEAD))
    return content.hexdigest()
