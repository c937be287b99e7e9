"""Captions: from metadata.jsonl, from text files beside the pictures, from the samples of a shard."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from .images import SUFFIXES, DataError, first_names

METADATA = "metadata.jsonl"


def one_line(caption: str) -> str:
    """A caption without line breaks and doubled blanks."""
    return " ".join(caption.split())


def caption_in(entry: object) -> str:
    """The caption in a JSON object: its "text", or else its "caption". Raises ValueError."""
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, found {type(entry).__name__}")
    text = entry.get("text", entry.get("caption"))
    if not isinstance(text, str):
        raise ValueError('expected a string as "text"' + ("" if text is None else f", found {type(text).__name__}"))
    text.encode()  # half a surrogate pair is no text either
    return one_line(text)


def folder_captions(root: Path, pictures: list[str], other_files: list[str]) -> tuple[str, dict[str, str]]:
    """Captions of a folder of pictures.

    Args:
        pictures, other_files: names of all files below `root`, relative to it.

    Returns:
        The kind of file captions come from, and picture name -> caption.

    Raises:
        DataError: pictures without captions, captions without pictures, or a caption file that cannot be read.
    """
    tables = [name for name in other_files if PurePosixPath(name).name == METADATA]
    texts = {name[:-4]: name for name in other_files if name.lower().endswith(".txt")}
    found: dict[str, str] = {}
    if tables:
        for table in tables:
            _read_table(root, table, found)
        without = list(found.keys() - set(pictures))
    else:
        stems = {name: name.rpartition(".")[0] for name in pictures}
        found = {name: one_line(_decoded(root, texts[stem])) for name, stem in stems.items() if stem in texts}
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


def _read_table(root: Path, table: str, found: dict[str, str]) -> None:
    """Add picture name -> caption from one metadata.jsonl."""
    for number, line in enumerate(_decoded(root, table).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            caption = caption_in(entry)
            if not isinstance(entry.get("file_name"), str):
                raise ValueError('expected a string as "file_name"')
            name = (PurePosixPath(table).parent / entry["file_name"]).as_posix()
            if name in found:
                raise ValueError(f"{entry['file_name']} has a caption already")
        except ValueError as error:  # bad JSON is one too
            raise DataError(f"{root / table}:{number}: {error}") from error
        found[name] = caption


def _decoded(root: Path, name: str) -> str:
    try:
        return (root / name).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{root / name}: not UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise DataError(f"{root / name}: cannot be read: {error.strerror}") from error
