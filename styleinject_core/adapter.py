"""Adapter: a set of adapted layers by module name, with its config and metadata."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .config import LayerConfig
from .layer_names import parse
from .layers import LayerShape, UnsupportedLayerError
from .methods import AdapterLayer, new_layer, titles
from .selector import select

STYLE_NAMES = "styleinject.style_names"  # metadata: a JSON list


class Adapter(nn.Module):
    """Module name (diffusers spelling) -> adapted layer; a torch module, so that hosts can move, cast and count it.

    Args:
        layers: the adapted layers by module name.
        config: the adapter's config; layers that differ from it carry their own.
        metadata: what the file's header says beyond the config (ModelSpec fields and others), strings.
        name: what to call it in reports, the file's name as a rule.
        skipped: names in the file that are other models' (a LoRA's text encoder part), for the report.
        keys: module name -> how the file spells it, where it came from a file: hosts look it up as it stands there first.
        unused: what in the file is for this model and cannot be used -> why.
        path: the file it was read from, for what is left in there (`skipped`).
    """

    def __init__(
        self,
        layers: Mapping[str, AdapterLayer],
        config: LayerConfig,
        metadata: Mapping[str, str] | None = None,
        name: str = "adapter",
        skipped: tuple[str, ...] = (),
        *,
        keys: Mapping[str, str] | None = None,
        unused: Mapping[str, str] | None = None,
        path: Path | None = None,
    ):
        super().__init__()
        if not layers:
            raise ValueError(f"{name}: an adapter needs at least one layer")
        self.config, self.metadata, self.name, self.skipped = config, dict(metadata or {}), name, skipped
        self.keys, self.unused, self.path = dict(keys or {}), dict(unused or {}), path
        self.names = tuple(layers)
        self._layers: Any = nn.ModuleList(layers.values())  # module names contain dots, which a ModuleDict refuses

    @property
    def layers(self) -> dict[str, AdapterLayer]:
        """The adapted layers by module name, in file order."""
        return dict(zip(self.names, self._layers, strict=True))

    @property
    def shapes(self) -> dict[str, LayerShape]:
        """The host layers by module name, as the selector wants them."""
        return {name: layer.shape for name, layer in self.layers.items()}

    @property
    def style_names(self) -> tuple[str, ...]:
        """A name per style: those in the metadata, "style 3" where there is none. (A list that cannot be read is none.)"""
        names: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            names = json.loads(self.metadata.get(STYLE_NAMES, "[]"))
        count = max(layer.styles for layer in self.layers.values()) or 1
        given = [str(name).strip() for name in names] if isinstance(names, list) else []
        return tuple((given[k] if k < len(given) else "") or f"style {k + 1}" for k in range(count))

    def with_style_names(self, names: Sequence[str]) -> Adapter:
        """The same adapter, its tensors shared, with a name per style in its metadata; empty names leave styles unnamed.

        Raises:
            ValueError: more names than styles, two that are the same, or an adapter without styles.
        """
        if not self.routed:
            raise ValueError(no_router(self, "name"))
        given = [name.strip() for name in names]
        if len(given) > len(self.style_names):
            raise ValueError(f"{self.name}: {len(given)} names for {len(self.style_names)} styles")
        if twice := {name for name in given if name and given.count(name) > 1}:
            raise ValueError(f"{self.name}: two styles cannot both be named {sorted(twice)[0]!r}")
        metadata = {**self.metadata, STYLE_NAMES: json.dumps(given, ensure_ascii=False)}
        return self._like(self.layers, metadata)

    def parameter_count(self) -> int:
        """Trainable numbers in all layers."""
        return sum(p.numel() for p in self.parameters())

    @classmethod
    def create(
        cls, host: nn.Module | Mapping[str, LayerShape], config: LayerConfig, name: str = "adapter", metadata: Any = None
    ) -> Adapter:
        """An untrained adapter, an exact identity, on every layer of `host` that `config.target_modules` selects.

        Time, guidance and modulation layers see one row per image, which has no statistics: style layers leave them out.

        Args:
            host: a module tree, or module name -> LayerShape (`styleinject_core.hosts.unet_shapes`).

        Raises:
            SelectorError: a target that matches nothing.
            UnsupportedLayerError: a selected layer cannot be adapted; names it. Or its layers do not say what the config needs.
        """
        shapes = host_shapes(host, config.target_modules) if isinstance(host, nn.Module) else dict(host)
        chosen = select(shapes, ",".join(config.target_modules))
        try:
            config = config.on(shapes)
        except ValueError as error:
            raise UnsupportedLayerError(str(error)) from None
        layers = {}
        for layer_name, shape in shapes.items():
            if layer_name in chosen:
                try:
                    layer = new_layer(shape, config.for_layer(layer_name))
                except UnsupportedLayerError as error:
                    raise UnsupportedLayerError(f"{layer_name}: {error}") from None
                if layer.fixed or parse(layer_name).has_tokens:
                    layers[layer_name] = layer
        if not layers:
            raise UnsupportedLayerError(
                f"{', '.join(sorted(chosen)[:3])}: time, guidance and modulation layers see one row per image; there are no "
                "tokens for a router and statistics to look at"
            )
        if notes := [f"{layer_name}: {layer.note}" for layer_name, layer in layers.items() if layer.note]:
            more = f" and {len(notes) - 3} layers more" if len(notes) > 3 else ""
            logging.getLogger(__name__).warning("%s: %s%s", name, "; ".join(notes[:3]), more)
        return cls(layers, config, metadata, name)

    def with_layers(self, change: Callable[[AdapterLayer], AdapterLayer]) -> Adapter:
        """The same adapter with other layers in the place of its own."""
        return self._like({layer_name: change(layer) for layer_name, layer in self.layers.items()}, self.metadata)

    def with_changed(self, layers: Mapping[str, AdapterLayer]) -> Adapter:
        """The same adapter with some layers in the place of its own, by name."""
        return self._like({**self.layers, **layers}, self.metadata)

    def _like(self, layers: Mapping[str, AdapterLayer], metadata: Mapping[str, str]) -> Adapter:
        kept: Any = {"keys": self.keys, "unused": self.unused, "path": self.path}
        return Adapter(layers, self.config, metadata, self.name, self.skipped, **kept)

    @property
    def routed(self) -> dict[str, AdapterLayer]:
        """The layers that have a style router."""
        return {layer_name: layer for layer_name, layer in self.layers.items() if layer.styles}

    @property
    def kind(self) -> str:
        """Its methods, for people: "StyleInject", "LoRA", "DiffuseKronA and LoRA"."""
        return " and ".join(titles(list(self.layers.values())))


def host_shapes(host: nn.Module, required: tuple[str, ...] = ()) -> dict[str, LayerShape]:
    """Every layer of a module tree that can be adapted, by name.

    Args:
        required: targets; a grouped convolution is passed over unless a target names it.

    Raises:
        UnsupportedLayerError: a layer named in `required` by its own name cannot be adapted.
    """
    shapes = {}
    for name, module in host.named_modules():
        try:
            shape = LayerShape.of(module)
        except UnsupportedLayerError as error:
            if any(name == target or name.endswith("." + target) for target in required):
                raise UnsupportedLayerError(f"{name}: {error}") from None
            continue
        if shape is not None and name:
            shapes[name] = shape
    return shapes


def a(kind: str) -> str:
    """A word with its article, for messages: "a LoRA", "an Adapter"."""
    return f"{'an' if kind[:1] in 'AEIOUaeiou' else 'a'} {kind}"


def no_router(adapter: Adapter, what: str) -> str:
    """What a tool for style routers says of an adapter that has none; `what` is what it would do."""
    return f"{adapter.name} has no style router (it is {a(adapter.kind)}): there is nothing to {what}"
