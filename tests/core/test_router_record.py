"""Recording the router: what is recorded is what the layers used, and nothing they compute changes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from styleinject_core import Adapter, AdapterConfig, SelectorError, attach, load_adapter, save_adapter
from styleinject_core.call import ModelCall
from styleinject_core.files import WriteError
from styleinject_core.functional import reference
from styleinject_core.functional.host import HostLayer
from styleinject_core.methods.styleinject_calls import route
from styleinject_core.router import sizes
from styleinject_core.router.control import Steered
from styleinject_core.router.recorder import Recorder, record
from styleinject_core.router.trace import RouterTrace, TraceError, load_trace, save_trace

STYLES = 3


class Host(nn.Module):
    """A 3x3 convolution, a strided one, and two Linears on its pixels, a residual around each."""

    def __init__(self, size: int = 8):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, stride=2)
        self.to_q = nn.Linear(4, 4)
        self.to_v = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        x = x + self.conv1(x)
        tokens = (self.conv2(x)).flatten(2).mT
        tokens = tokens + self.to_q(tokens)
        return tokens + self.to_v(tokens)


def trained(host, seed=0, **config):
    torch.manual_seed(seed)
    settings = {"r": 2, "n_styles": STYLES, "target_modules": ("all",), **config}
    adapter = Adapter.create(host, AdapterConfig(**settings), name="ink")
    for parameter in adapter.parameters():
        parameter.data.copy_(torch.randn_like(parameter) * 0.5)
    return adapter


@pytest.fixture
def host():
    torch.manual_seed(0)
    return Host().requires_grad_(False)


@pytest.fixture
def images():
    return torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def inputs_of(host, x):
    """The input of every layer in a call of x."""
    seen = {}
    hooks = [m.register_forward_pre_hook(lambda _, args, n=n: seen.update({n: args[0]})) for n, m in host.named_modules() if n]
    host(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("grad", [False, True])  # inference may fold, training stacks
@pytest.mark.parametrize("pool", ["mean", "sum", "token", "paper"])
def test_recorded_is_what_the_layers_used(host, images, grad, pool):
    targets = ("linear",) if pool == "token" else ("all",)
    adapter = trained(host, router_pool=pool, target_modules=targets)
    with torch.set_grad_enabled(grad), attach(host, adapter) as attachment:
        expected = host(images)
        seen = inputs_of(host, images)
        with record(attachment, roles=("positive", "negative")) as recording:
            assert torch.equal(host(images), expected)
            assert torch.equal(host(images.flip(0)), host(images.flip(0)))
        assert torch.equal(host(images), expected)
    trace = recording.trace("a test")
    assert trace.layers == adapter.names and trace.styles == ("style 1", "style 2", "style 3")
    assert trace.roles == ("positive", "negative") * 3
    assert trace.steps.tolist() == [0, 0, 1, 1, 2, 2]
    assert trace.probabilities.shape == (6, len(adapter.names), 2, STYLES)
    for k, (name, layer) in enumerate(adapter.layers.items()):
        module = host.get_submodule(name)
        frozen = HostLayer(layer.shape, module, module.weight, module.bias, module)
        s = route(seen[name], layer.weights(lambda p: p, dma=1, sta=1), frozen)
        s = s.mean(1) if s.ndim == 3 else s
        torch.testing.assert_close(trace.probabilities[:2, k].flatten(0, 1), s)
        flipped = trace.probabilities[2:4, k].flatten(0, 1).flip(0)
        torch.testing.assert_close(flipped, trace.probabilities[:2, k].flatten(0, 1))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "config", [{}, {"sta": "additive"}, {"sta": "none"}, {"router_pool": "token", "target_modules": ("linear",)}]
)
def test_sizes_are_those_of_the_increments(grad, config):
    """On layers with no more positions than are sampled, exactly; the strided convolution has 16 inside."""
    torch.manual_seed(2)
    host = Host().requires_grad_(False)
    x = torch.randn(2, 4, 9, 9)
    adapter = trained(host, seed=3, alpha=3.0, **config)
    with torch.set_grad_enabled(grad), attach(host, adapter, strength=-0.7) as attachment:
        seen = inputs_of(host, x)
        with record(attachment) as recording:
            host(x)
    trace = recording.trace()
    assert not trace.sizes.isnan().any()
    for k, (name, layer) in enumerate(adapter.layers.items()):
        module = host.get_submodule(name)
        if layer.shape.is_conv:
            continue
        x_in = seen[name]
        frozen = HostLayer(layer.shape, module, module.weight, module.bias, module)
        h = module(x_in)

        def size(dma, sta, layer=layer, frozen=frozen, h=h, x_in=x_in):
            out = reference.forward(x_in, frozen, [layer.weights(lambda p: p, dma=dma, sta=sta)])
            return (out - h).square().mean((1, 2)).sqrt() / h.square().mean((1, 2)).sqrt()

        everywhere = x_in.shape[1] <= sizes.POSITIONS
        tolerance = 0.02 if everywhere else 0.35
        torch.testing.assert_close(trace.sizes[0, k, :, 0], size(-0.7, 0), rtol=tolerance, atol=1e-6)
        unbiased = (25 / 24) ** 0.5 if everywhere else 1.0
        torch.testing.assert_close(trace.sizes[0, k, :, 1], size(0, -0.7) * unbiased, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, "same", "valid"])
@pytest.mark.parametrize("size", [3, 5, 6, 7])  # at 3 there is no window inside with a stride of 2
def test_the_windows_of_a_convolution_are_what_it_sees(stride, padding, size):
    """h worked out from the sampled windows is h itself, at the sampled positions; whole where they are all inside."""
    if padding == "same" and stride == 2:
        return  # torch has no such convolution
    torch.manual_seed(0)
    module = nn.Conv2d(3, 5, 3, padding=padding, stride=stride)
    x = torch.randn(2, 3, size, size + 1)
    layer = trained(nn.ModuleDict({"c": module})).layers["c"]
    host = HostLayer(layer.shape, module, module.weight, module.bias, module)
    weights = layer.weights(lambda p: p, dma=1, sta=1)
    s = torch.softmax(torch.randn(2, STYLES), -1)
    with torch.no_grad():
        from_weight = sizes.sample(x, None, s, host, weights)
        from_h = sizes.sample(x, module(x), s, host, weights)
    assert 1 <= from_weight.h.shape[1] <= sizes.POSITIONS
    torch.testing.assert_close(from_weight.h, from_h.h)
    low = (from_h.projected.unflatten(-1, (STYLES, -1)) * s[:, None, :, None]).sum(-2)
    torch.testing.assert_close(low.shape, torch.Size((2, from_h.h.shape[1], 2)))


def test_nothing_is_measured_where_there_is_nothing(host):
    layer = trained(nn.ModuleDict({"c": nn.Conv2d(4, 4, 3)})).layers["c"]
    module = nn.Conv2d(4, 4, 3)
    weights = layer.weights(lambda p: p, dma=1, sta=1)
    frozen = HostLayer(layer.shape, module, module.weight, module.bias, module)
    assert sizes.sample(torch.randn(1, 4, 2, 2), None, torch.ones(1, STYLES) / 3, frozen, weights) is None
    unreadable = HostLayer(layer.shape, module, None, None, module)
    assert sizes.sample(torch.randn(1, 4, 4, 4), None, torch.ones(1, STYLES) / 3, unreadable, weights) is None


def test_sizes_in_some_calls_reach_every_layer(host, images):
    adapter = trained(host)
    with torch.no_grad(), attach(host, adapter) as attachment:
        recorder = Recorder(adapter, adapter.style_names, every=3)
        for _ in range(6):
            with recorder.call(attachment.sites[0]):
                host(images)
    measured = ~recorder.trace().sizes[..., 0].isnan().any(-1)
    assert measured.sum(0).tolist() == [2] * 4
    assert measured.sum(1).tolist() == [2, 1, 1, 2, 1, 1]
    assert sizes.POSITIONS == 16


def test_steps_are_those_of_the_nearest_noise_level(host, images):
    """As with samplers that call the model in between, out of order and with several conditionings."""
    adapter = trained(host)
    recorder = Recorder(adapter, adapter.style_names)
    calls = [
        (14.0, ("positive", "negative")),
        (6.9, ("positive",)),
        (7.1, ("negative",)),
        (3.0, ("negative", "positive")),
        (0.2, ("positive",)),
    ]
    with torch.no_grad(), attach(host, adapter) as attachment:
        for sigma, roles in calls:
            with recorder.call(attachment.sites[0], roles, torch.tensor(sigma)):
                host(images[: 2 * len(roles)])
    trace = recorder.trace([14.0, 7.0, 2.5, 0.5])
    assert trace.steps.tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert trace.sigmas.tolist() == pytest.approx([14, 14, 6.9, 7.1, 3, 3, 0.2])
    assert trace.role_names == ("positive", "negative") and trace.total_steps == 4
    positive = trace.by_step("positive")
    assert torch.equal(positive[2], trace.probabilities[5]) and torch.equal(positive[3], trace.probabilities[6])
    assert trace.by_step("negative")[3].isnan().all()
    torch.testing.assert_close(trace.by_step()[0], trace.probabilities[:2].mean(0))
    with pytest.raises(TraceError, match="no role 'middle'; it has positive, negative"):
        trace.by_step("middle")


def test_a_call_that_fails_is_left_out_and_leaves_nothing_behind(host, images):
    adapter = trained(host)
    with torch.no_grad(), attach(host, adapter) as attachment:
        before = [site.current.call for site in attachment.sites[0]]
        with record(attachment) as recording:
            host(images)
            with pytest.raises(RuntimeError):
                host(images[:, :3])
            host(images[:1])
        assert [site.current.call for site in attachment.sites[0]] == before and not before[0].listeners
        assert not host._forward_hooks and not host._forward_pre_hooks
    trace = recording.trace()
    assert trace.probabilities.shape == (2, 4, 4, STYLES)
    assert trace.probabilities[1, :, 1:].isnan().all() and not trace.probabilities[1, :, :1].isnan().any()


def test_recordings_nest_and_add_up(host, images):
    adapter, other = trained(host), trained(host, seed=5)
    with torch.no_grad(), attach(host, [adapter, other]) as attachment, record(attachment) as outer:
        with record(attachment) as inner, record(attachment, 1) as second:
            host(images)
        host(images)
    assert outer.recorder.recorded == 2 and inner.recorder.recorded == 1
    torch.testing.assert_close(outer.trace().probabilities[:1], inner.trace().probabilities)
    assert not torch.allclose(inner.trace().probabilities, second.trace().probabilities, atol=0.01)


def test_prompts_that_take_turns_are_both_measured_everywhere():
    adapter = trained(Host())
    recorder = Recorder(adapter, adapter.style_names, every=4)
    measured = {"positive": set(), "negative": set()}
    for _ in range(4):
        for role, found in measured.items():
            found |= recorder.begin((role,), 1.0).measured
    assert measured["positive"] == measured["negative"] == set(recorder.layers)


def test_layers_that_see_another_batch_are_left_out(host, images):
    """As in nodes for regional prompts, which widen it inside of a layer."""
    adapter = trained(host)
    recorder = Recorder(adapter, adapter.style_names)
    with torch.no_grad(), attach(host, adapter) as attachment:
        first, *others = attachment.sites[0]
        call = recorder.begin(("negative", "positive"), 1.0, 4)
        s = torch.full((4, STYLES), 1 / STYLES)
        call.record(first.name, torch.full((6, STYLES), 1 / STYLES))
        for site in others:
            call.record(site.name, s)
        recorder.end(call)
    trace = recorder.trace()
    missing = trace.layers.index(first.name)
    assert trace.probabilities[:, missing].isnan().all()
    assert not trace.probabilities[:, [k for k in range(len(trace.layers)) if k != missing]].isnan().any()


def test_since_gives_the_latest_calls_by_role(host, images):
    adapter = trained(host)
    recorder = Recorder(adapter, adapter.style_names)
    with torch.no_grad(), attach(host, adapter) as attachment:
        assert recorder.since(0) is None
        for _ in range(2):
            with recorder.call(attachment.sites[0], ("negative", "positive"), 1.0):
                host(images)
        with recorder.call(attachment.sites[0], ("positive",), 1.0):
            host(images[:2])
    roles, values = recorder.since(1)
    assert roles == ("negative", "positive") and values.shape == (2, 4, 2, STYLES)
    trace = recorder.trace()
    torch.testing.assert_close(values[1], trace.probabilities[3:].mean(0))


def test_the_limit_stops_recording_and_says_so(host, images):
    adapter = trained(host)
    recorder = Recorder(adapter, adapter.style_names, limit=2 * 4 * 4 * STYLES * 4)
    with torch.no_grad(), attach(host, adapter) as attachment:
        for _ in range(5):
            with recorder.call(attachment.sites[0]):
                host(images)
    trace = recorder.trace()
    assert len(trace.roles) == 2
    assert trace.remarks.startswith("recording stopped after 2 calls, at the limit of 0.0003")


def test_layers_with_fewer_styles_and_layers_that_are_not_called(host, images):
    adapter = trained(host, layers={"to_v": {"n_styles": 2}})
    with torch.no_grad(), attach(host, adapter) as attachment, record(attachment) as recording:
        host(images)
        host.forward = lambda x: host.conv1(x)
        host(images)
    del host.forward
    trace = recording.trace()
    to_v = trace.layers.index("to_v")
    assert trace.probabilities[0, to_v, :, 2].isnan().all() and not trace.probabilities[0, to_v, :, :2].isnan().any()
    assert trace.probabilities[1, 1:].isnan().all() and not trace.probabilities[1, 0].isnan().any()


def test_a_lora_has_nothing_to_record(host):
    adapter = trained(host, n_styles=1, sta="none")
    with attach(host, adapter) as attachment, pytest.raises(TraceError, match="ink has no style router"), record(attachment):
        pass


def test_what_is_recorded_is_what_was_steered(host, images):
    adapter = trained(host)
    fixed = torch.tensor([1.0, 0.0, 0.0])
    steered = Steered({"to_q": lambda s: fixed.expand_as(s)})
    with torch.no_grad(), attach(host, adapter) as attachment:
        plain = host(images)
        with record(attachment) as recording, attachment.in_call(ModelCall(listeners=(steered,))):
            different = host(images)
        assert torch.equal(host(images), plain) and not torch.allclose(different, plain)
    trace = recording.trace()
    assert torch.equal(trace.probabilities[0, trace.layers.index("to_q")], fixed.expand(4, 3))


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trace():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.softmax(torch.randn(4, 2, 2, STYLES, generator=generator), -1)
    probabilities[1, 1] = math.nan
    return RouterTrace(
        "ink $x^2$ <b>", ("down_blocks.0.conv1", "mid_block.to_v"), ("down_blocks.0.conv1",), ("flat", "glänzend", "style 3"), ("positive", "negative") * 2,
        probabilities, torch.rand(4, 2, 2, 2, generator=generator), torch.tensor([0, 0, 1, 1]), torch.tensor([9.0, 9.0, 1.0, 1.0]),
        total_steps=3, finished=False, label="seed 1", note="a note",
    )  # fmt: skip


def test_save_and_load(trace, tmp_path):
    save_trace(trace, tmp_path / "t.safetensors")
    again = load_trace(tmp_path / "t.safetensors")
    for name in ("adapter", "layers", "convolutions", "styles", "roles", "total_steps", "finished", "label", "note"):
        assert getattr(again, name) == getattr(trace, name)
    for name in ("probabilities", "sizes", "steps", "sigmas"):
        torch.testing.assert_close(getattr(again, name), getattr(trace, name), equal_nan=True, rtol=0, atol=0)
    assert again.title == "ink $x^2$ <b>: seed 1" and again.remarks == "interrupted at step 2 of 3; a note"
    assert copy.deepcopy(again).renamed("other").label == "other"


def test_file_errors(trace, host, tmp_path):
    with pytest.raises(TraceError, match=r"t\.pt: expected a name that ends in \.safetensors"):
        save_trace(trace, tmp_path / "t.pt")
    with pytest.raises(WriteError, match="could not be written"):
        save_trace(trace, tmp_path / "nowhere" / "t.safetensors")
    with pytest.raises(TraceError, match="no such file"):
        load_trace(tmp_path / "t.safetensors")
    save_adapter(trained(host), tmp_path / "a.safetensors")
    with pytest.raises(TraceError, match="is not a router trace"):
        load_trace(tmp_path / "a.safetensors")
    save_file({}, tmp_path / "new.safetensors", {"styleinject_trace_version": "2"})
    with pytest.raises(TraceError, match="trace version 2, this version of the pack reads up to 1"):
        load_trace(tmp_path / "new.safetensors")
    save_trace(trace, tmp_path / "t.safetensors")
    content = (tmp_path / "t.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-9])
    with pytest.raises(TraceError, match="damaged"):
        load_trace(tmp_path / "cut.safetensors")
    (tmp_path / "swap.safetensors").write_bytes(content.replace(b'"styleinject_trace.roles"', b'"styleinject_trace.rolls"'))
    with pytest.raises(TraceError, match="incomplete"):
        load_trace(tmp_path / "swap.safetensors")


@pytest.mark.parametrize(("selector", "left"), [("all", 2), ("conv", 1), ("mid", 1), ("!to_v", 1)])
def test_the_layers_that_a_selector_leaves(trace, selector, left):
    part = trace.only(selector)
    assert len(part.layers) == part.sizes.shape[1] == left
    with pytest.raises(SelectorError, match="'cross' matches none of the 2 layers"):
        trace.only("cross")


def test_a_trace_checks_its_shapes(trace):
    with pytest.raises(TraceError, match=r"layers: found 1, expected 2"):
        RouterTrace(
            trace.adapter,
            ("one",),
            (),
            trace.styles,
            trace.roles,
            trace.probabilities,
            trace.sizes,
            trace.steps,
            trace.sigmas,
            3,
        )


# --- names -----------------------------------------------------------------------------------------------------------


def test_style_names(host, tmp_path):
    adapter = trained(host)
    named = adapter.with_style_names(["flat ink", " ", "glossy "])
    assert named.style_names == ("flat ink", "style 2", "glossy")
    assert named.layers["to_q"] is adapter.layers["to_q"] and adapter.style_names[0] == "style 1"
    save_adapter(named, tmp_path / "a.safetensors")
    assert load_adapter(tmp_path / "a.safetensors").style_names == ("flat ink", "style 2", "glossy")
    with pytest.raises(ValueError, match="ink: 4 names for 3 styles"):
        adapter.with_style_names("abcd")
    with pytest.raises(ValueError, match="cannot both be named 'a'"):
        adapter.with_style_names(["a", "a"])
    for damaged in ("no json", '{"a": 1}', '["only one"]'):
        adapter.metadata["styleinject.style_names"] = damaged
        assert len(adapter.style_names) == STYLES
