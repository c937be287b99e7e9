"""`styleinject convert`: an adapter file, whoever wrote it, as one of this pack's, or as plain differences."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..adapter import Adapter
from ..files import AdapterFileError, load_adapter, save_adapter
from ..methods import METHODS, AdapterLayer, method_of
from ..methods.difference import difference_of
from ..methods.fixed import FixedConfig
from ..methods.kronecker import KroneckerConfig

FORMS = ("same", "lokr", "difference")
_OURS = re.compile(r"\.(styleinject|kronecker_permuted)_")  # endings of keys that no other program knows


@dataclass(frozen=True)
class Converted:
    """What came out.

    Args:
        layers, parameters: of the new file.
        left_out: names in the old one that it does not have, with the reason where there is one.
        others_read_it: whether other programs' LoRA loaders read every layer.
    """

    layers: int
    parameters: int
    left_out: tuple[str, ...]
    others_read_it: bool


def convert(source: Path, output: Path, form: str = "same") -> Converted:
    """Read an adapter and write it anew.

    Args:
        source: any file that `load_adapter` reads.
        form: "same": each layer by its own method, LoRA and LoKr as other programs read them. "lokr": every layer as LoKr, or
            none. "difference": every layer as its whole change ΔW, as large as the layers themselves.

    Raises:
        AdapterFileError: the file cannot be read or written, or a layer cannot be had in that form; names the layer.
    """
    adapter = load_adapter(source)
    for name, layer in adapter.layers.items():
        if form == "lokr" and not any(suffix.startswith(".lokr_") for suffix in _suffixes(layer, adapter)):
            if not isinstance(layer.config, KroneckerConfig):
                raise AdapterFileError(
                    f"{source.name}: {name} is {METHODS[layer.config.method].title}, not a Kronecker product"
                )
            raise AdapterFileError(
                f"{source.name}: {name}: its rows are in the order of DiffuseKronA's released program, which a LoKr file "
                'cannot say; "same" keeps it for this pack, "difference" writes the whole change for every program'
            )
        if form == "difference" and not layer.fixed:
            raise AdapterFileError(f"{source.name}: {name}: what it changes depends on the image, no difference can hold that")
    made = _as_differences(adapter) if form == "difference" else adapter
    save_adapter(made, output)
    written = [suffix for layer in made.layers.values() for suffix in _suffixes(layer, made)]
    left_out = (*adapter.skipped, *(f"{name}: {reason}" for name, reason in adapter.unused.items()))
    return Converted(len(made.names), made.parameter_count(), left_out, not any(map(_OURS.match, written)))


def _suffixes(layer: AdapterLayer, adapter: Adapter) -> list[str]:
    """How the keys end that a layer is written under."""
    method = method_of(layer, adapter.config)
    return [method.suffixes[part] for part in method.tensors(layer)]


def _as_differences(adapter: Adapter) -> Adapter:
    def whole(layer: AdapterLayer) -> AdapterLayer:
        return difference_of(layer, lambda rows: rows.detach().contiguous())

    layers = {name: whole(layer) for name, layer in adapter.layers.items()}
    config = FixedConfig(METHODS["difference"].name, target_modules=adapter.config.target_modules)
    return Adapter(layers, config, adapter.metadata, adapter.name, adapter.skipped)
