"""AdapterConfig and StyleInjectLayer refuse what they cannot mean, naming the field."""

from __future__ import annotations

import json

import pytest
from torch import nn

from styleinject_core import Adapter, AdapterConfig, LayerShape, UnsupportedLayerError
from styleinject_core.methods.styleinject import StyleInjectLayer


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "r: expected an integer of at least 1, found 0"),
        ({"r": 2.5}, "r: expected an integer"),
        ({"n_styles": True}, "n_styles: expected an integer"),
        ({"alpha": float("nan")}, "alpha: expected a finite number, found nan"),
        ({"eps": 0}, "eps: expected a positive number, found 0"),
        ({"router_pool": "max"}, "router_pool: expected one of mean, sum, token, paper, found 'max'"),
        ({"sta": "both"}, "sta: expected one of"),
        ({"target_modules": "to_q"}, "target_modules: expected a list"),
        ({"layers": {"a.to_q": {"ranks": 3}}}, r"layers\[a.to_q\]: unknown field 'ranks'"),
        ({"layers": {"a.to_q": {"r": -1}}}, r"layers\[a.to_q\]: r: expected an integer of at least 1, found -1"),
    ],
)
def test_bad_values_name_the_field(values, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**values)


def test_unknown_field():
    with pytest.raises(ValueError, match="unknown field 'rank': expected r, n_styles"):
        AdapterConfig.from_dict({"rank": 3})


def test_json_round_trip_and_overrides():
    config = AdapterConfig(r=4, layers={"a.to_q": {"r": 8, "alpha": 2.0}})
    assert AdapterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.for_layer("a.to_q").scale == 0.25
    assert config.for_layer("b").scale == 1.0
    assert config.override(config.for_layer("a.to_q")) == {"r": 8, "alpha": 2.0}


def test_lora_is_the_case_without_router():
    layer = StyleInjectLayer(LayerShape(4, 6), AdapterConfig(r=2, n_styles=1, sta="none"))
    assert set(layer.tensors()) == {"A", "B"}
    layer = StyleInjectLayer(LayerShape(4, 6), AdapterConfig(r=2, n_styles=1))
    assert set(layer.tensors()) == {"A", "B", "router_weight", "router_bias", "hyper_weight", "hyper_bias"}


def test_what_cannot_be_adapted_says_so():
    with pytest.raises(UnsupportedLayerError, match="router_pool 'token' needs a Linear layer, found Conv2d 3x3 4->6"):
        StyleInjectLayer(LayerShape(4, 6, (3, 3)), AdapterConfig(router_pool="token"))
    host = nn.ModuleDict({"conv1": nn.Conv2d(4, 4, 3, groups=2), "to_q": nn.Linear(4, 4)})
    with pytest.raises(UnsupportedLayerError, match="conv1: convolution with groups=2"):
        Adapter.create(host, AdapterConfig(target_modules=("conv1",)))
    assert Adapter.create(host, AdapterConfig(target_modules=("all",))).names == ("to_q",)
    assert LayerShape.of(nn.LayerNorm(4)) is None
    assert LayerShape.of(nn.Conv1d(4, 4, 3)) is None
