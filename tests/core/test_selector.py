"""The layer selector on Stable Diffusion 1.5's own layers."""

from __future__ import annotations

import pytest

from styleinject_core import SelectorError
from styleinject_core.hosts.architectures import ARCHITECTURES
from styleinject_core.selector import parse_weights, select

LAYERS = ARCHITECTURES["sd15"].shapes()


@pytest.mark.parametrize(
    ("selector", "count"),
    [
        ("all", 282),
        ("linear", 184),
        ("conv", 98),
        ("attention", 128),
        ("self", 64),
        ("cross", 64),
        ("to_q, to_v", 64),
        ("attn2.to_k", 16),
        ("down & cross", 24),
        ("down & cross, mid & cross", 28),
        ("up.1 & self & to_q", 3),
        ("attention, !to_q", 96),
        ("!conv", 184),
        ("conv & !down", 65),
        ("*transformer_blocks.0.attn1.to_out*", 16),
        ("conv_in", 1),
        ("self\ncross", 128),
        ("cross & !up", 28),
        ("!up & cross", 28),
        ("!up & cross, conv_in", 29),
        ("to_out", 32),
        ("attention, !to_out", 96),
    ],
)
def test_counts(selector, count):
    assert len(select(LAYERS, selector)) == count


def test_parts_of_the_unet_are_disjoint():
    down, mid, up = (select(LAYERS, part) for part in ("down", "mid", "up"))
    assert not (down & mid or down & up or mid & up)
    assert set(LAYERS) - down - mid - up == {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("", "empty layer selector"),
        (" , ", "empty layer selector"),
        ("crosss", "term 'crosss' matches none of the 282 layers; these have: all, attention, conv"),
        ("down, up.7", "term 'up.7' matches none.*up.3"),
        ("self & cross", "no layer satisfies all of its terms"),
        ("self, !attention", "leaves none of the 282 layers"),
        ("down &", "term '' matches none"),
    ],
)
def test_a_selector_that_matches_nothing_names_the_term(selector, message):
    with pytest.raises(SelectorError, match=message):
        select(LAYERS, selector)


def test_weights_override_in_order():
    weights = parse_weights(LAYERS, "attention = 0.5; up & cross = -1.25\nconv_in=0")
    assert weights["conv_in"] == 0
    assert weights["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"] == 0.5
    assert weights["up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"] == -1.25
    assert weights["conv_out"] == 1
    assert parse_weights(LAYERS, "") == dict.fromkeys(LAYERS, 1.0)


def test_factors_and_optional_lines():
    weights = parse_weights(LAYERS, "all = 0.5; down = *0.5; ?self & cross = 0; ?nothing = 3")
    assert weights["conv_out"] == 0.5
    assert weights["down_blocks.0.resnets.0.conv1"] == 0.25


@pytest.mark.parametrize("line", ["down", "down = ", "down = much", "down = nan", "= 1", "down = 1 2"])
def test_bad_weight_lines(line):
    with pytest.raises(SelectorError):
        parse_weights(LAYERS, line)
