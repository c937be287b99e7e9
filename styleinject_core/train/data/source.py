"""Where training batches come from: latents in memory, a folder or a stream of images that are encoded on the way."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ..parallel import Processes
from .batches import Batch, Conditioning, joined, rows, tensors_hash
from .buckets import BatchOrder, Size
from .folder import ImageFolder
from .images import DataError, Example
from .kept import Kept, size_of
from .labels import StyleLabels
from .webdataset import ImageStream

_OF_A_STREAM = 2**26  # bytes: its captions have no end
Prompts = Conditioning | Sequence[Conditioning]


class Source(Protocol):
    """Batches by number, the same however often and by however many processes they are asked for.

    `advice` is what the user should know before training, or empty.
    """

    advice: str

    def batch(self, index: int) -> Batch:
        """This process's rows of batch `index`, counted from 0; in order for streams."""
        ...

    def summary(self) -> dict[str, Any]:
        """What the data is, for the file's metadata and to recognize it at a resume: no paths."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class LatentSource:
    """Latents and prompts in memory.

    Args:
        latents: x0 of each example, (C, H, W); sizes may differ, a batch has one size.
        conditioning: one row per example, or a single one for all; in one, or a list, whose rows may differ in length.
        teacher: the same prompts for a teacher with another text encoder.
        empty, teacher_empty: what takes a dropped caption's place, likewise, where that depends on the image.
        styles: the number of each example's style, from 0; -1 where it has none.

    Raises:
        ValueError: no latents, or another number of prompts or styles than of latents.
    """

    def __init__(
        self,
        latents: Sequence[Tensor],
        conditioning: Prompts,
        teacher: Prompts | None = None,
        empty: Prompts | None = None,
        teacher_empty: Prompts | None = None,
        *,
        styles: Sequence[int] | None = None,
        batch_size: int = 1,
        seed: int = 0,
        processes: Processes = Processes(),  # noqa: B008 - frozen
    ):
        if not latents:
            raise ValueError("no training images: expected at least one latent")
        self.latents = list(latents)
        by_name = {"conditioning": conditioning, "teacher": teacher, "empty": empty, "teacher_empty": teacher_empty}
        self.prompts = {
            name: _a_row_each(value, len(self.latents), name) for name, value in by_name.items() if value is not None
        }
        if styles is not None and len(styles) != len(self.latents):
            raise ValueError(f"styles: {len(styles)} for {len(self.latents)} latents, expected one each")
        self.styles = None if styles is None else torch.tensor(styles)
        sizes = [(int(x.shape[-2]), int(x.shape[-1])) for x in self.latents]
        self.order = BatchOrder(sizes, batch_size, seed, processes.rank, processes.world)
        self.advice = self.order.advice

    def batch(self, index: int) -> Batch:
        members = self.order.batch(index)
        latents = torch.stack([self.latents[k].float() for k in members])
        prompts = {name: joined([each[k] for k in members]) for name, each in self.prompts.items()}
        return Batch(latents, **prompts, styles=None if self.styles is None else self.styles[members])

    def summary(self) -> dict[str, Any]:
        return dict(self._summary)

    @cached_property
    def _summary(self) -> dict[str, Any]:
        known: dict[str, Any] = {"images": len(self.latents), "latents": tensors_hash(self.latents)}
        if self.styles is not None:
            known["styles"] = tensors_hash([self.styles])
        for name, each in self.prompts.items():
            distinct = {id(row): row for row in each}  # most images share the empty prompt
            hashes = {key: tensors_hash(row.values()) for key, row in distinct.items()}
            known[f"{name} prompts"] = hashlib.blake2b(
                "".join(hashes[id(row)] for row in each).encode(), digest_size=8
            ).hexdigest()
        return known

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


SizeConditioning = Callable[[Size, Size, Size], Conditioning]


_ABOUT, _TEACHERS = "about.", "teacher."  # before the names of tensors that are kept together


class _Encoding:
    """Pictures and captions through a model's encoders, one by one, so that no batch changes what comes out."""

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        encode_text: Callable[[str], Conditioning],
        encode_teacher_text: Callable[[str], Conditioning] | None = None,
        size_conditioning: SizeConditioning | None = None,
        kept: Kept | None = None,
        labels: StyleLabels | None = None,
    ):
        self.labels = labels
        self._encode, self._encode_text, self._encode_teacher_text = encode, encode_text, encode_teacher_text
        self._size_conditioning = size_conditioning
        self.kept = Kept() if kept is None else kept

    def example(self, example: Example) -> _Encoded:
        """Raises DataError: latents that are no numbers."""
        with torch.no_grad():
            latents = self._encode(example.pixels.unsqueeze(0))[0].float().cpu()
        check_latents(example.name, latents)
        height, width = example.pixels.shape[-2:]
        about = self._size_conditioning(example.original, example.crop, (height, width)) if self._size_conditioning else {}
        return _Encoded(latents, example.caption, about, self.style(example.name, example.caption))

    def style(self, name: str, caption: str) -> int:
        return -1 if self.labels is None else self.labels.of(name, caption)

    def kept_example(self, key: str, read: Callable[[], Example]) -> _Encoded:
        """An example whose latents are kept; `read` is called where they are not."""

        def make() -> dict[str, Tensor]:
            encoded = self.example(read())
            return {"latents": encoded.latents, **{f"{_ABOUT}{name}": value for name, value in encoded.about.items()}}

        found = self.kept.get(f"image {key}", make)
        about = {name.removeprefix(_ABOUT): value for name, value in found.items() if name.startswith(_ABOUT)}
        return _Encoded(found["latents"], "", about)

    def prompt(self, caption: str) -> dict[str, Tensor]:
        """The conditioning of a caption, and the teacher's under names of their own."""

        def make() -> dict[str, Tensor]:
            with torch.no_grad():
                teacher = self._encode_teacher_text(caption) if self._encode_teacher_text else {}
                return {**self._encode_text(caption), **{f"{_TEACHERS}{name}": value for name, value in teacher.items()}}

        return self.kept.get(f"prompt {caption}", make)

    def batch(self, examples: Sequence[_Encoded]) -> Batch:
        prompts = [self.prompt(example.caption) for example in examples]
        own = [{name: value for name, value in prompt.items() if not name.startswith(_TEACHERS)} for prompt in prompts]
        teachers = [
            {name.removeprefix(_TEACHERS): value for name, value in prompt.items() if name.startswith(_TEACHERS)}
            for prompt in prompts
        ]
        about = joined([example.about for example in examples])
        return Batch(
            torch.stack([example.latents for example in examples]),
            {**joined(own), **about},
            {**joined(teachers), **about} if teachers[0] else None,
            styles=None if self.labels is None else torch.tensor([example.style for example in examples]),
        )


@dataclass(frozen=True)
class _Encoded:
    """An example as the model sees it; `about` is its size conditioning, one row, `style` the number of its style or -1."""

    latents: Tensor
    caption: str
    about: Conditioning
    style: int = -1


class FolderSource:
    """A folder of images, encoded when first seen and kept; those whose crop changes are encoded each time.

    Args:
        encode: (1, 3, H, W) in [-1, 1] -> latents (1, C, h, w).
        encode_text, encode_teacher_text: a caption -> its conditioning, one row.
        size_conditioning: (original size, crop, size) -> what the model is told about an image beside its caption.
        indices: which of the folder's images; None takes all.
        kept: where latents and conditioning are kept.
        labels: which styles are looked for in folders and captions.

    Raises:
        DataError: a style that no image has.
    """

    def __init__(
        self,
        folder: ImageFolder,
        encode: Callable[[Tensor], Tensor],
        encode_text: Callable[[str], Conditioning],
        encode_teacher_text: Callable[[str], Conditioning] | None = None,
        size_conditioning: SizeConditioning | None = None,
        *,
        indices: Sequence[int] | None = None,
        batch_size: int = 1,
        seed: int = 0,
        processes: Processes = Processes(),  # noqa: B008 - frozen
        kept: Kept | None = None,
        labels: StyleLabels | None = None,
    ):
        self.folder = folder
        self._encoding = _Encoding(encode, encode_text, encode_teacher_text, size_conditioning, kept, labels)
        self._styles = [self._encoding.style(folder.name(k), folder.captions[k]) for k in range(len(folder))]
        self._standing_in: dict[int, _Encoded] = {}  # for those that cannot be decoded
        self.indices = list(range(len(folder))) if indices is None else list(indices)
        self._among = frozenset(self.indices)
        sizes = [folder.sizes[k] for k in self.indices]
        self.order = BatchOrder(sizes, batch_size, seed, processes.rank, processes.world)
        said = labels.counted(self._styles) if labels is not None else ""
        self.advice = "; ".join(filter(None, (folder.advice, self.order.advice, said)))

    def batch(self, index: int) -> Batch:
        return self._encoding.batch([self._example(self.indices[k], index) for k in self.order.batch(index)])

    def style_counts(self) -> dict[str, int]:
        """How many of the images trained on have each style; empty where styles are not looked for."""
        labels = self._encoding.labels
        numbers = [self._styles[k] for k in self.indices]
        return {} if labels is None else {name: numbers.count(k) for k, name in enumerate(labels.names)}

    def _example(self, k: int, index: int) -> _Encoded:
        if not self.folder.center_crop or self.folder.flip:
            return self._encoding.example(self.folder.read(k, index, self._among))
        if k in self._standing_in:
            return self._standing_in[k]

        def read() -> Example:
            example = self.folder.read(k, index, self._among)
            if example.name != self.folder.name(k):
                raise _StandsIn(example)
            return example

        try:
            found = self._encoding.kept_example(self.folder.stamp(k), read)
            return replace(found, caption=self.folder.captions[k], style=self._styles[k])
        except _StandsIn as other:
            self._standing_in[k] = self._encoding.example(other.example)
            return self._standing_in[k]

    def kept_size(self) -> int:
        """Bytes that all latents and captions take, by those of the first."""
        example = self._example(self.indices[0], 0)
        prompt = self._encoding.prompt(example.caption)
        images = 0 if not self.folder.center_crop or self.folder.flip else len(self.indices)
        distinct = len({self.folder.captions[k] for k in self.indices})
        return images * size_of({"latents": example.latents}) + distinct * size_of(prompt)

    def summary(self) -> dict[str, Any]:
        known = self.folder.summary()
        if len(self.indices) < len(self.folder):
            known["chosen"] = len(self.indices)
        if self._encoding.labels is not None:
            known["styles"] = [*self._encoding.labels.names, tensors_hash([torch.tensor(self._styles)])]
        return known

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class _StandsIn(Exception):
    """Another picture was read in the place of a broken one."""

    def __init__(self, example: Example):
        super().__init__(example.name)
        self.example = example


class StreamSource:
    """A stream of images that is read once through; batches are asked for in order.

    Args:
        length: a caption -> its tokens, and how many of them are read; None where that is not known.
        warn: told of captions that are too long.
    """

    advice = ""

    def __init__(
        self,
        stream: ImageStream,
        encode: Callable[[Tensor], Tensor],
        encode_text: Callable[[str], Conditioning],
        encode_teacher_text: Callable[[str], Conditioning] | None = None,
        size_conditioning: SizeConditioning | None = None,
        *,
        labels: StyleLabels | None = None,
        length: Callable[[str], tuple[int, int] | None] = lambda _: None,
        warn: Callable[[str], None] = warnings.warn,
    ):
        self.stream, self._length, self._warn = stream, length, warn
        self._read = self._long = self._empty = 0
        kept = Kept(memory=_OF_A_STREAM)
        self._encoding = _Encoding(encode, encode_text, encode_teacher_text, size_conditioning, kept, labels)

    def batch(self, index: int) -> Batch:
        examples = self.stream.next_batch()
        for example in examples:
            self._count(example.caption)
        return self._encoding.batch([self._encoding.example(example) for example in examples])

    def _count(self, caption: str) -> None:
        """Say at the first, tenth, hundredth... caption that is empty or too long: how many there are, nobody knows before."""
        self._read += 1
        if not caption:
            self._empty += 1
            if _is_round(self._empty):
                self._warn(f"{self._empty} of {self._read} captions read so far are empty")
        found = self._length(caption)
        if found is None or found[0] <= found[1]:
            return
        self._long += 1
        if _is_round(self._long):
            self._warn(too_long(self._long, self._read, found, caption, " read so far"))

    def summary(self) -> dict[str, Any]:
        labels = self._encoding.labels
        return self.stream.summary() | ({} if labels is None else {"styles": list(labels.names)})

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stream.load_state_dict(state)


def check_latents(name: str, latents: Tensor) -> None:
    """Refuse what a VAE made of a picture if it is no numbers (DataError)."""
    if not torch.isfinite(latents).all():
        raise DataError(
            f"{name}: the VAE makes NaN or infinite numbers of it, as some do in float16: set model.dtype to "
            "bfloat16 or float32, or take a VAE that is mended for float16"
        )


def _is_round(number: int) -> bool:
    """Whether it is 1, 10, 100..."""
    return str(number).rstrip("0") == "1"


def too_long(long: int, of: int, longest: tuple[int, int], caption: str, which: str = "") -> str:
    """What is not read of captions, in words.

    Args:
        long, of: how many are longer than what is read, and of how many.
        longest: tokens of `caption`, and how many are read.
    """
    tokens, read = longest
    return (
        f"{long} of {of} captions{which} are longer than the {read} tokens that the text encoder reads, and their ends do "
        f'not count ({"longest" if not which else "this one"}: {tokens}, "{caption[:40]}...")'
    )


def _a_row_each(prompts: Prompts, count: int, what: str) -> list[Conditioning]:
    if isinstance(prompts, Mapping):
        prompts = [rows(prompts, [k]) for k in range(len(next(iter(prompts.values()))))]
    if len(prompts) not in (1, count):
        raise ValueError(f"{what}: {len(prompts)} prompts for {count} latents; expected as many, or one for all")
    return list(prompts) * count if len(prompts) == 1 else list(prompts)
