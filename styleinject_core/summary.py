"""What an adapter is, in numbers: shared by `styleinject info` and the Info node."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .adapter import Adapter
from .hosts.architectures import describe
from .layer_names import parse


def summarize(adapter: Adapter) -> dict[str, Any]:
    """Layers, ranks, styles, parameter counts and metadata of an adapter, as plain values for JSON."""
    layers = adapter.layers
    return {
        "name": adapter.name,
        "made_for": describe(adapter),
        "kind": "StyleInject" if any(layer.router_weight is not None for layer in layers.values()) else "LoRA",
        "layers": len(layers),
        "linear_layers": sum(not layer.shape.is_conv for layer in layers.values()),
        "conv_layers": sum(layer.shape.is_conv for layer in layers.values()),
        "targets": dict(Counter(parse(name).target for name in layers)),
        "ranks": sorted({layer.config.r for layer in layers.values()}),
        "n_styles": sorted({layer.config.n_styles for layer in layers.values()}),
        "dtype": str(next(iter(layers.values())).A.dtype).removeprefix("torch."),
        "parameters": adapter.parameter_count(),
        "bytes": sum(p.numel() * p.element_size() for p in adapter.parameters()),
        "config": adapter.config.to_dict(),
        "metadata": dict(sorted(adapter.metadata.items())),
        "skipped": list(adapter.skipped),
    }


def as_text(summary: dict[str, Any]) -> str:
    """A summary for people, one fact a line."""
    config = summary["config"]
    targets = ", ".join(f"{name} x{count}" for name, count in summary["targets"].items())
    lines = [
        f"{summary['name']}: {summary['kind']} for {summary['made_for']}",
        f"layers       {summary['layers']} ({summary['linear_layers']} Linear, {summary['conv_layers']} Conv2d): {targets}",
        f"rank         {_list(summary['ranks'])}, alpha {'= rank' if config['alpha'] is None else config['alpha']}",
        f"styles       {_list(summary['n_styles'])}, router pool {config['router_pool']}, STA {config['sta']}",
        f"parameters   {summary['parameters']:,} ({summary['bytes'] / 2**20:.1f} MiB, {summary['dtype']})",
    ]
    if summary["skipped"]:
        lines.append(f"not used     {len(summary['skipped'])} tensors that are no U-Net layer")
    if summary["metadata"]:
        width = max(map(len, summary["metadata"]))
        lines += ["metadata"] + [f"  {key.ljust(width)}  {value}" for key, value in summary["metadata"].items()]
    return "\n".join(lines)


def _list(values: list[int]) -> str:
    return ", ".join(map(str, values))
