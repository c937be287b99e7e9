"""What a forward pass keeps for the backward pass: counted, not guessed.

The model runs once on tensors that have shapes and no values (PyTorch's fake tensors), which takes seconds and no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from .data.batches import Conditioning, mapped, rows
from .models.training_model import TrainingModel


@dataclass
class Kept:
    """Bytes of what one forward pass keeps for the backward pass, weights apart.

    Args:
        outside: kept outside of the blocks.
        blocks: block -> kept inside of it.
        inputs: what blocks are given, each tensor once: what is left of them with gradient checkpointing.
        outputs: what blocks put out, which distillation compares.
        largest: the largest of all these tensors.
    """

    outside: int = 0
    blocks: dict[str, int] = field(default_factory=dict)
    inputs: int = 0
    outputs: int = 0
    largest: int = 0

    @property
    def whole(self) -> int:
        """Without gradient checkpointing."""
        return self.outside + sum(self.blocks.values())

    @property
    def checkpointed(self) -> int:
        """With it: the inputs of all blocks, and one block whole."""
        return self.outside + self.inputs + max(self.blocks.values(), default=0)


class _Prediction(nn.Module):
    """A prediction as a module's forward, so that `functional_call` can put other tensors in the place of its weights."""

    def __init__(self, model: TrainingModel, adapter: Adapter):
        super().__init__()
        self.whole, self.adapter = model.whole, adapter
        self._model = (model,)  # in a tuple: this is no part of the model, which has a denoiser itself

    def forward(self, noisy: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        (model,) = self._model
        with model.attachment(self.adapter):
            return model.predict(noisy, times, conditioning)


def count(
    model: TrainingModel,
    adapter: Adapter,
    latents: Sequence[int],
    conditioning: Conditioning,
    batch: int = 1,
    dtype: torch.dtype | None = None,
) -> Kept:
    """What a forward pass of `batch` images keeps.

    Args:
        adapter: untrained, with gradients; its values do not matter.
        latents: shape of one image's, (C, ..., H, W).
        conditioning: one prompt, one row.
        dtype: count as if the model's weights were of this one.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    call = _Prediction(model, adapter)
    with torch.inference_mode(False), torch.enable_grad(), FakeTensorMode(allow_non_fake_inputs=True):

        def shaped(tensor: Tensor, trained: bool = False) -> Tensor:
            kind = dtype if dtype is not None and tensor.is_floating_point() and not trained else tensor.dtype
            return torch.empty(tensor.shape, dtype=kind, device=model.device, requires_grad=trained)

        tensors = {name: shaped(p, p.requires_grad and name.startswith("adapter.")) for name, p in call.named_parameters()}
        tensors |= {name: shaped(b) for name, b in call.named_buffers()}
        prompts = rows(mapped(conditioning, shaped), [0] * batch)
        noisy = torch.empty(batch, *latents, device=model.device)
        times = torch.empty(batch, device=model.device)
        weights = {_storage(tensor) for tensor in tensors.values()}
        with _counting(model.blocks(), weights) as kept:
            torch.func.functional_call(call, tensors, (noisy, times, prompts))
    return kept


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def _counting(blocks: Mapping[str, nn.Module], weights: set[int]) -> Iterator[Kept]:
    kept, inside = Kept(), list[str]()
    seen, given, put_out = dict[int, Tensor](), dict[int, Tensor](), dict[int, Tensor]()

    def size(tensor: Tensor) -> int:
        return tensor.untyped_storage().nbytes()

    def pack(tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if key not in weights and key not in seen:
            seen[key] = tensor  # held, so that no other storage gets its address
            kept.largest = max(kept.largest, size(tensor))
            if inside:
                kept.blocks[inside[-1]] = kept.blocks.get(inside[-1], 0) + size(tensor)
            else:
                kept.outside += size(tensor)
        return tensor

    def enter(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, named: dict[str, Any]) -> None:
            inside.append(name)
            for tensor in _tensors((*args, *named.values())):
                if _storage(tensor) not in weights:
                    given.setdefault(_storage(tensor), tensor)

        return hook

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        inside.pop()
        for tensor in _tensors(output if isinstance(output, (tuple, list)) else [output]):
            put_out.setdefault(_storage(tensor), tensor)

    handles = [block.register_forward_pre_hook(enter(name), with_kwargs=True) for name, block in blocks.items()]
    handles += [block.register_forward_hook(leave) for block in blocks.values()]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield kept
    finally:
        for handle in handles:
            handle.remove()
    kept.inputs = sum(map(size, given.values()))
    kept.outputs = sum(map(size, put_out.values()))


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]
