"""StyleInject Layer Weights: what its sliders and lines come to on an adapter's layers."""

from __future__ import annotations

import pytest
import torch
from random_adapters import random_adapter

SELF = "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CROSS = "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
MID = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def model(tiny_unet_model):
    return tiny_unet_model()


@pytest.fixture(scope="module")
def adapter(pack, model):
    return random_adapter(pack, model, "to_q")


@pytest.fixture
def scales(pack, adapter, run_node):
    """scales(slider=value, ...): the weight of each layer of the adapter."""
    core = pack.submodule("styleinject_core")

    def compute(**inputs) -> dict[str, float]:
        (text,) = run_node("StyleInjectLayerWeights", **inputs)
        return core.Applied(adapter, layer_weights=text).layer_scales()

    return compute


def test_untouched_sliders_change_nothing(scales, run_node) -> None:
    assert set(scales().values()) == {1.0}
    assert run_node("StyleInjectLayerWeights") == ("",)


def test_a_layer_in_two_groups_gets_the_product(scales) -> None:
    weights = scales(self_attention=0.5, up=0.5, mid=0.0)
    assert (weights[SELF], weights[CROSS], weights[MID]) == (0.25, 0.5, 0.0)


def test_groups_the_adapter_has_not_are_passed_over(scales) -> None:
    assert set(scales(convolutions=0.0, feed_forward=2.0).values()) == {1.0}


def test_extra_lines_replace_the_sliders(scales) -> None:
    weights = scales(up=0.5, extra="up & cross = 1.5\nmid = *0.5")
    assert (weights[SELF], weights[CROSS], weights[MID]) == (0.5, 1.5, 0.5)


def test_chained_nodes_multiply(scales, run_node) -> None:
    (first,) = run_node("StyleInjectLayerWeights", up=0.5, extra="mid = 0.2")
    weights = scales(layer_weights=first, self_attention=0.5)
    assert (weights[SELF], weights[CROSS], weights[MID]) == (0.25, 0.5, 0.1)


def test_extra_that_matches_nothing_is_an_error(pack, scales) -> None:
    with pytest.raises(pack.submodule("styleinject_core").SelectorError, match="'conv' matches none of the"):
        scales(extra="conv = 0.5")


def test_weights_reach_the_picture(model, adapter, run_node, sample) -> None:
    def styled(**inputs):
        return sample(run_node("StyleInjectApply", model=model, adapter=adapter, **inputs)[0])

    (off,) = run_node("StyleInjectLayerWeights", self_attention=0.0, cross_attention=0.0)
    assert torch.equal(styled(layer_weights=off), sample(model))
    (cross_only,) = run_node("StyleInjectLayerWeights", self_attention=0.0)
    assert torch.equal(styled(layer_weights=cross_only), styled(layers="cross"))
