"""How many kernels an adapted layer launches: counted below autograd, so that it is the same on every machine."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

MOST = {"Linear, fold": 14, "Linear, stack": 15, "3x3 convolution, fold": 22}


@pytest.fixture(scope="module")
def bench():
    path = sys.path.copy()
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        yield importlib.import_module("host_cost")
    finally:
        sys.path[:] = path


@pytest.mark.parametrize("adapters", [1, 4])
@pytest.mark.parametrize("layer", MOST)
def test_launches_in_half_precision(bench, layer, adapters):
    """Four adapters launch no more than one."""
    names = bench.count(layer, adapters)
    assert len(names) <= MOST[layer], names
    assert {"softmax", "_softmax"} & set(names), "the router was not among what was counted"


def test_views_and_allocations_are_not_counted(bench):
    import torch

    x = torch.randn(4, 4)
    assert bench.launches(lambda: torch.empty(3).view(3, 1).expand(3, 2)) == []
    assert bench.launches(lambda: (x @ x.mT).relu_()) == ["mm", "relu_"]


def test_a_reference_launches_one_kernel_a_layer(bench):
    """What appends its rows, and nothing that makes them: they are made in the first call."""
    import torch
    from torch import nn

    from styleinject_core.call import CurrentCall
    from styleinject_core.deadiff.inject import _Appended
    from styleinject_core.deadiff.rows import ConstantRows
    from styleinject_core.layers import LayerShape
    from styleinject_core.override import Override, Tail

    to_k, x = nn.Linear(8, 8).half(), torch.randn(2, 77, 8).half()
    bare = bench.launches(lambda: to_k(x))
    rows = ConstantRows(torch.randn(1, 16, 8), torch.zeros(1, 16, 8), 77)
    Override(to_k, LayerShape.of(to_k)).install(Tail(_Appended(rows, "to_k"), CurrentCall()))
    assert bench.launches(lambda: to_k(x)) == [*bare, "cat"]
    assert to_k(x).shape == (2, 93, 8)
