"""Captions: from metadata.jsonl or metadata.csv, from text files beside the pictures, from the samples of a shard."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath

from .images import SUFFIXES, DataError, first_names

METADATA = "metadata.jsonl"
TABLES = (METADATA, "metadata.csv")  # of Hugging Face's imagefolder
TEXTS = (".txt", ".caption")  # beside a picture; the second is kohya's
LONGEST = 20_000  # characters: no text encoder reads a tenth of it, and tokenizers take their time
_UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")  # Unicode's categories of blanks and of characters that nobody sees
_MARKS = (
    *((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")),
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")),
)


def one_line(caption: str) -> str:
    """A caption without line breaks, doubled blanks, control characters and byte order marks; empty where nothing of it can be
    seen.

    Raises:
        ValueError: longer than LONGEST: a whole text, or no text at all.
    """
    line = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\ufeff]", " ", caption).split())
    if len(line) > LONGEST:
        raise ValueError(f"{len(line):,} characters are no caption, expected at most {LONGEST:,}")
    return line if any(unicodedata.category(character) not in _UNSEEN for character in line) else ""


def decoded(content: bytes) -> str:
    """The text of a file: UTF-8, or UTF-16 and UTF-32 with a mark at the beginning, or UTF-16 without one.

    Raises:
        ValueError: another encoding.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return content.decode(encoding)
    # Every second byte of a Latin text in UTF-16 is 0; a file of nothing but zeros is empty.
    whole = content[: len(content) // 2 * 2]
    nulls = [whole[place::2].count(0) / max(1, len(whole) // 2) for place in (0, 1)]
    if max(nulls) > 0.4 and min(nulls) < 0.1:
        return whole.decode("utf-16-be" if nulls[0] > nulls[1] else "utf-16-le")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if max(nulls) > 0 and (text := _utf_16(whole)):
            return text
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8") from None


def _utf_16(content: bytes) -> str:
    """What bytes that are no UTF-8 say in UTF-16 without a mark, by the blanks among Chinese; empty where they say nothing."""
    texts = {}
    for encoding in ("utf-16-le", "utf-16-be"):
        text = content.decode(encoding, errors="replace")
        if not any(unicodedata.category(character) in ("Cn", "Co") or character in "\0\ufffd" for character in text):
            texts[sum(character.isascii() for character in text)] = text
    return texts[max(texts)] if texts else ""


def caption_in(entry: object) -> str:
    """The caption in a JSON object: its "text", or else its "caption". Raises ValueError."""
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, found {type(entry).__name__}")
    text = entry.get("text")
    if text is None:
        text = entry.get("caption")
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
    by_kind = [[name for name in other_files if PurePosixPath(name).name.lower() == kind] for kind in TABLES]
    tables = next(filter(None, by_kind), [])
    texts = {_normal(name.rpartition(".")[0]): name for name in other_files if name.lower().endswith(TEXTS)}
    names = {_normal(name): name for name in (*pictures, *unreadable)}
    found: dict[str, str] = {}
    if tables:
        for table in tables:
            _read_table(root, table, names, found)
        without = list(found.keys() - set(names.values()))
    else:
        stems = {name: normal if normal in texts else normal.rpartition(".")[0] for normal, name in names.items()}
        found = {name: _caption_of(root, texts[stem]) for name, stem in stems.items() if stem in texts}
        without = [texts[stem] for stem in texts.keys() - set(stems.values())]
    if missing := [name for name in pictures if name not in found]:
        wanted = f"a line in {' or '.join(tables[:2])}" if tables else f"NAME.txt beside each, or a {' or '.join(TABLES)}"
        raise DataError(
            f"{root}: {len(missing)} of {len(pictures)} images have no caption ({first_names(missing)}): expected {wanted}"
        )
    if without:
        raise DataError(
            f"{root / tables[0] if tables else root}: {len(without)} captions have no image ({first_names(sorted(without))}); "
            f"looked for {', '.join(SUFFIXES)}"
        )
    return PurePosixPath(tables[0]).name.lower() if tables else "txt", found


def _caption_of(root: Path, name: str) -> str:
    try:
        return one_line(_text(root, name))
    except ValueError as error:
        raise error if isinstance(error, DataError) else DataError(f"{root / name}: {error}") from error


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _read_table(root: Path, table: str, names: Mapping[str, str], found: dict[str, str]) -> None:
    """Add picture name -> caption from one table; `names` are the pictures' by their normal form."""
    for number, entry in _entries(root, table):
        try:
            caption = caption_in(entry)
            assert isinstance(entry, dict)
            if not isinstance(entry.get("file_name"), str):
                raise ValueError('expected a string as "file_name"')
            name = _file_of(entry["file_name"], PurePosixPath(table).parent, names)
            if name in found:
                raise ValueError(f"{entry['file_name']} has a caption already")
        except ValueError as error:
            raise DataError(f"{root / table}:{number}: {error}") from error
        found[name] = caption


def _entries(root: Path, table: str) -> Iterator[tuple[int, object]]:
    """The entries of a table, with the numbers of their lines. Raises DataError."""
    text = _text(root, table)
    if table.lower().endswith(".csv"):
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise DataError(f"{root / table}:{reader.line_num}: {error}") from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"{root / table}:{number}: expected one JSON object in the line: {reason[:200]}") from error


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
