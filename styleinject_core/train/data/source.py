"""Where training batches come from: latents in memory, a folder or a stream of images that are encoded on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ..parallel import Processes
from .batches import Batch, Conditioning, joined, rows, tensors_hash
from .buckets import BatchOrder
from .folder import ImageFolder
from .images import Example
from .webdataset import ImageStream

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


class _Encoding:
    """Pictures and captions through a model's encoders, one by one, so that no batch changes what comes out."""

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        encode_text: Callable[[str], Conditioning],
        encode_teacher_text: Callable[[str], Conditioning] | None = None,
    ):
        self._encode, self._encode_text, self._encode_teacher_text = encode, encode_text, encode_teacher_text
        self._prompts: dict[str, tuple[Conditioning, Conditioning | None]] = {}

    def latents(self, example: Example) -> Tensor:
        with torch.no_grad():
            return self._encode(example.pixels.unsqueeze(0))[0].float().cpu()

    def batch(self, latents: Sequence[Tensor], captions: Sequence[str]) -> Batch:
        for caption in captions:
            if caption not in self._prompts:
                with torch.no_grad():
                    teacher = self._encode_teacher_text(caption) if self._encode_teacher_text else None
                    self._prompts[caption] = (self._encode_text(caption), teacher)
        prompts = [self._prompts[caption] for caption in captions]
        teachers = [teacher for _, teacher in prompts if teacher is not None]
        return Batch(torch.stack(list(latents)), joined([c for c, _ in prompts]), joined(teachers) if teachers else None)

    def forget_prompts(self) -> None:
        self._prompts.clear()


class FolderSource:
    """A folder of images, encoded when first seen and kept; those whose crop changes are encoded each time.

    Args:
        encode: (1, 3, H, W) in [-1, 1] -> latents (1, C, h, w).
        encode_text, encode_teacher_text: a caption -> its conditioning, one row.
        indices: which of the folder's images; None takes all.
    """

    def __init__(
        self,
        folder: ImageFolder,
        encode: Callable[[Tensor], Tensor],
        encode_text: Callable[[str], Conditioning],
        encode_teacher_text: Callable[[str], Conditioning] | None = None,
        *,
        indices: Sequence[int] | None = None,
        batch_size: int = 1,
        seed: int = 0,
        processes: Processes = Processes(),  # noqa: B008 - frozen
    ):
        self.folder = folder
        self._encoding = _Encoding(encode, encode_text, encode_teacher_text)
        self._kept: dict[int, tuple[Tensor, str]] = {}
        self.indices = list(range(len(folder))) if indices is None else list(indices)
        self._among = frozenset(self.indices)
        sizes = [folder.sizes[k] for k in self.indices]
        self.order = BatchOrder(sizes, batch_size, seed, processes.rank, processes.world)
        self.advice = "; ".join(filter(None, (folder.advice, self.order.advice)))

    def batch(self, index: int) -> Batch:
        examples = [self._example(self.indices[k], index) for k in self.order.batch(index)]
        return self._encoding.batch([latents for latents, _ in examples], [caption for _, caption in examples])

    def _example(self, k: int, index: int) -> tuple[Tensor, str]:
        if k in self._kept:
            return self._kept[k]
        example = self.folder.read(k, index, self._among)
        encoded = (self._encoding.latents(example), example.caption)
        if self.folder.center_crop and not self.folder.flip:
            self._kept[k] = encoded
        return encoded

    def summary(self) -> dict[str, Any]:
        known = self.folder.summary()
        if len(self.indices) < len(self.folder):
            known["chosen"] = len(self.indices)
        return known

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class StreamSource:
    """A stream of images that is read once through; batches are asked for in order."""

    advice = ""

    def __init__(
        self,
        stream: ImageStream,
        encode: Callable[[Tensor], Tensor],
        encode_text: Callable[[str], Conditioning],
        encode_teacher_text: Callable[[str], Conditioning] | None = None,
    ):
        self.stream = stream
        self._encoding = _Encoding(encode, encode_text, encode_teacher_text)

    def batch(self, index: int) -> Batch:
        examples = self.stream.next_batch()
        self._encoding.forget_prompts()  # a stream's captions have no end
        return self._encoding.batch([self._encoding.latents(e) for e in examples], [e.caption for e in examples])

    def summary(self) -> dict[str, Any]:
        return self.stream.summary()

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stream.load_state_dict(state)


def _a_row_each(prompts: Prompts, count: int, what: str) -> list[Conditioning]:
    if isinstance(prompts, Mapping):
        prompts = [rows(prompts, [k]) for k in range(len(next(iter(prompts.values()))))]
    if len(prompts) not in (1, count):
        raise ValueError(f"{what}: {len(prompts)} prompts for {count} latents; expected as many, or one for all")
    return list(prompts) * count if len(prompts) == 1 else list(prompts)
