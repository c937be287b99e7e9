"""Captions: from metadata.jsonl, from text files beside the pictures, from the samples of a shard."""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from .images import SUFFIXES, DataError, first_names

METADATA = "metadata.jsonl"
_MARKS = (
    *((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")),
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")),
)


def one_line(caption: str) -> str:
    """A caption without line breaks, doubled blanks and characters that nobody sees, as NULs."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", caption).split())


def decoded(content: bytes) -> str:
    """The text of a file: UTF-8, or UTF-16 and UTF-32 with a mark at the beginning, or UTF-16 without one.

    Raises:
        ValueError: another encoding.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return content.decode(encoding)
    # Every second byte of a Latin text in UTF-16 is 0; a file of nothing but zeros is empty.
    nulls = [content[place::2].count(0) / max(1, len(content[place::2])) for place in (0, 1)]
    if max(nulls) > 0.4 and min(nulls) < 0.1 and len(content) % 2 == 0:
        return content.decode("utf-16-be" if nulls[0] > nulls[1] else "utf-16-le")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None


def caption_in(entry: object) -> str:
    """The caption in a JSON object: its "text", or else its "caption". Raises ValueError."""
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, found {type(entry).__name__}")
    text = entry.get("text", entry.get("caption"))
    if not isinstance(text, str):
        raise ValueError('expected a string as "text"' + ("" if text is None else f", found {type(text).__name__}"))
    text.encode()  # half a surrogate pair is no text either
    return one_line(text)


def folder_captions(
    root: Path, pictures: list[str], other_files: list[str], unreadable: Collection[str] = ()
) -> tuple[str, dict[str, str]]:
    """Captions of a folder of pictures. Names are compared in one Unicode form: a Mac decomposes those of its files.

    Args:
        pictures, other_files: names of all files below `root`, relative to it.
        unreadable: names of pictures that are left out, whose captions are no mistake.

    Returns:
        The kind of file captions come from, and picture name -> caption.

    Raises:
        DataError: pictures without captions, captions without pictures, or a caption file that cannot be read.
    """
    tables = [name for name in other_files if PurePosixPath(name).name == METADATA]
    texts = {_normal(name[:-4]): name for name in other_files if name.lower().endswith(".txt")}
    names = {_normal(name): name for name in (*pictures, *unreadable)}
    found: dict[str, str] = {}
    if tables:
        for table in tables:
            _read_table(root, table, names, found)
        without = list(found.keys() - set(names.values()))
    else:
        stems = {name: normal.rpartition(".")[0] for normal, name in names.items()}
        found = {name: one_line(_text(root, texts[stem])) for name, stem in stems.items() if stem in texts}
        without = [texts[stem] for stem in texts.keys() - set(stems.values())]
    if missing := [name for name in pictures if name not in found]:
        wanted = f"a line in {METADATA}" if tables else f"NAME.txt beside each, or a {METADATA}"
        raise DataError(
            f"{root}: {len(missing)} of {len(pictures)} images have no caption ({first_names(missing)}): expected {wanted}"
        )
    if without:
        raise DataError(
            f"{root}: {len(without)} captions have no image ({first_names(sorted(without))}); looked for {', '.join(SUFFIXES)}"
        )
    return METADATA if tables else "txt", found


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _read_table(root: Path, table: str, names: Mapping[str, str], found: dict[str, str]) -> None:
    """Add picture name -> caption from one metadata.jsonl; `names` are the pictures' by their normal form."""
    for number, line in enumerate(_text(root, table).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            caption = caption_in(entry)
            if not isinstance(entry.get("file_name"), str):
                raise ValueError('expected a string as "file_name"')
            name = _file_of(entry["file_name"], PurePosixPath(table).parent, names)
            if name in found:
                raise ValueError(f"{entry['file_name']} has a caption already")
        except (ValueError, RecursionError) as error:  # bad JSON is one too
            raise DataError(f"{root / table}:{number}: {error}") from error
        found[name] = caption


def _file_of(stated: str, folder: PurePosixPath, names: Mapping[str, str]) -> str:
    """The picture that a table in `folder` means: beside it or below, where it may begin with folders above, or a drive."""
    parts = [part for part in _normal(stated).replace("\\", "/").split("/") if part not in ("", ".")]
    for first in range(len(parts)):
        for place in dict.fromkeys((folder, PurePosixPath())):
            if (name := (place / "/".join(parts[first:])).as_posix()) in names:
                return names[name]
    return (folder / stated).as_posix()


def _text(root: Path, name: str) -> str:
    try:
        return decoded((root / name).read_bytes())
    except ValueError as error:
        raise DataError(f"{root / name}: {error}") from error
    except OSError as error:
        raise DataError(f"{root / name}: cannot be read: {error.strerror}") from error
