"""Pictures of which it is known in which style they are and what they show: from folders, or from WebDataset shards.

root/
  watercolor/           one folder a style; its name is the style's words, or what style.txt in it says
    red_apple.png       the same name in two folders is the same subject; "_" and "-" are spaces in its prompt,
    red_apple.txt       unless a text beside it says it in other words

A shard is such a folder in a .tar file, or any .tar file in which a picture's KEY.json says {"style": ..., "subject": ...},
and if it wants to, their prompts as "style_prompt" and "subject_prompt".
"""

from __future__ import annotations

import io
import json
import tarfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from .captions import decoded, one_line
from .folder import NOT_READ, kind_of
from .images import SUFFIXES, DataError
from .webdataset import Group, find_shards, groups, member

_STYLE = "style"  # the file of a style's folder that has its words


@dataclass(frozen=True)
class Picture:
    """One picture, by its labels and prompts.

    Args:
        path: of its file, or of the shard it is in.
        within: offset and length of its bytes in a shard; None for a file of its own.
        name: for people.
        style, subject: labels; pictures that share one are pairs.
        style_prompt, subject_prompt: what they are called in a prompt.
    """

    path: Path
    within: tuple[int, int] | None
    name: str
    style: str
    subject: str
    style_prompt: str
    subject_prompt: str

    def open(self) -> BinaryIO:
        """Its encoded bytes. Raises DataError: the file cannot be read."""
        try:
            with self.path.open("rb") as file:
                offset, length = self.within or (0, -1)
                file.seek(offset)
                return io.BytesIO(file.read(length))
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read: {error.strerror}") from error


def pictures_in_folder(root: Path, warn: Callable[[str], None] = warnings.warn) -> list[Picture]:
    """The pictures of a folder of styles, in a fixed order.

    Args:
        warn: told of files that look like pictures and are left out.

    Raises:
        DataError: no such folder, none in it, or a text that cannot be read.
    """
    if not root.is_dir():
        raise DataError(f"data.folder: {root.name!r} is not a folder")
    found = []
    for folder in _shown(root):
        if not folder.is_dir():
            if kind_of(folder) in ("picture", "unreadable"):
                warn(f"{folder.name}: it is in no folder, so that nothing says its style (skipped)")
            continue
        style_prompt = _text(folder / f"{_STYLE}.txt") or _words(folder.name)
        for path in filter(Path.is_file, _shown(folder)):
            name, kind = f"{folder.name}/{path.name}", kind_of(path)
            if kind == "unreadable":
                warn(f"{NOT_READ.format(name)} (skipped)")
            elif kind == "other":
                warn(f"{name}: not known as an image (skipped)")
            elif kind == "picture":
                subject_prompt = _text(path.with_suffix(".txt")) or _words(path.stem)
                found.append(Picture(path, None, name, folder.name, path.stem, style_prompt, subject_prompt))
    if not found:
        raise DataError(f"data.folder: {root.name!r} has no folders of pictures ({', '.join(SUFFIXES)}) in it")
    return found


def pictures_in_shards(shards: str | Path | Sequence[str | Path]) -> list[Picture]:
    """The pictures of WebDataset shards, in their order.

    Args:
        shards: as `find_shards` takes them.

    Raises:
        DataError: no shards or no pictures, a damaged shard, or a picture that nothing labels; names shard and sample.
    """
    paths = find_shards(shards)
    found, style_prompts = [], dict[str, str]()
    for path in paths:
        for group in groups(path):
            key = PurePosixPath(group.key)
            if key.name == _STYLE and "txt" in group.members:
                style_prompts[key.parent.name] = _line(path, group)
            if suffix := next((suffix for suffix in group.members if f".{suffix}" in SUFFIXES), ""):
                found.append(_picture(path, group, suffix))
    if not found:
        raise DataError(
            f"data.shards: no pictures ({', '.join(SUFFIXES)}) in {len(paths)} shards, the first is {paths[0].name}"
        )
    return [replace(p, style_prompt=p.style_prompt or style_prompts.get(p.style) or _words(p.style)) for p in found]


def _picture(shard: Path, group: Group, suffix: str) -> Picture:
    """A sample of a shard; its style's prompt is empty where only the style's own text can say it."""
    key, name = PurePosixPath(group.key), f"{shard.name}/{group.key}"
    said = _labels(shard, group)
    style, subject = said.get("style") or key.parent.name, said.get("subject") or key.name
    if not style:
        raise DataError(
            f"{name}: nothing says its style: expected it in a folder named after its style, or {key.name}.json with "
            '"style" and "subject"'
        )
    text = _line(shard, group) if "txt" in group.members else ""
    info = group.members[suffix]
    return Picture(
        shard,
        (info.offset_data, info.size),
        name,
        style,
        subject,
        said.get("style_prompt", ""),
        said.get("subject_prompt") or text or _words(subject),
    )


def _labels(shard: Path, group: Group) -> Mapping[str, str]:
    if "json" not in group.members:
        return {}
    name = f"{shard.name}/{group.key}.json"
    try:
        said = json.loads(_decoded(shard, group, "json"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: {error}") from error
    if not isinstance(said, dict):
        raise DataError(f'{name}: expected {{"style": ..., "subject": ...}}, found {type(said).__name__}')
    known = {key: said[key] for key in ("style", "subject", "style_prompt", "subject_prompt") if key in said}
    if wrong := [key for key, value in known.items() if not isinstance(value, str) or not value.strip()]:
        raise DataError(f"{name}: {wrong[0]}: expected a string, found {known[wrong[0]]!r}")
    try:
        return {key: one_line(value) for key, value in known.items()}
    except ValueError as error:
        raise DataError(f"{name}: {error}") from error


def _line(shard: Path, group: Group) -> str:
    try:
        return one_line(_decoded(shard, group, "txt"))
    except ValueError as error:
        raise error if isinstance(error, DataError) else DataError(f"{shard.name}/{group.key}.txt: {error}") from error


def _decoded(shard: Path, group: Group, suffix: str) -> str:
    try:
        return decoded(member(group, group.members[suffix]).read())
    except (ValueError, tarfile.TarError, OSError) as error:
        raise DataError(f"{shard.name}/{group.key}.{suffix}: {error}") from error


def _text(path: Path) -> str:
    try:
        return one_line(decoded(path.read_bytes())) if path.is_file() else ""
    except (ValueError, OSError) as error:
        raise DataError(f"{path.parent.name}/{path.name}: {error}") from error


def _shown(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _words(name: str) -> str:
    return name.replace("_", " ").replace("-", " ").strip()
