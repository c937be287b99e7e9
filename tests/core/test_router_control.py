"""Steering: every rule does what its formula says, where and when it should, and is refused where it cannot."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from styleinject_core import Adapter, AdapterConfig, SelectorError
from styleinject_core.router.control import ControlError, Rule, Steering, parse_styles
from styleinject_core.router.mean import ROUTER_MEAN, keep_router_mean, router_mean, shares
from styleinject_core.router.trace import RouterTrace
from styleinject_core.summary import summarize

NAMES = ("flat", "ink", "style 3")


@pytest.fixture
def adapter():
    host = nn.ModuleDict(
        {"down_blocks": nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_v": nn.Linear(4, 4)}), "conv": nn.Conv2d(4, 4, 3)}
    )
    config = AdapterConfig(r=2, n_styles=3, target_modules=("all",), layers={"conv": {"n_styles": 2}})
    return Adapter.create(host, config, name="pen").with_style_names(NAMES[:2])


@pytest.fixture
def s():
    return torch.softmax(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) * 2, -1)


def steered(
    adapter, s, *rules, roles=("positive", "negative"), keys=None, sigma=1.0, memory=None, layer="down_blocks.to_q", active=None
):
    steering = Steering(rules, adapter)
    active = [True] * len(rules) if active is None else active
    memory = {} if memory is None else memory
    steers = steering.steers(active, roles, keys or roles, sigma, memory)
    return steers[layer](s) if layer in steers else s


def test_held_at_the_mean(adapter, s):
    with pytest.raises(ControlError, match="pen: its file does not have the mean of its router"):
        Steering([Rule(hold_mean=True)], adapter)
    keep_router_mean(adapter, {"down_blocks.to_q": torch.tensor([0.5, 0.3, 0.2])})
    held = steered(adapter, s, Rule(hold_mean=True))
    torch.testing.assert_close(held, torch.tensor([0.5, 0.3, 0.2]).expand(4, 3))
    only = steered(adapter, s, Rule(hold_mean=True, role="negative", temperature=2.0))
    torch.testing.assert_close(only[2:], torch.softmax(torch.tensor([0.5, 0.3, 0.2]).log() / 2, -1).expand(2, 3))
    assert torch.equal(only[:2], s[:2])
    by_token = steered(adapter, s.unsqueeze(1).expand(-1, 5, -1), Rule(hold_mean=True))
    torch.testing.assert_close(by_token, torch.tensor([0.5, 0.3, 0.2]).expand(4, 5, 3))
    left = steered(adapter, s, Rule(hold_mean=True), layer="down_blocks.to_v")  # has none in the file
    assert torch.equal(left, s)
    with pytest.raises(ControlError, match="three ways to hold"):
        Rule(hold_mean=True, hold_first=True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "[]",
        "7",
        '{"down_blocks.to_q": [1, 2]}',
        '{"down_blocks.to_q": [0, 0, 0]}',
        '{"down_blocks.to_q": [1, "x", NaN]}',
    ],
)
def test_a_mean_that_cannot_be_read_is_none(adapter, text):
    adapter.metadata[ROUTER_MEAN] = text
    assert router_mean(adapter) == {} and shares(adapter) is None


def test_info_says_how_much_the_styles_are_used(adapter):
    assert "use" not in summarize(adapter)["properties"]
    keep_router_mean(adapter, {"down_blocks.to_q": torch.tensor([0.3, 0.694, 0.006]), "conv": torch.tensor([0.5, 0.5])})
    assert summarize(adapter)["properties"]["use"] == (
        "ink 69%, flat 30%, style 3 1% in training; 20% of the styles of single layers hardly ever (below 1%)"
    )


def test_formulas(adapter, s):
    logits = s.log()
    assert torch.equal(steered(adapter, s, Rule()), s)
    torch.testing.assert_close(steered(adapter, s, Rule(temperature=2.0)), torch.softmax(logits / 2, -1))
    biased = torch.softmax((logits + torch.tensor([0, 1.5, 0])) / 0.5, -1)
    torch.testing.assert_close(steered(adapter, s, Rule(bias={"ink": 1.5}, temperature=0.5)), biased)
    top = steered(adapter, s, Rule(top_k=1))
    assert torch.equal(top, torch.nn.functional.one_hot(s.argmax(-1), 3).float())
    two = steered(adapter, s, Rule(top_k=2))
    assert ((two > 0).sum(-1) == 2).all() and torch.equal(two.argmax(-1), s.argmax(-1))
    assert torch.equal(steered(adapter, s, Rule(top_k=9)), s)
    floored = steered(adapter, s, Rule(floor={"all": 0.1, "2": 0.3}))
    torch.testing.assert_close(floored, torch.tensor([0.1, 0.3, 0.1]) + 0.5 * s)
    fixed = steered(adapter, s, Rule(weights={"flat": 3, "3": 1}))
    torch.testing.assert_close(fixed, torch.tensor([0.75, 0, 0.25]).expand(4, 3))
    every = steered(adapter, s, Rule(weights={"1": 1}, bias={"2": 1}, temperature=3.0, top_k=2, floor={"3": 0.2}))
    torch.testing.assert_close(every.sum(-1), torch.ones(4))
    assert (every[:, 2] >= 0.2).all()


@pytest.mark.parametrize("temperature", [1e-2, 100.0])
def test_extremes_stay_probabilities(adapter, temperature):
    s = torch.tensor([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]).double()
    out = steered(adapter, s, Rule(temperature=temperature, bias={"2": 50.0}), roles=("positive",))
    assert out.isfinite().all() and out.dtype == torch.float64
    torch.testing.assert_close(out.sum(-1), torch.ones(2).double())


def test_roles_layers_schedule_and_chains(adapter, s):
    one = torch.tensor([1.0, 0, 0])
    rule = Rule(weights={"1": 1}, role="negative", layers="to_q")
    out = steered(adapter, s, rule)
    assert torch.equal(out[:2], s[:2]) and torch.equal(out[2:], one.expand(2, 3))
    out = steered(adapter, s, rule, roles=("negative", "cond 1", "negative", "positive"))
    assert torch.equal(out[[1, 3]], s[[1, 3]]) and torch.equal(out[[0, 2]], one.expand(2, 3))
    assert steered(adapter, s, rule, roles=("unknown",)) is s
    assert steered(adapter, s, rule, layer="down_blocks.to_v") is s
    assert steered(adapter, s, rule, active=[False]) is s
    assert steered(adapter, s, Rule(top_k=1), layer="conv") is s, "a layer with another number of styles is left alone"
    both = steered(adapter, s, Rule(weights={"1": 1, "2": 1}), Rule(bias={"1": 100.0}, role="positive"))
    torch.testing.assert_close(both, torch.stack([one, one, *[torch.tensor([0.5, 0.5, 0])] * 2]))


def test_hold_first_remembers_each_conditioning_for_the_length_of_a_run(adapter, s):
    memory, rule = {}, Rule(hold_first=True, role="positive")
    other = s.flip(1)
    assert torch.equal(steered(adapter, s, rule, memory=memory, keys=("a", "b")), s)
    out = steered(adapter, other, rule, memory=memory, keys=("a", "b"))
    assert torch.equal(out[:2], s[:2]) and torch.equal(out[2:], other[2:])
    turned = steered(adapter, other, rule, memory=memory, roles=("negative", "positive"), keys=("b", "a"))
    assert torch.equal(turned[2:], s[:2]) and torch.equal(turned[:2], other[:2])
    assert torch.equal(steered(adapter, other, rule, memory=memory, layer="down_blocks.to_v"), other)
    assert torch.equal(steered(adapter, other, rule, memory={}, keys=("a", "b")), other), "a new run begins anew"


def make_trace(s, **values):
    """Steps at sigma 10 and 1, positive then negative; (rows, layers, images, n)."""
    values = {"adapter": "pen", "layers": ("down_blocks.to_q",), "styles": NAMES, **values}
    return RouterTrace(
        convolutions=(), roles=("positive", "negative") * 2, probabilities=s, sizes=torch.zeros(*s.shape[:3], 2),
        steps=torch.tensor([0, 0, 1, 1]), sigmas=torch.tensor([10.0, 10, 1, 1]), total_steps=2, **values,
    )  # fmt: skip


def test_hold_to_a_trace(adapter, s):
    values = torch.softmax(torch.randn(4, 1, 2, 3, generator=torch.Generator().manual_seed(3)), -1)
    rule = Rule(hold=make_trace(values))
    for sigma, rows in ((12.0, (0, 1)), (torch.tensor(6.0), (0, 1)), (torch.tensor(0.3), (2, 3))):
        out = steered(adapter, s, rule, sigma=sigma)
        torch.testing.assert_close(out, values[list(rows), 0].flatten(0, 1))
    single = steered(adapter, s, rule, roles=("positive", "negative", "negative", "cond 9"), sigma=10.0)
    torch.testing.assert_close(single[:3], values[[0, 1, 1], 0].mean(1), msg="another number of images: their mean")
    by_token = s.unsqueeze(1).expand(4, 5, 3)
    torch.testing.assert_close(steered(adapter, by_token, rule, sigma=10.0)[:, 4], values[:2, 0].flatten(0, 1))
    values = values.clone()
    values[0] = math.nan
    out = steered(adapter, s, Rule(hold=make_trace(values)), sigma=10.0)
    assert torch.equal(out[:2], s[:2]), "what the trace does not have stays the router's"
    assert torch.equal(steered(adapter, s, rule, layer="down_blocks.to_v"), s)


def test_hold_takes_the_adapters_own_trace(adapter, s):
    """Of several: the latest of its name; a single one may have another name."""
    values = torch.softmax(torch.randn(3, 4, 1, 2, 3, generator=torch.Generator().manual_seed(3)), -1)
    traces = [make_trace(v, adapter=name) for v, name in zip(values, ("pen", "pen", "other"), strict=True)]
    expected = values[1][[0, 1], 0].flatten(0, 1)
    torch.testing.assert_close(steered(adapter, s, Rule(hold=traces), sigma=10.0), expected)
    torch.testing.assert_close(steered(adapter, s, Rule(hold=traces[2:]), sigma=10.0), values[2][[0, 1], 0].flatten(0, 1))
    with pytest.raises(ControlError, match="hold: expected a trace of pen, found those of ink, other"):
        Steering([Rule(hold=[make_trace(values[0], adapter="ink"), traces[2]])], adapter)


@pytest.mark.parametrize(("text", "found"), [
    ("", {}),
    ("0.7, 0, 0.3", {"1": 0.7, "2": 0, "3": 0.3}),
    ("flat ink = 0.7\n 3=.5 ;all=1e-2", {"flat ink": 0.7, "3": 0.5, "all": 0.01}),
    ("a=b = -2\n\n", {"a=b": -2}),
    ("dark, firm = 0.7, 3 = 0.3", {"dark, firm": 0.7, "3": 0.3}),
])  # fmt: skip
def test_parsing(text, found):
    assert parse_styles(text) == found


@pytest.mark.parametrize("text", ["flat", "flat =", "a = 1, a = 2", "1 = 0.5, 0.5, 2 = 1", "= 3"])
def test_parsing_errors(text):
    with pytest.raises(ControlError):
        parse_styles(text)


@pytest.mark.parametrize(("values", "message"), [
    ({"weights": {"1": -1.0}}, "weights of style '1' is -1.0"),
    ({"weights": {"1": 0.0}}, "weights: all are 0"),
    ({"floor": {"1": math.nan}}, "floor of style '1' is nan"),
    ({"temperature": 0.0}, "temperature is 0.0, expected a positive"),
    ({"top_k": -1}, "top_k is -1"),
    ({"hold_first": True, "weights": {"1": 1.0}}, "exclude each other"),
    ({"role": "both"}, "role is 'both', expected one of all, positive, negative"),
    ({"start_percent": 0.8, "end_percent": 0.2}, "expected 0 <= start <= end <= 1"),
])  # fmt: skip
def test_rules_out_of_range(values, message):
    with pytest.raises(ControlError, match=message):
        Rule(**values)


def test_rules_that_do_not_fit(adapter):
    for rule, message in [
        (Rule(weights={"glossy": 1}), "weights: pen has no style 'glossy'; it has 3: flat, ink, style 3"),
        (Rule(bias={"4": 1}), "bias: pen has no style '4'"),
        (Rule(floor={"all": 0.4}), "floor: together 1.2, expected at most 1"),
        (
            Rule(hold=make_trace(torch.rand(4, 1, 1, 2), styles=NAMES[:2])),
            "with 2 styles in 1 layers; pen has 3 styles in 2 layers",
        ),
        (Rule(hold=make_trace(torch.rand(4, 1, 1, 3), layers=("x",))), "0 of them in common"),
    ]:
        with pytest.raises(ControlError, match=message):
            Steering([rule], adapter)
    with pytest.raises(SelectorError, match="'cross' matches none"):
        Steering([Rule(layers="cross")], adapter)
    lora = Adapter.create(
        nn.ModuleDict({"a": nn.Linear(2, 2)}), AdapterConfig(r=1, n_styles=1, sta="none", target_modules=("all",)), "lora"
    )
    with pytest.raises(ControlError, match="lora has no style router"):
        Steering([Rule()], lora)
