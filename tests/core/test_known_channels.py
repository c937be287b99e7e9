"""A layer with other channels than an adapter was made for: it changes those it knows, or is left out and says so."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from styleinject_core import Adapter, AdapterConfig, AdapterMismatchError, attach


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.attn1 = nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_v": nn.Linear(4, 4)})


class Host(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_blocks = nn.ModuleList([Block(), Block()])


def trained(host, seed=0, **config):
    torch.manual_seed(seed)
    settings = {"r": 2, "n_styles": 3, "target_modules": ("all",), **config}
    adapter = Adapter.create(host, AdapterConfig(**settings), name=f"adapter{seed}")
    for p in adapter.parameters():
        p.data.copy_(torch.randn_like(p) * 0.3)
    return adapter


@pytest.fixture
def host():
    torch.manual_seed(0)
    return Host().requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def widened(conv: nn.Conv2d, inputs: int = 0, outputs: int = 0, told: bool = False) -> torch.Tensor:
    """Give a convolution more channels, whose weights are 1, behind those it has; `told`: its attributes say so too."""
    weight = torch.ones(conv.out_channels + outputs, conv.in_channels + inputs, 3, 3)
    weight[: conv.out_channels, : conv.in_channels] = conv.weight
    conv.weight = nn.Parameter(weight, requires_grad=False)
    if outputs:
        conv.bias = nn.Parameter(torch.cat([conv.bias, torch.zeros(outputs)]), requires_grad=False)
    if told:
        conv.in_channels, conv.out_channels = weight.shape[1], weight.shape[0]
    return weight


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("method", [{}, {"sta": "none"}])
@pytest.mark.parametrize("count", [1, 2])
def test_more_inputs_than_the_adapter_was_made_for(host, x, told, method, count) -> None:
    adapters = [trained(host, seed, **method) for seed in range(count)]
    conv = host.down_blocks[0].conv1
    with attach(host, adapters):
        expected = conv(x)
    base = conv(x)
    # what is behind the latent is 0 here: h, and with it every statistic, is what it was
    widened(conv, inputs=3, told=told)
    wide = torch.cat([x, torch.zeros(2, 3, 6, 6)], 1)
    with attach(host, adapters) as attached:
        torch.testing.assert_close(conv(wide), expected, rtol=1e-4, atol=1e-5)
        more = conv(torch.cat([x, torch.ones(2, 3, 6, 6)], 1))
    assert not torch.allclose(more, expected, atol=1e-2) and not torch.allclose(expected, base, atol=1e-2)
    assert attached.reports[0].narrowed == (("down_blocks.0.conv1",) if told else ())
    assert ("more input channels" in str(attached)) is told
    assert "forward" not in conv.__dict__


def test_more_outputs_than_the_adapter_was_made_for(host, x) -> None:
    adapter, conv = trained(host), host.down_blocks[0].conv1
    with attach(host, adapter):
        expected = conv(x)
    widened(conv, outputs=2)
    base = conv(x)
    with attach(host, adapter):
        out = conv(x)
    torch.testing.assert_close(out[:, :4], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(out[:, 4:], base[:, 4:])


def test_fewer_inputs_are_left_out_and_said_once(host, x, caplog) -> None:
    adapter, conv = trained(host), host.down_blocks[0].conv1
    conv.weight = nn.Parameter(conv.weight[:, :3].clone(), requires_grad=False)
    with caplog.at_level(logging.WARNING), attach(host, adapter):
        first, second = conv(x[:, :3]), conv(x[:, :3])
    (record,) = caplog.records
    assert torch.equal(first, conv(x[:, :3])) and torch.equal(first, second)
    said = record.getMessage()
    assert "adapter0: down_blocks.0.conv1 is left out" in said and "3x3 4->4" in said and "3 input" in said
    conv.in_channels = 3
    with attach(host, adapter) as attached:
        assert torch.equal(conv(x[:, :3]), first)
    assert "made for 4 input channels, the model has 3 (1): down_blocks.0.conv1" in str(attached)
    assert "5 of 6 layers matched" in str(attached)


def test_two_layers_of_another_size_are_another_model(host) -> None:
    adapter = trained(host)
    for block in host.down_blocks:
        widened(block.conv1, inputs=3, told=True)
    with pytest.raises(AdapterMismatchError, match=r"down_blocks.1.conv1: adapter made for .* 4->4, model has .* 7->4"):
        attach(host, adapter)
    assert all("forward" not in module.__dict__ for module in host.modules())


def test_the_only_layer_of_another_size_is_another_model(host) -> None:
    adapter = trained(host, target_modules=("down.0 & conv",))
    assert list(adapter.names) == ["down_blocks.0.conv1"]
    widened(host.down_blocks[0].conv1, inputs=3, told=True)
    with pytest.raises(AdapterMismatchError, match="a layer selector can leave it out"):
        attach(host, adapter)


def test_gradients_reach_an_adapter_on_a_wider_layer(host, x) -> None:
    adapter = trained(host)
    widened(host.down_blocks[0].conv1, inputs=3, told=True)
    with attach(host, adapter):
        host.down_blocks[0].conv1(torch.cat([x, torch.ones(2, 3, 6, 6)], 1)).square().mean().backward()
    grads = [p.grad for p in adapter.layers["down_blocks.0.conv1"].parameters()]
    assert grads and all(grad is not None and grad.isfinite().all() for grad in grads)
