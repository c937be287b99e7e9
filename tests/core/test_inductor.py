"""torch.compile with its own compiler, not only with dynamo: what it makes of an adapted layer is what the layer computes."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from torch import nn

from styleinject_core import Adapter, AdapterConfig, attach

pytestmark = pytest.mark.skipif(
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


@pytest.mark.parametrize("size", [8, 32])  # one grouped convolution, and one for each image
@pytest.mark.parametrize("statistics", ["multiplicative", "none"])
def test_inductor_on_a_cpu(size, statistics) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    host = Layers().requires_grad_(False)
    adapter = Adapter.create(host, AdapterConfig(r=2, n_styles=3, target_modules=("all",), sta=statistics), name="style")
    for parameter in adapter.parameters():
        parameter.data.copy_(torch.randn_like(parameter) * 0.3)
    x = torch.randn(2, 4, size, size)
    with torch.no_grad(), attach(host, adapter):
        expected = host(x)
        compiled = torch.compile(host, backend="inductor", dynamic=False)(x)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(host(x), expected, atol=1e-2)
