"""`styleinject convert`: an adapter file, whoever wrote it, as one of this pack's, or as plain differences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..adapter import Adapter
from ..files import AdapterFileError, load_adapter, save_adapter
from ..methods import METHODS, AdapterLayer, method_of
from ..methods.difference import difference_of
from ..methods.fixed import FixedConfig

FORMS = ("same", "lokr", "difference")


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
        form: "same": each layer by its own method, LoRA and LoKr as other programs read them. "lokr": DiffuseKronA's as LoKr
            or not at all. "difference": every layer as its whole change ΔW, as large as the layers themselves.

    Raises:
        AdapterFileError: the file cannot be read or written, or a layer cannot be had in that form; names the layer.
    """
    adapter = load_adapter(source)
    for name, layer in adapter.layers.items():
        if form == "lokr" and METHODS["kronecker"].layer is not type(layer):
            raise AdapterFileError(f"{source.name}: {name} is {METHODS[layer.config.method].title}, not a Kronecker product")
        if form == "lokr" and getattr(layer.config, "permuted", False):
            raise AdapterFileError(
                f"{source.name}: {name}: its rows are in the order of DiffuseKronA's released program, which a LoKr file "
                'cannot say; "same" keeps it for this pack, "difference" writes the whole change for every program'
            )
        if form == "difference" and not layer.fixed:
            raise AdapterFileError(f"{source.name}: {name}: what it changes depends on the image, no difference can hold that")
    made = _as_differences(adapter) if form == "difference" else adapter
    save_adapter(made, output)
    suffixes = [method_of(layer, made.config).lora_names for layer in made.layers.values()]
    permuted = any(getattr(layer.config, "permuted", False) for layer in made.layers.values())
    left_out = (*adapter.skipped, *(f"{name}: {reason}" for name, reason in adapter.unused.items()))
    return Converted(len(made.names), made.parameter_count(), left_out, all(suffixes) and not permuted)


def _as_differences(adapter: Adapter) -> Adapter:
    def whole(layer: AdapterLayer) -> AdapterLayer:
        return difference_of(layer, lambda rows: rows.detach().contiguous())

    layers = {name: whole(layer) for name, layer in adapter.layers.items()}
    config = FixedConfig(METHODS["difference"].name, target_modules=adapter.config.target_modules)
    return Adapter(layers, config, adapter.metadata, adapter.name, adapter.skipped)
