"""Parameters of several adapters in one storage, so that one product reads them all and there is no second copy of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stacked(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape lie one after the other in one storage; they are made so where each has its own.

    Not where they are trained, on different devices, of different dtypes, or parts of another stack.
    """
    first = tensors[0]
    size = first.numel() * first.element_size()
    if all(t.data_ptr() == first.data_ptr() + j * size and t.is_contiguous() for j, t in enumerate(tensors)):
        # else neighbors by chance, in storages of their own
        return first.untyped_storage().nbytes() >= first.storage_offset() * first.element_size() + len(tensors) * size
    for tensor in tensors:
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == size
        same = tensor.dtype == first.dtype and tensor.device == first.device and tensor.shape == first.shape
        same = same and tensor.is_inference() == first.is_inference()
        if tensor.requires_grad or not whole or not same or not isinstance(tensor, torch.nn.Parameter):
            return False
    if len({tensor.data_ptr() for tensor in tensors}) < len(tensors):
        return False  # one adapter twice
    # In the mode they were made in: an inference tensor with the data of an ordinary one can have no views any more.
    with torch.inference_mode(first.is_inference()), torch.no_grad():
        stack = torch.stack([tensor.detach() for tensor in tensors])
        for tensor, part in zip(tensors, stack, strict=True):
            tensor.data = part
    return True
