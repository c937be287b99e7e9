"""Folders of pictures under ComfyUI's input folder, and the samples that come with the pack, as training takes them."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import comfy.utils
import folder_paths
from torch import Tensor

from ...styleinject_core.train.data.buckets import bucket_sizes, nearest_bucket
from ...styleinject_core.train.data.captions import one_line
from ...styleinject_core.train.data.folder import ImageFolder, walk
from ...styleinject_core.train.data.images import SUFFIXES, DataError

FROM_FILES, ONE_FOR_ALL, TRIGGER_ALONE = CAPTIONS = ("from files", "one caption for all", "trigger word alone")
SUBFOLDERS = MORE_PICTURES, A_STYLE_EACH = ("more pictures", "a style each")
STEP = 64  # sides are multiples of it: every model's latents and levels divide it
_SAMPLES = {"samples/line art": "line-art", "samples/one cat": "cat"}  # name in the list -> folder in examples/
_EXAMPLES = Path(__file__).parents[2] / "examples"
_MOST_FOLDERS = 2000  # looked through for the list


@dataclass(frozen=True)
class Pictures:
    """Pictures with a caption each.

    Args:
        images: (1, H, W, 3) float32 in [0, 1] each.
        report: how many of which size, and what was left out, in words.
        styles: the folder inside of the chosen one that each picture is in; empty where it is in none, or they mean nothing.
    """

    images: list[Tensor]
    captions: list[str]
    report: str
    styles: list[str]


def folder_names() -> list[str]:
    """The folders with pictures below ComfyUI's input folder, with "/" between them, and last the samples."""
    root, found = Path(folder_paths.get_input_directory()), []
    for seen, (folder, folders, files) in enumerate(os.walk(root)):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if Path(folder) != root and any(name.lower().endswith(SUFFIXES) for name in files):
            found.append(Path(folder).relative_to(root).as_posix())
        if seen >= _MOST_FOLDERS:
            break
    return [*sorted(found), *(name for name, folder in _SAMPLES.items() if (_EXAMPLES / folder).is_dir())]


def folder_path(name: str) -> Path:
    """The folder of a name: one of the samples, or one below ComfyUI's input folder.

    Raises:
        ValueError: a name that leads out of it.
        FileNotFoundError: no such folder; names those there are.
    """
    wanted = str(name).replace("\\", "/").strip("/")
    root = Path(folder_paths.get_input_directory()).resolve()
    path = (root / wanted).resolve()
    if ":" in wanted or os.path.isabs(str(name)) or not path.is_relative_to(root) or path == root:
        raise ValueError(f"folder {name!r}: expected the name of a folder in {root}, not a path that leads out of it")
    if path.is_dir():
        return path
    if wanted in _SAMPLES and (_EXAMPLES / _SAMPLES[wanted]).is_dir():
        return _EXAMPLES / _SAMPLES[wanted]
    names = folder_names()
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    raise FileNotFoundError(f"folder {name!r} not found in {root}; with pictures there are: {', '.join(names[:10])}{more}")


def problem(name: str | None) -> str | None:
    """Why a folder cannot be used, for the message when a workflow is queued; None where it can, or is not known yet."""
    if name is None:
        return None
    try:
        folder_path(name)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def fingerprint(name: str) -> str:
    """Changes when a file below the folder does; empty where there is none."""
    try:
        return hashlib.sha256("\n".join(_stats(folder_path(name))).encode()).hexdigest()
    except (OSError, ValueError):
        return ""


def from_folder(
    name: str, size: int, keep_shape: bool, captions: str, caption: str, trigger: str, subfolders: str = MORE_PICTURES
) -> Pictures:
    """Read all pictures of a folder, upright, on white where they are transparent, in sRGB.

    Args:
        size: side of a square picture in pixels, a multiple of 64; others have about as many pixels.
        keep_shape: False cuts all of them square.
        captions: one of CAPTIONS.
        caption: for "one caption for all".
        trigger: put before each caption that has not got it.
        subfolders: one of SUBFOLDERS; where each is a style, its name is put before the captions in it, as the trigger is.

    Raises:
        DataError: no pictures, pictures without captions where they were to come from files, none that can be read.
        ValueError: a caption or a trigger word that is asked for and missing, or see `folder_path`.
    """
    skipped: list[str] = []
    given = None if captions == FROM_FILES else _said(captions, caption, trigger)
    try:
        folder = ImageFolder(folder_path(name), size, buckets=keep_shape, bucket_step=STEP, caption=given, warn=skipped.append)
    except DataError as error:
        advice = f'; or choose "{ONE_FOR_ALL}" or "{TRIGGER_ALONE}"' if "caption" in str(error) else ""
        raise DataError(f"{error}{advice}") from error
    images, texts, styles = [], [], []
    for index in range(len(folder)):
        if folder.name(index) in folder.skipped:
            continue  # it stood in for another one, and was found broken
        example = folder[index]
        if example.name == folder.name(index):  # not one that stands in for it
            images.append((example.pixels.movedim(0, -1).unsqueeze(0) + 1) / 2)
            styles.append(_style(example.name) if subfolders == A_STYLE_EACH else "")
            texts.append(_with_trigger(_with_trigger(example.caption, styles[-1]), trigger))
    if not images:
        raise DataError(f"folder {name!r}: no picture can be decoded: {'; '.join(skipped[:3])}")
    if subfolders == A_STYLE_EACH and len(found := set(styles) - {""}) < 2:
        raise DataError(
            f'folder {name!r}: subfolders is "{A_STYLE_EACH}", and pictures are in {len(found)} folders inside it: put '
            f'those of each style into one named as prompts will call it, or choose "{MORE_PICTURES}"'
        )
    return Pictures(images, texts, _report(images, texts, skipped, folder.advice, styles), styles)


def from_images(
    batch: Tensor, size: int, keep_shape: bool, captions: str, caption: str, trigger: str, subfolders: str = MORE_PICTURES
) -> Pictures:
    """The same for an IMAGE batch, (B, H, W, 3 or 4) in [0, 1]. Raises ValueError: captions, or styles, from files."""
    if subfolders == A_STYLE_EACH:
        raise ValueError(f'subfolders: connected images are in no folders; choose "{MORE_PICTURES}"')
    if captions == FROM_FILES:
        raise ValueError(f'captions: connected images have no files; choose "{ONE_FOR_ALL}" or "{TRIGGER_ALONE}"')
    text = _with_trigger(_said(captions, caption, trigger), trigger)
    sizes = bucket_sizes(size, STEP) if keep_shape else [(size, size)]
    height, width = nearest_bucket(sizes, batch.shape[2], batch.shape[1])
    pixels = batch.float()
    if pixels.shape[-1] == 4:  # transparent pixels over white
        alpha = pixels[..., 3:]
        pixels = pixels[..., :3] * alpha + (1 - alpha)
    resized = comfy.utils.common_upscale(pixels[..., :3].movedim(-1, 1), width, height, "lanczos", "center").movedim(1, -1)
    images = [image.unsqueeze(0) for image in resized.clamp(0, 1)]
    return Pictures(images, [text] * len(images), _report(images, [text] * len(images), []), [""] * len(images))


def _said(captions: str, caption: str, trigger: str) -> str:
    """The caption of all pictures, where it does not come from files."""
    text = one_line(caption) if captions == ONE_FOR_ALL else one_line(trigger)
    if not text:
        field = "caption" if captions == ONE_FOR_ALL else "trigger"
        raise ValueError(f'captions is "{captions}", and {field} is empty: say what the pictures show')
    return text


def _with_trigger(caption: str, trigger: str) -> str:
    word = one_line(trigger)
    return caption if not word or word.lower() in caption.lower() else f"{word}, {caption}" if caption else word


def _style(name: str) -> str:
    """The folder that a picture is in, of those directly inside of the chosen one: its name, as it is said in a prompt."""
    folders = PurePosixPath(name.replace("\\", "/")).parts[:-1]
    return " ".join(folders[0].replace("_", " ").split()) if folders else ""


def _report(images: list[Tensor], captions: list[str], skipped: list[str], advice: str = "", styles: Sequence[str] = ()) -> str:
    counts = Counter(f"{image.shape[2]}x{image.shape[1]}" for image in images)
    lines = [f"{len(images)} pictures: {', '.join(f'{count} of {size}' for size, count in counts.most_common())}"]
    if named := Counter(style for style in styles if style):
        lines.append(f"{len(named)} styles: {', '.join(f'{name} ({count})' for name, count in named.items())}")
    lines += [f'  "{caption[:100]}"' for caption in list(dict.fromkeys(captions))[:3]]
    lines += [f"left out: {reason.removesuffix(' (skipped)')}" for reason in skipped[:5]]
    if len(skipped) > 5:
        lines.append(f"and {len(skipped) - 5} more")
    if advice:
        lines.append(advice.replace("; ", "\n"))
    return "\n".join(lines)


def _stats(folder: Path) -> Iterator[str]:
    for place, files in walk(folder):
        for name in files:
            path = place / name
            status = path.stat() if path.exists() else path.lstat()  # a link that leads nowhere
            # ctime too: who edits a file may set its time of modification back
            yield f"{path}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"
