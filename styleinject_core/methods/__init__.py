"""The methods, one file each. A new one is a file here and a line in METHODS: CONTRIBUTING.md, "How to add a method"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import LayerConfig
from . import difference, kronecker, loha, lokr, lora, low_rank, styleinject
from .method import AdapterLayer, AdapterSettings, Method

_READ_ONLY = (low_rank.METHOD, loha.METHOD, lokr.METHOD, difference.METHOD)  # what other programs' files hold
METHODS = {method.name: method for method in (styleinject.METHOD, lora.METHOD, kronecker.METHOD, *_READ_ONLY)}


def choices() -> tuple[str, ...]:
    """What a person may ask for as `method`: every method, then their variants."""
    return tuple(sorted((choice for method in METHODS.values() for choice in method.choices), key=lambda c: c not in METHODS))


def configure(settings: AdapterSettings) -> LayerConfig:
    """The config of a new adapter, as a person has asked for it.

    Raises:
        ValueError: a method that does not exist (names those that do), or a value out of range.
    """
    method = chosen(settings.method)
    return method.configure(settings, method.choices[settings.method])


def chosen(choice: str) -> Method:
    """The method of one of `choices()`. Raises ValueError: a method that does not exist (names those that do)."""
    for method in METHODS.values():
        if choice in method.choices:
            return method
    raise ValueError(f"method: expected one of {', '.join(choices())}, found {choice!r}")


def new_layer(shape: Any, config: LayerConfig) -> AdapterLayer:
    """An untrained layer of the config's method. Raises UnsupportedLayerError."""
    return METHODS[config.method].layer(shape, config)


def config_from_dict(values: Mapping[str, Any]) -> LayerConfig:
    """A config from its plain values; without "method" in them it is StyleInject's.

    Raises:
        ValueError: a method or a field this version does not know, or a bad value.
    """
    values = dict(values)
    name = values.pop("method", styleinject.METHOD.name)
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, found {name!r}")
    return METHODS[name].config.from_dict(values)


def config_to_dict(config: LayerConfig) -> dict[str, Any]:
    """Plain values for JSON; StyleInject's, and LoRA's, as files have had them from the start, without their method."""
    kind = METHODS[config.method].config
    return config.to_dict() if kind is styleinject.METHOD.config else {"method": config.method, **config.to_dict()}


def method_of(layer: AdapterLayer, preferred: LayerConfig) -> Method:
    """The method whose file format holds a layer: the preferred config's where it can, else the layer's own."""
    wanted = METHODS[preferred.method]
    parts = layer.tensors().keys()
    return wanted if isinstance(layer, wanted.layer) and parts <= wanted.suffixes.keys() else METHODS[layer.config.method]


def titles(layers: Sequence[AdapterLayer]) -> list[str]:
    """The methods of some layers, for people, the first layer's first."""
    return list(dict.fromkeys(METHODS[layer.config.method].title for layer in layers))


__all__ = ["METHODS", "AdapterLayer", "AdapterSettings", "Method", "choices", "chosen", "configure"]
