"""Data-parallel training: one process, or as many as `accelerate launch` (or torchrun) started."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among all that train together; gradients are averaged over them."""

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their mean over all processes; one message per device and dtype."""
        if self.world == 1:
            return
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        for same in kinds.values():
            flat = torch.cat([tensor.flatten() for tensor in same])
            torch.distributed.all_reduce(flat)
            flat /= self.world
            for tensor, mean in zip(same, flat.split([t.numel() for t in same]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.world == 1:
            return flag
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        value = torch.tensor([float(flag)], device=device)
        torch.distributed.all_reduce(value)
        return bool(value.item() > 0)

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            torch.distributed.barrier()


def launched_processes() -> Processes:
    """The processes that a launcher started, connected through accelerate; this one alone where none did.

    Raises:
        ImportError: several processes, but accelerate is not installed.
        RuntimeError: the processes could not be connected.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError("training in several processes needs a package: pip install accelerate") from error
    # the main process may draw images for hours while the others wait for it
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    if state.num_processes == 1:
        raise RuntimeError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but accelerate found one process: check its launcher")
    return Processes(state.process_index, state.num_processes)


def launched_device() -> torch.device:
    """The device of this process: its own GPU where there are several processes."""
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        return torch.device("cuda", index)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
