"""torch.compile: one graph without breaks, which other strengths and sizes fit; and what inductor makes of an adapted layer."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from torch import nn

from styleinject_core import Adapter, AdapterConfig, attach

needs_compiler = pytest.mark.skipif(
    sys.platform == "win32" or not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)


class Layers(nn.Module):
    """A convolution whose images each get a kernel of their own, a pointwise one, and a Linear."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.to_q = nn.Linear(4, 4)

    def forward(self, x):
        h = self.conv2(self.conv1(x))
        return self.to_q(h.flatten(2).mT)


def trained(host: nn.Module, **config) -> Adapter:
    """An adapter away from its initial value."""
    adapter = Adapter.create(host, AdapterConfig(r=2, n_styles=3, target_modules=("all",), **config), name="style")
    for parameter in adapter.parameters():
        parameter.data.copy_(torch.randn_like(parameter) * 0.3)
    return adapter


@needs_compiler
@pytest.mark.parametrize("size", [8, 32])  # one grouped convolution, and one for each image
@pytest.mark.parametrize("statistics", ["multiplicative", "none"])
def test_inductor_on_a_cpu(size, statistics) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    host = Layers().requires_grad_(False)
    adapter = trained(host, sta=statistics)
    x = torch.randn(2, 4, size, size)
    with torch.no_grad(), attach(host, adapter):
        expected = host(x)
        compiled = torch.compile(host, backend="inductor", dynamic=False)(x)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(host(x), expected, atol=1e-2)


@pytest.mark.parametrize("pool", ["mean", "paper"])
@pytest.mark.parametrize("count", [1, 2])
def test_one_graph_for_other_strengths_and_sizes(count, pool) -> None:
    """`fullgraph` allows no break; the one thing that is read as a number is a strength that has changed, which lies on the CPU."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    host, graphs = Layers().requires_grad_(False), []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph

    with torch.no_grad(), attach(host, [trained(host, router_pool=pool) for _ in range(count)]) as attachment:
        compiled = torch.compile(host, backend=backend, fullgraph=True)

        def check(size: int) -> int:
            x = torch.randn(2, 4, size, size)
            torch.testing.assert_close(compiled(x), host(x), rtol=1e-4, atol=1e-5)
            return len(graphs)

        sizes = [check(size) for size in (8, 10, 12, 14, 16)]
        strengths = []
        for strength in (0.5, 0.7, 1.3, -0.2):
            attachment.set_strength(strength)
            strengths.append(check(16))
    assert sizes[1:] == [2] * 4 and strengths == [3] * 4, "a value that changes is a number in the graph from then on"
    assert all("softmax" in " ".join(names) for names in graphs)
    assert [names.count("item") for names in graphs] == [0, 0, 3 * 2 * count]
