"""attach and detach are an inverse pair, in any order, on any host, and around foreign forward overrides."""

from __future__ import annotations

import contextlib
import copy
import itertools

import pytest
import torch
from torch import nn

from styleinject_core import Adapter, AdapterConfig, AdapterMismatchError, Applied, LayerShape, SelectorError, attach
from styleinject_core.attach import Attachment, Place
from styleinject_core.call import Listener, ModelCall
from styleinject_core.functional import reference
from styleinject_core.functional.host import HostLayer
from styleinject_core.site import Rows


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.attn1 = nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_v": nn.Linear(4, 4)})

    def forward(self, x):
        h = self.conv1(x).flatten(2).mT
        return self.attn1["to_q"](h) + self.attn1["to_v"](h)


class Host(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        return sum(block(x) for block in self.down_blocks)


def trained(host, seed=0, **config):
    torch.manual_seed(seed)
    config = {"r": 2, "n_styles": 3, "target_modules": ("to_q", "to_v", "conv1"), **config}
    adapter = Adapter.create(host, AdapterConfig(**config), name=f"adapter{seed}")
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


def state(host):
    return [dict(m.__dict__) for m in host.modules()]


def test_a_second_with_installs_again(host, x):
    base, attachment = host(x), attach(host, trained(host))
    with attachment:
        first = host(x)
    assert torch.equal(host(x), base)
    with attachment:
        assert torch.equal(host(x), first) and not torch.equal(first, base)
    assert torch.equal(host(x), base)


def test_a_layer_of_another_size_can_be_left_out(host, x):
    adapter, base = trained(host), host(x)
    other = Host().requires_grad_(False)
    other.load_state_dict(host.state_dict())
    other.down_blocks[0].conv1 = nn.Conv2d(4, 4, 1)
    with pytest.raises(AdapterMismatchError, match=r'a layer selector can leave it out: "!down_blocks.0.conv1"'):
        attach(other, adapter)
    assert "forward" not in other.down_blocks[1].conv1.__dict__
    with attach(other, adapter, layers="!down_blocks.0.conv1") as attachment:
        assert "down_blocks.0.conv1" not in attachment.reports[0].matched
        other.down_blocks[0].conv1 = host.down_blocks[0].conv1
        with attach(host, adapter, layers="!down_blocks.0.conv1"):
            torch.testing.assert_close(other(x), host(x))
    assert torch.equal(host(x), base)


def test_detach_restores_the_host_in_any_order(host, x):
    before, base = state(host), host(x)
    for order in itertools.permutations(range(3)):
        attachments = [attach(host, trained(host, seed)) for seed in range(3)]
        assert not torch.allclose(host(x), base)
        for k in order:
            attachments[k].detach()
        assert state(host) == before
        assert torch.equal(host(x), base)


def test_attachments_add_up_whatever_their_order(host, x):
    base = host.down_blocks[0].conv1(x)
    adapters = [trained(host, seed, target_modules=("conv1",)) for seed in range(2)]
    alone = []
    for adapter in adapters:
        with attach(host, adapter):
            alone.append(host.down_blocks[0].conv1(x) - base)
    with attach(host, adapters[1]), attach(host, adapters[0]):
        nested = host.down_blocks[0].conv1(x)
    with attach(host, adapters):
        together = host.down_blocks[0].conv1(x)
    torch.testing.assert_close(nested, base + alone[0] + alone[1])
    torch.testing.assert_close(together, nested)


def test_strength_zero_is_bit_identical_and_strengths_are_live(host, x):
    base = host(x)
    adapter = trained(host)
    with attach(host, adapter, strength=0.0) as attachment:
        assert torch.equal(host(x), base)
        attachment.set_strength(1.0)
        full = host(x)
        assert not torch.allclose(full, base)
        attachment.set_strength(1.0, dma=0.0, sta=0.0)
        assert torch.equal(host(x), base)
        attachment.set_strength(1.0, dma=1.0, sta=1.0)
        assert torch.equal(host(x), full)
        with pytest.raises(ValueError, match="not attached here"):
            attachment.set_strength(1.0, adapter=trained(host, 5))
    with attach(host, adapter, strength=-1.0):
        assert not torch.allclose(host(x), full)


def test_an_exception_inside_leaves_a_clean_host(host, x):
    before = state(host)
    with pytest.raises(RuntimeError, match="interrupted"), attach(host, trained(host)):
        raise RuntimeError("interrupted")
    assert state(host) == before


def test_a_failing_attach_touches_nothing(host):
    before = state(host)
    other = Host()
    other.down_blocks[1].conv1 = nn.Conv2d(4, 8, 3, padding=1)
    with pytest.raises(
        AdapterMismatchError, match=r"down_blocks.1.conv1: adapter made for Conv2d 3x3 4->8, model has Conv2d 3x3 4->4"
    ):
        attach(host, [trained(host), trained(other, target_modules=("conv1",))])
    with pytest.raises(AdapterMismatchError, match="none of its 1 layers"):
        attach(nn.Sequential(nn.Linear(4, 4)), trained(host, target_modules=("down_blocks.0.conv1",)))
    with pytest.raises(SelectorError, match="matches none"):
        attach(host, trained(host), layers="cross")
    for bad in (float("nan"), float("inf"), "1"):
        with pytest.raises(ValueError, match="strength must be a finite number"):
            attach(host, trained(host), strength=bad)
    assert state(host) == before


def test_partial_match_is_reported(host, x):
    adapter = trained(host)
    del host.down_blocks[1].attn1["to_q"]
    with attach(host, adapter) as attachment:
        report = attachment.reports[0]
        assert report.unmatched == ("down_blocks.1.attn1.to_q",)
        assert "5 of 6 layers matched" in str(attachment)


def test_foreign_override_below_and_above(host, x):
    """A forward somebody set before us is part of the host; one set after us stays, and ours passes through."""
    module = host.down_blocks[0].conv1
    adapter = trained(host, target_modules=("down_blocks.0.conv1",))
    plain = module(x)

    module.forward = lambda y: 2 * type(module).forward(module, y)
    below = module.forward
    attachment = attach(host, adapter)
    assert not torch.allclose(module(x), 2 * plain)
    attachment.detach()
    assert module.__dict__["forward"] is below
    del module.forward

    attachment = attach(host, adapter)
    ours = module.forward
    module.forward = lambda y: ours(y) + 1
    attachment.detach()
    torch.testing.assert_close(module(x), plain + 1)
    second = attach(host, adapter)
    assert not torch.allclose(module(x), plain + 1)
    second.detach()
    torch.testing.assert_close(module(x), plain + 1)


def test_layer_weights_and_selector(host, x):
    adapter = trained(host)
    with attach(host, adapter, layers="attention", layer_weights="down.1 = 0; to_v = 0.5") as attachment:
        strengths = {site.name: site.dma for site in attachment.sites[0]}
    assert strengths["down_blocks.0.conv1"] == 0
    assert strengths["down_blocks.1.attn1.to_q"] == 0
    assert strengths["down_blocks.0.attn1.to_v"] == strengths["down_blocks.1.attn1.to_v"] == 0.5
    assert strengths["down_blocks.0.attn1.to_q"] == 1


@pytest.mark.parametrize("shape", [(4,), (3, 4), (3, 1, 4), (2, 3, 5, 4)])
def test_linear_inputs_of_any_rank(shape):
    host = nn.ModuleDict({"to_q": nn.Linear(4, 6)})
    adapter = trained(host, target_modules=("to_q",))
    y = torch.randn(shape)
    if len(shape) == 1:
        y = y.unsqueeze(0)
    with torch.no_grad(), attach(host, adapter):
        out = host["to_q"](y)
        assert out.shape == (*y.shape[:-1], 6)
        tokens = host["to_q"](y.reshape(y.shape[0], -1, 4))
    torch.testing.assert_close(out.reshape(tokens.shape), tokens)


def test_hooks_on_the_host_keep_working(host, x):
    """A layer with forward hooks is called, not folded: the hook sees the frozen layer's call."""
    calls = []
    host.down_blocks[0].conv1.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad(), attach(host, trained(host)):
        host(x)
    assert len(calls) == 1


def test_a_listener_sees_and_replaces_the_style_probabilities(host, x):
    adapter = trained(host, target_modules=("to_q",))
    seen = []

    class Spy(Listener):
        def record(self, layer, s):
            seen.append(s)

    class One(Listener):
        def steer(self, layer, s):
            return torch.eye(3)[:1].expand_as(s)

    with torch.no_grad(), attach(host, adapter) as attachment:
        routed = host(x)
        with attachment.in_call(ModelCall(listeners=(Spy(),))):
            assert torch.equal(host(x), routed)
        assert len(seen) == 2 and seen[0].shape == (2, 3)
        torch.testing.assert_close(seen[0].sum(-1), torch.ones(2))
        with attachment.in_call(ModelCall(listeners=(One(),))):
            assert not torch.allclose(host(x), routed)
        assert torch.equal(host(x), routed) and len(seen) == 2


def test_applied_carries_its_own_strengths(host, x):
    a, b = trained(host, 0), trained(host, 1)
    with attach(host, [Applied(a, 0.5, layers="conv"), Applied(b, dma=0.0)]) as attachment:
        host(x)
        assert {s.dma for s in attachment.sites[0]} == {0.0, 0.5}
        assert {(s.dma, s.sta) for s in attachment.sites[1]} == {(0.0, 1.0)}


@pytest.mark.parametrize("inference", [True, False])
def test_adapters_loaded_in_inference_mode_run_in_and_out_of_it(inference: bool) -> None:
    """As in ComfyUI, whose nodes run in that mode: one alone, two side by side, the first alone, both again."""
    with torch.inference_mode():
        host = Host().requires_grad_(False)
        adapters = [trained(host, seed).requires_grad_(False) for seed in (1, 2)]
    x = torch.randn(2, 4, 6, 6)

    def run(*numbers: int) -> torch.Tensor:
        with torch.inference_mode(inference), torch.no_grad(), attach(host, [adapters[k] for k in numbers]):
            return host(x).clone()

    alone = run(0)
    both = run(0, 1)
    assert not torch.allclose(alone, both)
    torch.testing.assert_close(run(0), alone)
    torch.testing.assert_close(run(0, 1), both)


def data_twice(parameter: torch.Tensor) -> None:
    """Other numbers of a parameter, where its first ones were: its storage is freed in between, and its version stays."""
    address, values = parameter.data_ptr(), -parameter.detach().clone()
    parameter.data = torch.empty(0)
    candidates = [torch.empty_like(values) for _ in range(100)]  # the allocator gives the place to one of these
    parameter.data = next((c for c in candidates if c.data_ptr() == address), candidates[0]).copy_(values)


CHANGES = {
    "nothing": lambda host, attachment, adapters: None,
    "a strength": lambda host, attachment, adapters: attachment.set_strength(0.3, adapter=adapters[0]),
    "one part's strength": lambda host, attachment, adapters: attachment.set_strength(1.0, adapter=adapters[0], sta=-0.5),
    "a parameter in place": lambda host, attachment, adapters: adapters[0].layers["layer"].B.add_(0.5),
    "a router in place": lambda host, attachment, adapters: adapters[0].layers["layer"].router_weight.mul_(-3),
    "another parameter": lambda host, attachment, adapters: setattr(
        adapters[0].layers["layer"], "A", nn.Parameter(-adapters[0].layers["layer"].A.detach().clone(), requires_grad=False)
    ),
    "a parameter's data": lambda host, attachment, adapters: setattr(
        adapters[0].layers["layer"].hyper_weight, "data", -adapters[0].layers["layer"].hyper_weight.data
    ),
    **{
        f"the data of {part}, twice": lambda host, attachment, adapters, part=part: data_twice(
            getattr(adapters[0].layers["layer"], part)
        )
        for part in ("A", "B", "router_weight", "router_bias", "hyper_weight", "hyper_bias")
    },
    "all data, twice": lambda host, attachment, adapters: [data_twice(p) for a in adapters for p in a.parameters()],
    "a parameter in its table": lambda host, attachment, adapters: (
        adapters[-1]
        .layers["layer"]
        ._parameters.update(B=nn.Parameter(-adapters[-1].layers["layer"].B.detach(), requires_grad=False))
    ),
    "the last adapter's strength": lambda host, attachment, adapters: attachment.set_strength(-0.4, adapter=adapters[-1]),
    "one adapter to strength 0": lambda host, attachment, adapters: attachment.set_strength(0.0, adapter=adapters[0]),
    "the order of adapters": lambda host, attachment, adapters: host["layer"].forward.sites.reverse(),
    "the frozen weight's data": lambda host, attachment, adapters: setattr(host["layer"].weight, "data", -host["layer"].weight),
    "another frozen weight": lambda host, attachment, adapters: setattr(
        host["layer"], "weight", nn.Parameter(-host["layer"].weight.detach(), requires_grad=False)
    ),
    "another bias": lambda host, attachment, adapters: setattr(
        host["layer"], "bias", nn.Parameter(host["layer"].bias + 1, requires_grad=False)
    ),
    "the frozen weight": lambda host, attachment, adapters: host["layer"].weight.mul_(-1),
    "the dtype": lambda host, attachment, adapters: [host.double(), *(adapter.double() for adapter in adapters)],
    "the adapters' dtype": lambda host, attachment, adapters: [adapter.double() for adapter in adapters],
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("tokens", [40, 3], ids=["fold", "stack"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_prepared_is_never_stale(change, tokens, count):
    """Between two calls something changes; the second is the reference's, of what is there now."""
    host = nn.ModuleDict({"layer": nn.Linear(6, 10)}).requires_grad_(False)
    adapters = [trained(host, seed, target_modules=("layer",)).requires_grad_(False) for seed in range(count)]
    x = torch.randn(2, tokens, 6, generator=torch.Generator().manual_seed(1)) + 0.3
    with torch.no_grad(), attach(host, adapters) as attachment:
        for _ in range(2):
            host["layer"](x)
        CHANGES[change](host, attachment, adapters)
        x = x.to(host["layer"].weight.dtype)
        for _ in range(2):
            found = host["layer"](x).double()
        module = host["layer"].double()
        weights = [
            site.layer.weights(lambda p: p.double(), dma=site.dma, sta=site.sta) for sites in attachment.sites for site in sites
        ]
    frozen = nn.Linear(6, 10).double().requires_grad_(False)
    frozen.load_state_dict(module.state_dict())
    plain = HostLayer(LayerShape.of(frozen), frozen.forward, frozen.weight, frozen.bias, frozen)
    with torch.no_grad():
        torch.testing.assert_close(found, reference.forward(x.double(), plain, weights), rtol=1e-4, atol=1e-5)


STRAIGHT = {
    "fold": (nn.Linear(6, 10), (3, 40, 6)),
    "fold, no bias": (nn.Linear(6, 10, bias=False), (2, 40, 6)),
    "stack": (nn.Linear(6, 10), (2, 3, 6)),
    "one token": (nn.Linear(6, 10, bias=False), (3, 1, 6)),
    "a convolution, stride 2": (nn.Conv2d(4, 8, 3, stride=2, padding=1), (3, 4, 5, 5)),
    "one pixel": (nn.Conv2d(4, 8, 3, padding=1, bias=False), (2, 4, 1, 1)),
    "a convolution, fold": (nn.Conv2d(4, 6, 3, padding=1), (3, 4, 9, 8)),
    "a convolution, fold, no bias": (nn.Conv2d(4, 6, 3, padding=(0, 1), stride=(2, 1), bias=False), (2, 4, 16, 12)),
    "a convolution, fold, large": (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 32, 33)),
    "a convolution of single pixels": (nn.Conv2d(4, 6, 1), (3, 4, 5, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("case", STRAIGHT)
def test_the_straight_line_is_the_reference(case, count, dtype):
    """What repeated calls run, for inputs of one shape after those of another, with strengths that are not 1."""
    module, shape = STRAIGHT[case]
    host = nn.ModuleDict({"layer": copy.deepcopy(module).to(dtype)}).requires_grad_(False)
    adapters = [trained(host, seed, target_modules=("layer",)).requires_grad_(False).to(dtype) for seed in range(count)]
    frozen = copy.deepcopy(host["layer"]).double()
    plain = HostLayer(LayerShape.of(frozen), frozen.forward, frozen.weight, frozen.bias, frozen)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.06}[dtype]
    with torch.no_grad(), attach(host, adapters) as attachment:
        attachment.set_strength(0.7, dma=0.9, sta=1.2)
        weights = [
            site.layer.weights(lambda p: p.double(), dma=site.dma, sta=site.sta) for sites in attachment.sites for site in sites
        ]
        for batch in (shape[0], shape[0] + 1, shape[0]):
            x = torch.randn(batch, *shape[1:]).to(dtype)
            for _ in range(2):
                found = host["layer"](x).double()
            expected = reference.forward(x.double(), plain, weights)
            assert (found - expected).abs().max() <= tolerance * expected.abs().max()
        assert host["layer"].forward._plan.line(x) is not None, "it took another way"


def test_an_attachment_that_leaves_takes_its_part_with_it():
    host = nn.ModuleDict({"layer": nn.Linear(6, 10)}).requires_grad_(False)
    first, second = (trained(host, seed, target_modules=("layer",)) for seed in range(2))
    x = torch.randn(2, 40, 6)
    with torch.no_grad(), attach(host, first):
        alone = host["layer"](x)
        with attach(host, second):
            assert not torch.allclose(host["layer"](x), alone)
        torch.testing.assert_close(host["layer"](x), alone)


def seamless(module):
    """What nodes for seamless textures put in the place of a convolution."""

    def conv(x, weight, bias):
        return nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias, module.stride)

    module._conv_forward = conv


CONVOLUTIONS = {
    "nothing": lambda module: None,
    "its border": lambda module: setattr(module, "padding_mode", "circular"),
    "its padding": lambda module: setattr(module, "padding", (2, 0)),
    "its stride": lambda module: setattr(module, "stride", (2, 1)),
    "its dilation": lambda module: setattr(module, "dilation", (1, 2)),
    "its own convolution": seamless,
    "its weight": lambda module: module.weight.mul_(-1),
    "its bias": lambda module: module.bias.add_(1),
}


@pytest.mark.parametrize("change", CONVOLUTIONS)
@pytest.mark.parametrize("size", [12, 3], ids=["fold", "stack"])
def test_a_convolution_may_change_between_two_calls(change, size):
    module = nn.Conv2d(4, 6, 3, padding=1).requires_grad_(False)
    module._reversed_padding_repeated_twice = [1, 1, 1, 1]  # as padding_mode reads it, of which "zeros" makes none
    host = nn.ModuleDict({"layer": module})
    adapter = trained(host, target_modules=("layer",)).requires_grad_(False)
    x = torch.randn(2, 4, size, size)
    with torch.no_grad(), attach(host, adapter) as attachment:
        for _ in range(2):
            module(x)
        assert module.forward._plan.line(x) is not None
        CONVOLUTIONS[change](module)
        for _ in range(2):
            found = module(x)
        weights = [site.layer.weights(lambda p: p, dma=site.dma, sta=site.sta) for sites in attachment.sites for site in sites]
    plain = HostLayer(LayerShape.of(module), module.forward, None, None, module)
    with torch.no_grad():
        torch.testing.assert_close(found, reference.forward(x, plain, weights), rtol=1e-4, atol=1e-5)


class Unreadable(nn.Linear):
    """A Linear that the program does not know: forms ask it for h, and cannot fold."""


def test_a_slice_is_adapted_after_the_whole_layer_and_after_slices_it_overlaps():
    """The same whether W0 can be read or not: folding it anew would lose what was there before."""
    fused = nn.Linear(6, 12).requires_grad_(False)
    other = Unreadable(6, 12).requires_grad_(False)
    other.load_state_dict(fused.state_dict())
    whole = trained(nn.ModuleDict({"qkv": fused}), 1, target_modules=("qkv",))
    slices = [trained(nn.ModuleDict({"to_q": nn.Linear(6, 8)}), seed, target_modules=("to_q",)) for seed in (2, 3)]
    x = torch.randn(2, 40, 6)
    for adapters in ([whole, slices[0]], slices, [whole, *slices]):
        found = []
        for module in (fused, other):
            attachments = [
                Attachment(
                    nn.ModuleDict({"qkv": module}), [Applied(a)], {} if a is whole else {"to_q": Place("qkv", Rows(2 * k, 8))}
                )
                for k, a in enumerate(adapters)
            ]
            with torch.no_grad(), contextlib.ExitStack() as stack:
                for attachment in attachments:
                    stack.enter_context(attachment)
                found.append([module(x) for _ in range(2)])
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
