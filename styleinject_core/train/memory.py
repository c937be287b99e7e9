"""How much memory a training needs, and what to do without where there is less of it."""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn

from ..adapter import Adapter
from .activations import Kept, count
from .data.batches import Conditioning, nbytes
from .models.training_model import TrainingModel
from .request import SIZES, AdapterRequest, TrainingRequest
from .settings import MEMORY_AUTO, MEMORY_OFF, MEMORY_SIZES, TrainSettings

GB = 2**30  # as card makers count
_PASSING = 3  # largest kept tensors that are around at once beside the others: gradients on their way, what an operation needs
_STATE = {"adamw": 8, "schedulefree": 8, "prodigy": 16}  # bytes of optimizer state for each trained number
_STEP = 4  # and of what the optimizer's step makes meanwhile
_SMALL_8BIT = 4096  # smaller tensors keep their 32 bits in bitsandbytes
_8BIT = 2 * (1 + 4 / 256)  # two moments of a byte, and a scale for each 256
_MOST_IN_RAM = 0.9  # of the frozen weights


class MemoryChoiceError(ValueError):
    """A memory choice that cannot be kept; says what would fit."""


@dataclass(frozen=True)
class Need:
    """Bytes that a training takes on its device.

    Args:
        weights: of the frozen models, as they are stored.
        trained: the adapter in float32, its gradients, and the optimizer's state.
        passes: what forward passes keep, and what is on its way in the backward pass; or what the optimizer's step makes.
        data: latents and prompts.
    """

    weights: int
    trained: int
    passes: int
    data: int

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.passes + self.data

    def __str__(self) -> str:
        parts = {
            "model": self.weights,
            "adapter, gradients and optimizer": self.trained,
            "forward and backward pass": self.passes,
        }
        return f"{_gb(self.total)} ({', '.join(f'{name} {_gb(size)}' for name, size in parts.items())})"


def prompt_features(model: TrainingModel, conditioning: Conditioning) -> int:
    """The width of a model's text conditioning, of what it is given for a prompt; 0 where it has none."""
    text = model.text(conditioning)
    return 0 if text is None else text.shape[-1]


@dataclass
class Workload:
    """A training, as far as its memory goes.

    Args:
        latents: shape of the largest image's, (C, ..., H, W).
        conditioning: a prompt, one row.
        images: how many there are; where the model runs on the CPU, all of them share its memory.
        teacher: the model it learns from.
        passes: forward passes that are kept at once: 2 with DreamBooth's class images.
        features: whether the blocks of teacher and student are compared.
        may_checkpoint: whether blocks can run again.
        casts: whether the frozen model can be brought to bfloat16.
        may_lend: whether weights can stay in RAM, and come to the device for the time that a block runs.
    """

    model: TrainingModel
    request: TrainingRequest
    latents: Sequence[int]
    conditioning: Conditioning
    images: int = 1
    teacher: TrainingModel | None = None
    passes: int = 1
    features: bool = False
    may_checkpoint: bool = True
    casts: bool = False
    may_lend: bool = False

    def __post_init__(self) -> None:
        self._kept = cache(self._count)
        self._numbers = cache(self._parameters)

    def _parameters(self, adapter: AdapterRequest) -> list[int]:
        """Numbers in each trained tensor."""
        return [p.numel() for p in self._adapter(adapter).parameters()]

    def _adapter(self, adapter: AdapterRequest) -> Adapter:
        with torch.device("meta"):
            return replace(self.request, adapter=adapter).new_adapter(
                self.model.layer_shapes(), prompt_features(self.model, self.conditioning)
            )

    def _count(self, batch: int, dtype: torch.dtype | None) -> Kept:
        adapter = self._adapter(self.request.adapter)  # a smaller one keeps a little less
        return count(self.model, adapter, self.latents, self.conditioning, batch, dtype)

    def need(self, adapter: AdapterRequest, settings: TrainSettings, dtype: torch.dtype | None = None) -> Need:
        """What it takes with this adapter and these settings."""
        numbers, kept = self._numbers(adapter), self._kept(settings.batch_size, dtype)
        held = self.passes * (kept.checkpointed if settings.gradient_checkpointing else kept.whole)
        held += _PASSING * kept.largest + (2 * kept.outputs if self.features else 0)
        count = settings.batch_size if self.model.device.type != "cpu" else self.images
        return Need(
            weights=self.weights(dtype),
            trained=sum(8 * size + _state(size, settings.optimizer) for size in numbers),
            passes=max(held, _STEP * sum(numbers)),
            data=count * (4 * torch.Size(self.latents).numel() + nbytes(self.conditioning)),
        )

    def weights(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of the frozen models."""
        models = [self.model] if self.teacher is None else [self.model, self.teacher]
        return sum(_bytes(model.whole, dtype) for model in models)

    def smaller_pictures(self, part: float) -> Workload:
        """The same on pictures of this part of the side."""
        height, width = (max(8, int(side * part) // 8 * 8) for side in self.latents[-2:])
        return replace(self, latents=(*self.latents[:-2], height, width))


@dataclass(frozen=True)
class Choice:
    """What a training runs with.

    Args:
        request: with all numbers chosen.
        dtype: what the frozen model is brought to; None leaves it.
        lent: bytes of frozen weights that stay in RAM.
        need: on the device, without what stays in RAM; None where nothing was counted.
        report: what was chosen and why, in words.
    """

    request: TrainingRequest
    dtype: torch.dtype | None = None
    lent: int = 0
    need: Need | None = None
    report: str = ""

    @property
    def beside_weights(self) -> int:
        """Bytes needed beside the frozen weights."""
        return 0 if self.need is None else self.need.total - self.need.weights


def choose(work: Workload, free: int, previous: Mapping[str, Any] | None = None) -> Choice:
    """Fit a training into the memory that `request.settings.memory` names.

    What changes nothing in the result is tried first; rank and styles are chosen only where they are 0.

    Args:
        free: bytes that "auto" may use.
        previous: fields of the settings and of the adapter's config that an earlier run of the same name had: it is continued
            as long as that fits.

    Raises:
        MemoryChoiceError: nothing fits.
        ValueError: an adapter that the model has no layers for.
    """
    request = work.request
    asked = request.adapter.sized(*SIZES[0])
    work._numbers(asked)  # raises where the model has not these layers
    if request.settings.memory == MEMORY_OFF:
        return Choice(replace(request, adapter=asked))
    room, limit = _room(request.settings.memory, free)
    try:
        found = _best(work, room, previous or {})
    except Exception as error:  # a model that looks at values while it runs, or a kind of tensor that has no fake
        settings = replace(request.settings, gradient_checkpointing=work.may_checkpoint)
        how = f"gradient checkpointing is {'on' if work.may_checkpoint else 'off'}, the rest as configured"
        report = f"Memory: this model cannot be counted ({type(error).__name__}: {str(error)[:80]}); {how}."
        return Choice(replace(request, adapter=asked, settings=settings), report=report)
    if found is None:
        raise MemoryChoiceError(_advice(work, room, limit))
    return replace(found, report=_report(found, limit))


def _best(work: Workload, room: int, previous: Mapping[str, Any]) -> Choice | None:
    """The candidate that fits at the lowest cost; None where none does."""

    def cost(choice: Choice) -> tuple[Any, ...]:
        made, settings = choice.request.adapter, choice.request.settings
        values = {**made.config().to_dict(), **vars(settings)}
        same = all(values.get(name) == value for name, value in previous.items())
        changed = settings.optimizer != work.request.settings.optimizer
        levels = -(made.rank * made.styles), changed, choice.dtype is not None
        return (not same, choice.lent, *levels, settings.gradient_checkpointing, settings.accumulation)

    return min(_fitting(work, room), key=cost, default=None)


def _fitting(work: Workload, room: int) -> Iterator[Choice]:
    for request, dtype in _candidates(work):
        need = work.need(request.adapter, request.settings, dtype)
        over = max(0, need.total - room)
        if over and not (work.may_lend and request.settings.gradient_checkpointing and over <= _MOST_IN_RAM * need.weights):
            continue
        yield Choice(request, dtype, over, replace(need, weights=need.weights - over))


def _candidates(work: Workload) -> Iterator[tuple[TrainingRequest, torch.dtype | None]]:
    """Every combination of what may be chosen, with as many images a step as asked for."""
    asked, adapter = work.request.settings, work.request.adapter
    images = asked.batch_size * asked.accumulation
    batches = [size for size in range(1, asked.batch_size + 1) if images % size == 0]
    optimizers = [asked.optimizer]
    if asked.optimizer == "adamw" and work.model.device.type == "cuda" and importlib.util.find_spec("bitsandbytes"):
        optimizers.append("adamw8bit")
    checkpointing = {True, asked.gradient_checkpointing} if work.may_checkpoint else {asked.gradient_checkpointing}
    dtypes = [None, torch.bfloat16] if work.casts else [None]
    adapters = dict.fromkeys(adapter.sized(*size) for size in SIZES)
    for made, batch, optimizer, again, dtype in itertools.product(adapters, batches, optimizers, checkpointing, dtypes):
        settings = replace(
            asked, batch_size=batch, accumulation=images // batch, optimizer=optimizer, gradient_checkpointing=again
        )
        yield replace(work.request, adapter=made, settings=settings), dtype


def _room(memory: str, free: int) -> tuple[int, str]:
    """Bytes that a training may take, and what sets that limit, in words. Some are the driver's, the desktop's, and lost
    between tensors."""
    if memory == MEMORY_AUTO:
        return int(0.95 * free) - GB // 4, f"{_gb(free)} free"
    return int(0.9 * MEMORY_SIZES[memory] * GB) - GB // 2, f"a card of {memory}"


def _advice(work: Workload, room: int, limit: str) -> str:
    """What would fit, where nothing does."""
    least = min(
        (work.need(made.adapter, made.settings, dtype) for made, dtype in _candidates(work)), key=lambda need: need.total
    )
    fits = []
    if work.request.settings.memory != MEMORY_AUTO:
        larger = [name for name in MEMORY_SIZES if _room(name, 0)[0] >= least.total]
        fits += [f'memory "{larger[0]}"'] if larger else []
    for part in (0.75, 0.5):
        if _best(work.smaller_pictures(part), room, {}) is not None:
            fits.append(f"pictures of {part:.0%} of the side")
            break
    rank, styles = SIZES[-1]
    small = replace(work.request, adapter=replace(work.request.adapter, rank=rank, styles=styles))
    if work.request.adapter != small.adapter and _best(replace(work, request=small), room, {}) is not None:
        fits.append(f"rank {rank} with {styles} styles")
    what = f"; what would fit: {', or '.join(fits)}" if fits else "; a smaller model, or one with weights in fp8, may fit"
    return (
        f'memory "{work.request.settings.memory}": {limit}, of which a training can have {_gb(room)}, and this one needs '
        f'{least} at least, with everything on that saves memory{what}. "{MEMORY_OFF}" tries it as configured'
    )


def _report(choice: Choice, limit: str) -> str:
    """What was chosen, in words."""
    made, settings = choice.request.adapter, choice.request.settings
    config = made.config()
    sizes = {"rank": getattr(config, "r", None), "styles": getattr(config, "n_styles", None)}
    words = [f"{value} {name}" if name == "styles" else f"{name} {value}" for name, value in sizes.items() if value is not None]
    passes = f" x {settings.accumulation}" if settings.accumulation > 1 else ""
    words += [
        f"batch {settings.batch_size}{passes}",
        f"gradient checkpointing {'on' if settings.gradient_checkpointing else 'off'}",
        settings.optimizer,
        *(["the model in bfloat16"] if choice.dtype else []),
        *([f"{_gb(choice.lent)} of the model in RAM"] if choice.lent else []),
    ]
    return (
        f"Memory {settings.memory} ({limit}): {', '.join(words)}. Needs about {choice.need}; counted from the shapes of its "
        "tensors, not measured on a graphics card."
    )


def free_memory(device: torch.device) -> int:
    """Bytes that a training on this device may use, those that this process has already taken there among them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    with suppress(OSError, ValueError, StopIteration):  # Linux
        with open("/proc/meminfo") as file:
            line = next(line for line in file if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    return 64 * GB  # the system pages out


def _bytes(module: nn.Module, dtype: torch.dtype | None) -> int:
    """Of its parameters and buffers, as they are stored or as they would be in another dtype."""
    tensors = {id(tensor): tensor for tensor in itertools.chain(module.parameters(), module.buffers())}.values()
    return sum(t.numel() * (dtype.itemsize if dtype and t.is_floating_point() else t.element_size()) for t in tensors)


def _state(size: int, optimizer: str) -> int:
    """Bytes of optimizer state of a tensor with so many numbers."""
    if optimizer == "adamw8bit":
        return 8 * size if size < _SMALL_8BIT else int(_8BIT * size)
    return _STATE[optimizer] * size


def _gb(size: int) -> str:
    return f"{size / GB:.1f} GB" if size >= GB // 10 or not size else f"{size / 2**20:.0f} MB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that a device, or the computer, has no more memory."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|not enough memory|allocate memory", str(error)))
