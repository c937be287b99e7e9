"""One picture file as training wants it: upright, sRGB, cut to its bucket's size, in [-1, 1]; and what to do with a broken one.

A color profile inside the file is applied; pixels without one are taken as sRGB.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, BinaryIO, Literal

import torch
from torch import Tensor

from .buckets import Size

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# What is looked for by name. Files of other names are looked into: see `is_picture`.
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".avifs", ".heic", ".heics", ".heif", ".hif"),
    *(".jfif", ".jif", ".jpe", ".mpo", ".apng", ".dib", ".tga", ".icb", ".vda", ".vst", ".jp2", ".j2k", ".jpx", ".jpf", ".j2c"),
    *(".jpc", ".ppm", ".pgm", ".pbm", ".pnm", ".pcx", ".qoi", ".ico"),
)
# Pictures, drawings and films that Pillow cannot read as they are; some hold a small preview that it would read instead.
OTHER_SUFFIXES = (
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".raw", ".jxl", ".svg", ".psd", ".psb"),
    *(".xcf", ".kra", ".exr", ".hdr", ".eps", ".ai", ".pdf", ".dds", ".mp4", ".mov", ".webm", ".mkv", ".avi"),
)
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM", "PCX", "QOI", "ICO", "TGA")
_BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"BM", b"qoif")
_LONGEST = 300  # characters of a name or a reason in a message
_TIFF_SIZE = (256, 257)  # the tags of width and height
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
            8: "ROTATE_90"}  # fmt: skip

OnCorrupt = Literal["skip", "stop"]


class DataError(ValueError):
    """Training data that cannot be used; the message names the file, what was found and what was expected.

    What was found may be of any length: the middle of a long message is left out.
    """

    def __init__(self, message: str):
        super().__init__(message if len(message) <= 4 * _LONGEST else f"{message[: 3 * _LONGEST]} ... {message[-_LONGEST:]}")


class CorruptError(DataError):
    """One picture (or one sample of a shard) that cannot be used, while its neighbors may be fine."""


@dataclass(frozen=True)
class Example:
    """One picture and its caption.

    Args:
        pixels: (3, H, W) float32 in [-1, 1], H and W those of its bucket.
        caption: on one line.
        name: the file's name relative to its folder, or shard and key: for messages.
        original: (H, W) of the whole picture, upright.
        crop: what was cut off at the top and at the left of it, in pixels of the result.
    """

    pixels: Tensor
    caption: str
    name: str
    original: Size = (0, 0)
    crop: Size = (0, 0)


@dataclass(frozen=True)
class View:
    """Which part of a picture is seen: x and y place the crop, 0 to 1 of the room left over."""

    x: float = 0.5
    y: float = 0.5
    mirrored: bool = False

    @classmethod
    def draw(cls, place: str, center_crop: bool, flip: bool) -> View:
        """The view that belongs to a place in the run ("seed/example/step"): a resumed run draws the same one there."""
        chance = random.Random(place)
        x, y, coin = chance.random(), chance.random(), chance.random()
        mirrored = flip and coin < 0.5
        return cls(mirrored=mirrored) if center_crop else cls(x, y, mirrored)


class CorruptImages:
    """What could not be used so far, by name, and whether to go on without it.

    Args:
        on_corrupt: "stop" raises the error; "skip" says it once through `warn` and goes on.
        warn: called with one line per broken thing.
    """

    def __init__(self, on_corrupt: OnCorrupt = "skip", warn: Callable[[str], None] = warnings.warn) -> None:
        if on_corrupt not in ("skip", "stop"):
            raise ValueError(f"on_corrupt: expected skip or stop, found {on_corrupt!r}")
        self.on_corrupt = on_corrupt
        self.names: dict[str, str] = {}  # name -> reason
        self._warn = warn

    def add(self, name: str, error: CorruptError) -> None:
        """Note a broken thing. Raises `error` itself where `on_corrupt` is "stop"."""
        if self.on_corrupt == "stop":
            raise error
        if name not in self.names:
            self.names[name] = str(error)
            self._warn(f"{error} (skipped)")


def is_picture(head: bytes) -> bool:
    """Whether a file that begins so (32 bytes) is a picture that can be read, whatever its name."""
    return head.startswith(_BEGINNINGS) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or _is_heif(head)


def _is_heif(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in (
        b"heic",
        b"heix",
        b"heim",
        b"heis",
        b"hevc",
        b"mif1",
        b"msf1",
        b"avif",
        b"avis",
    )


def crop_of(original: Size, size: Size, view: View) -> Size:
    """What is cut off at the top and at the left of a picture that covers `size`, in pixels of the result.

    Args:
        original, size: (H, W) of the whole picture, and of what is seen of it.
    """
    scale = max(size[0] / original[0], size[1] / original[1])
    top, left = (max(0.0, whole * scale - seen) for whole, seen in zip(original, size, strict=True))
    return round(top * view.y), round(left * (1 - view.x if view.mirrored else view.x))


def cut_off(original: Size, size: Size) -> float:
    """The share of a picture, (H, W), that is not seen when it covers `size`."""
    scale = max(size[0] / original[0], size[1] / original[1])
    return 1 - size[0] * size[1] / (original[0] * original[1] * scale**2)


def read_size(file: BinaryIO, name: str) -> tuple[int, int]:
    """Width and height of a picture as it is shown, from its header alone.

    Raises:
        CorruptError: no picture of a known format, or more pixels than Pillow's limit against decompression bombs.
    """
    with _errors_named(name):
        picture = _open(file)
        width, height = picture.size
        return (height, width) if _orientation(picture) >= 5 else (width, height)


def decode(file: BinaryIO, name: str, size: tuple[int, int], view: View) -> Tensor:
    """Read a picture, scale it to cover `size`, and cut off what stands over.

    Alpha is laid over white; of an animation the first frame is taken.

    Args:
        size: (H, W) of the result.

    Returns:
        (3, H, W) float32 in [-1, 1].

    Raises:
        CorruptError: the picture cannot be decoded to its end.
    """
    import numpy as np
    from PIL import Image

    height, width = size
    with _errors_named(name):
        picture = _open(file)
        # A large JPEG is decoded at a half, quarter or eighth where that leaves twice the pixels needed: 2 to 3 times faster.
        picture.draft(None, (2 * max(size), 2 * max(size)))
        picture.load()
        orientation = _orientation(picture)  # Pillow itself turns a TIFF, and tells so from here on
        picture = _rgb(picture)
    if orientation in _UPRIGHT:
        picture = picture.transpose(Image.Transpose[_UPRIGHT[orientation]])
    scale = min(picture.width / width, picture.height / height)  # of the picture's pixels to the result's
    seen = min(width * scale, picture.width), min(height * scale, picture.height)  # min: rounding must not lead outside
    left, top = (picture.width - seen[0]) * view.x, (picture.height - seen[1]) * view.y
    right, bottom = min(left + seen[0], picture.width), min(top + seen[1], picture.height)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, right, bottom))
    if view.mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(picture))  # (H, W, 3) uint8
    return (pixels.permute(2, 0, 1).float() / 127.5 - 1).contiguous()


def first_names(names: Iterable[str]) -> str:
    """The first three of some names, for a message."""
    some = list(names)
    return ", ".join(name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..." for name in some[:3]) + (
        ", ..." if len(some) > 3 else ""
    )


@contextlib.contextmanager
def _errors_named(name: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # damaged data makes Pillow raise anything from OSError to struct.error, by format
        raise CorruptError(f"{name}: cannot be decoded: {error}") from error


def _open(file: BinaryIO) -> Picture:
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(file, formats=_formats())
    except UnidentifiedImageError:
        file.seek(0)
        if _is_heif(file.read(12)) and "HEIF" not in _formats():
            raise ValueError("HEIC and AVIF need a package: pip install pillow-heif") from None
        raise
    limit = Image.MAX_IMAGE_PIXELS  # Pillow only warns up to twice this
    if limit and picture.width * picture.height > limit:
        raise ValueError(f"{picture.width} x {picture.height} pixels, more than Pillow's limit of {limit:,}")
    return picture


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Those formats that this Pillow reads, with pillow-heif where it is installed."""
    from PIL import Image

    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
    except ImportError:
        pass
    Image.init()
    return tuple(kind for kind in _FORMATS if kind in Image.OPEN)


def _orientation(picture: Picture) -> int:
    tags = getattr(picture, "tag_v2", {}) if picture.format == "TIFF" else {}
    if tags and picture.size != tuple(tags.get(tag) for tag in _TIFF_SIZE):
        return 1  # Pillow turns it when it is loaded, and says its size as it will be
    if picture.format == "PNG" and "exif" not in picture.info:
        return 1  # Pillow would decode the whole picture here, to look for EXIF behind it
    orientation = picture.getexif().get(_ORIENTATION, 1)
    return orientation if orientation in _UPRIGHT else 1


def _in_srgb(picture: Picture) -> Picture:
    """By the color profile inside the file, if there is one that can be read: phones write Display P3, cameras Adobe RGB.

    A profile that Pillow cannot apply says nothing about the pixels, which then are taken as they are.
    """
    profile = picture.info.get("icc_profile")
    if not profile or picture.mode.startswith("I"):  # 16-bit gray: in practice sRGB
        return picture
    if picture.mode == "LA":
        gray = picture.getchannel("L")
        gray.info["icc_profile"] = profile
        in_color = _in_srgb(gray).convert("RGB")
        in_color.putalpha(picture.getchannel("A"))
        return in_color
    if picture.mode in ("P", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA" if picture.mode == "PA" or "transparency" in picture.info else "RGB")
    try:
        from PIL import ImageCms
    except ImportError:  # a part that Pillow can be built without
        return picture
    try:
        ours, its = ImageCms.createProfile("sRGB"), ImageCms.ImageCmsProfile(BytesIO(profile))
        mode = "RGBA" if picture.mode == "RGBA" else "RGB"
        converted = ImageCms.profileToProfile(picture, its, ours, outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return picture
    return converted or picture


def _rgb(picture: Picture) -> Picture:
    import numpy as np
    from PIL import Image

    if picture.mode == "F":
        raise ValueError("it holds floating-point numbers, of which nobody says what is white: save it with 8 or 16 bits")
    picture = _in_srgb(picture)
    if picture.mode.startswith("I"):  # 16 bits of gray, which convert() would cut off at 255 instead of scaling
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) / 257).round().astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")
