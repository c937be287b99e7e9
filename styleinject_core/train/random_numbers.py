"""Random numbers that depend on the seed and the place in the run alone: what makes a resumed or a shared run the same."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from .parallel import Processes

VALIDATION = -1  # the pass whose noise and times never change


class RandomNumbers:
    """The random numbers of one forward pass.

    They are drawn for the rows of all processes together, and each takes its own: N processes with batch b see what
    one process with batch N b sees.

    Args:
        seed: of the run.
        index: which forward pass of the run, counted from 0.
        processes: who shares the batch.
    """

    def __init__(self, seed: int, index: int, processes: Processes = Processes()):  # noqa: B008 - frozen
        self.index, self.processes = index, processes
        digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=7).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))

    def uniform(self, rows: int) -> Tensor:
        """(rows,) float32 in [0, 1)."""
        return self._rows_here(torch.rand(rows * self.processes.world, generator=self.generator), rows)

    def normal(self, like: Tensor) -> Tensor:
        """ε ~ N(0, 1) with the shape and on the device of `like` (B, ...), float32."""
        rows = like.shape[0]
        noise = torch.randn(rows * self.processes.world, *like.shape[1:], generator=self.generator)
        return self._rows_here(noise, rows).to(like.device)

    def _rows_here(self, numbers: Tensor, rows: int) -> Tensor:
        return numbers[self.processes.rank * rows :][:rows]
