"""What an adapter is, in numbers: shared by `styleinject info` and the Info node."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .adapter import Adapter
from .files.sorting import reasons
from .hosts.architectures import describe
from .layer_names import parse
from .methods import METHODS, AdapterLayer, config_to_dict
from .router.analysis import UNUSED
from .router.mean import ROUTER_MEAN, shares, unused


def summarize(adapter: Adapter) -> dict[str, Any]:
    """Layers, ranks, styles, parameter counts and metadata of an adapter, as plain values for JSON."""
    layers = adapter.layers
    return {
        "name": adapter.name,
        "made_for": describe(adapter),
        "kind": adapter.kind,
        "method": adapter.config.method,
        "layers": len(layers),
        "linear_layers": sum(not layer.shape.is_conv and not layer.shape.other for layer in layers.values()),
        "conv_layers": sum(layer.shape.is_conv for layer in layers.values()),
        "targets": dict(Counter(parse(name).target for name in layers)),
        "properties": described(adapter),
        "dtype": str(next(adapter.parameters()).dtype).removeprefix("torch."),
        "parameters": adapter.parameter_count(),
        "bytes": sum(p.numel() * p.element_size() for p in adapter.parameters()),
        "config": config_to_dict(adapter.config),
        "metadata": {key: value for key, value in sorted(adapter.metadata.items()) if key != ROUTER_MEAN},  # said by "use"
        "other_layers": sum(bool(layer.shape.other) for layer in layers.values()),
        "skipped": list(adapter.skipped),
        "unused": dict(adapter.unused),
    }


def as_text(summary: dict[str, Any]) -> str:
    """A summary for people, one fact a line."""
    targets = ", ".join(f"{name} x{count}" for name, count in summary["targets"].items())
    kinds = f"{summary['linear_layers']} Linear, {summary['conv_layers']} Conv2d"
    if summary["other_layers"]:
        kinds += f", {summary['other_layers']} others"
    lines = [
        f"{summary['name']}: {summary['kind']} for {summary['made_for']}",
        f"layers       {summary['layers']} ({kinds}): {targets}",
        *(f"{label.ljust(12)} {value}" for label, value in summary["properties"].items()),
        f"parameters   {summary['parameters']:,} ({summary['bytes'] / 2**20:.1f} MiB, {summary['dtype']})",
    ]
    if summary["skipped"]:
        lines.append(f"not used     {len(summary['skipped'])} tensors for another model (a text encoder, a VAE)")
    if summary["unused"]:
        lines.append(f"unsupported  {reasons(summary['unused'])}")
    if summary["metadata"]:
        width = max(map(len, summary["metadata"]))
        lines += ["metadata"] + [f"  {key.ljust(width)}  {value}" for key, value in summary["metadata"].items()]
    return "\n".join(lines)


def described(adapter: Adapter) -> dict[str, str]:
    """What the adapter's methods say of its layers: {"rank": ..., "styles": ...}; of several methods, each with its title."""
    kinds: dict[str, list[AdapterLayer]] = {}
    for layer in adapter.layers.values():
        kinds.setdefault(layer.config.method, []).append(layer)
    lines = {}
    for name, layers in kinds.items():
        where = f" of {METHODS[name].title} ({len(layers)})" if len(kinds) > 1 else ""
        lines.update({f"{label}{where}": value for label, value in METHODS[name].describe(layers).items()})
    if (used := shares(adapter)) is not None:
        order = sorted(zip(used.tolist(), adapter.style_names, strict=True), reverse=True)
        most = ", ".join(f"{name} {share:.0%}" for share, name in order[:4])
        lines["use"] = (
            f"{most} in training; {unused(adapter):.0%} of the styles of single layers hardly ever (below {UNUSED:.0%})"
        )
    return lines
