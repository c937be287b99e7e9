"""Aspect-ratio buckets, and which examples make up which batch.

Pictures of one batch have one size, so that they stack; several sizes of about the same area let wide and tall pictures
keep their shape (NovelAI, "NovelAI improvements on Stable Diffusion", 2022).
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence
from functools import lru_cache
from itertools import count

Size = tuple[int, int]  # (H, W)


def bucket_sizes(resolution: int, step: int = 64, ratio: float = 2.0) -> tuple[Size, ...]:
    """The sizes pictures are cut to: multiples of `step`, of at most resolution² pixels, and as close to that as they come.

    Args:
        resolution: side of the square bucket, a multiple of `step`.
        ratio: longest side to shortest side, at most; 1 gives the square alone.

    Returns:
        (H, W) each, from the tallest to the widest.

    Raises:
        ValueError: a resolution that is no multiple of the step, or a ratio below 1.
    """
    if step < 1 or resolution < step or resolution % step:
        raise ValueError(f"resolution: expected a multiple of the bucket step {step}, found {resolution}")
    if not ratio >= 1:
        raise ValueError(f"bucket_ratio: expected at least 1, found {ratio}")
    tall = []
    for width in range(step, resolution + 1, step):
        height = resolution * resolution // width // step * step
        if height <= ratio * width:
            tall.append((height, width))
    return (*tall, *((width, height) for height, width in reversed(tall) if width != height))


def nearest_bucket(sizes: Sequence[Size], width: int, height: int) -> Size:
    """The bucket whose shape is closest to a picture's, by the factor between their aspect ratios."""
    shape = math.log(width / height)
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - shape))


class BatchOrder:
    """Which examples make up batch number k: a pure function of the seed and k, so resuming needs nothing but k.

    All examples of a batch share one bucket. Each bucket is an endless row of fresh shuffles of its examples, cut into
    batches; what is left of an epoch waits for the next one instead of being dropped or filled up, so that all examples are
    seen equally often: e times after e epochs, but for those that wait, less than one batch per bucket. A bucket with
    fewer examples than a batch repeats some within the batch.

    Args:
        sizes: (H, W) of every example.
        batch_size: examples per batch and process.
        seed: of the shuffles.
        rank, world: this process and how many there are. They divide a batch of batch_size * world, so that N processes
            of batch b see at every step what one process of batch N * b sees.

    Raises:
        ValueError: no examples, or a batch size, rank or world that cannot be.
    """

    def __init__(self, sizes: Sequence[Size], batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if not sizes:
            raise ValueError("sizes: expected at least one example, found none")
        check_share(batch_size, rank, world)
        self.batch_size, self.seed, self.rank = batch_size, seed, rank
        self._whole = batch_size * world
        self._members = {size: array("L") for size in sorted(set(sizes))}
        for index, size in enumerate(sizes):
            self._members[size].append(index)
        self._count = len(sizes)
        self._plan: tuple[int, list[tuple[Size, int]]] = (-1, [])

    @property
    def advice(self) -> str:
        """What to do about examples of so many sizes that most are seen several times in one batch; empty if they are not."""
        few = [len(m) for m in self._members.values() if len(m) < self._whole]
        if len(self._members) == 1 or 2 * sum(few) <= self._count:
            return ""
        return (
            f"{self._count} images have {len(self._members)} sizes, and {sum(few)} of them repeat within their batches of "
            f"{self._whole}, as a batch has one size; bring them to one size, or use batch_size 1 with accumulation"
        )

    def batch(self, step: int) -> list[int]:
        """The examples of this process at a step, `batch_size` of them."""
        epoch = self.epoch(step)
        size, number = self._batches_of(epoch)[step - self.steps(epoch)]
        members = self._members[size]
        first = number * self._whole + self.rank * self.batch_size
        places = (divmod(row, len(members)) for row in range(first, first + self.batch_size))
        return [members[_shuffled(f"{self.seed}/{size}/{lap}", len(members))[place]] for lap, place in places]

    def steps(self, epochs: int) -> int:
        """How many batches the first `epochs` epochs give."""
        return sum(epochs * len(members) // self._whole for members in self._members.values())

    def epoch(self, step: int) -> int:
        """The epoch a step belongs to, from 0."""
        if step < 0:
            raise ValueError(f"step: expected at least 0, found {step}")
        epoch = step * self._whole // self._count  # never too late; waiting examples can make it a little early
        while self.steps(epoch + 1) <= step:
            epoch += 1
        return epoch

    def _batches_of(self, epoch: int) -> list[tuple[Size, int]]:
        """(bucket, number of the batch within that bucket) of every step of an epoch."""
        if self._plan[0] != epoch:
            first = {size: epoch * len(m) // self._whole for size, m in self._members.items()}
            end = {size: (epoch + 1) * len(m) // self._whole for size, m in self._members.items()}
            order = [size for size in first for _ in range(first[size], end[size])]
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            number = {size: count(start) for size, start in first.items()}
            self._plan = epoch, [(size, next(number[size])) for size in order]
        return self._plan[1]


def check_share(batch_size: int, rank: int, world: int) -> None:
    """Refuse a batch size or a rank that cannot be (ValueError)."""
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
    if not 0 <= rank < world:
        raise ValueError(f"rank: expected 0 to {world - 1} (world = {world}), found {rank}")


@lru_cache(maxsize=32)
def _shuffled(seed: str, length: int) -> array:
    order = array("L", range(length))
    random.Random(seed).shuffle(order)  # type: ignore[arg-type]  # an array swaps items as a list does
    return order
