"""What the nodes' schemas share: the category, the socket types of this pack, fields that newer versions know."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..integration import paths
from ..styleinject_core import Adapter

CATEGORY = "StyleInject"
STRENGTH_RANGE = {"min": -10.0, "max": 10.0, "step": 0.05, "round": 0.001}

AdapterType = io.Custom("STYLEINJECT_ADAPTER")  # a styleinject_core.Adapter
TraceType = io.Custom("STYLEINJECT_TRACE")  # an integration.monitor.Monitor, or a sequence of the core's RouterTrace
RouterControlType = io.Custom("STYLEINJECT_ROUTER_CONTROL")  # a sequence of the core's Rule
LayerWeightsType = io.Custom("STYLEINJECT_LAYER_WEIGHTS")  # text in the core's layer weight language
OptionsType = io.Custom("STYLEINJECT_TRAIN_OPTIONS")  # a TrainOptions of integration.training.train_options
DeadiffType = io.Custom("STYLEINJECT_DEADIFF")  # an integration.reference_encoder.LoadedDeadiff
TokensType = io.Custom("STYLEINJECT_TOKENS")  # the core's deadiff.Tokens
LossType = io.Custom("STYLEINJECT_LOSS")  # a LossHistory of integration.training.named_runs


def schema(
    node_id: str, *, search_aliases: list[str], section: str = "", advanced: tuple[str, ...] = (), **values: Any
) -> io.Schema:
    """An io.Schema in this pack's category.

    Args:
        search_aliases: other words a user may look for; left out where this ComfyUI's schema has no such field.
        section: the part of the category, "train" for example; none for what everybody needs.
        advanced: the inputs that most users leave alone, which newer versions show only when they are asked for.
        values: fields that every supported version has.
    """
    if any(field.name == "search_aliases" for field in fields(io.Schema)):
        values["search_aliases"] = search_aliases
    by_id = {item.id: item for item in values["inputs"]}
    for name in advanced:
        if hasattr(by_id[name], "advanced"):
            by_id[name].advanced = True
    return io.Schema(node_id=node_id, category=f"{CATEGORY}/{section}" if section else CATEGORY, **values)


def adapter_name_input() -> io.Combo.Input:
    """The choice of an adapter file; the list is read anew each time the schema is."""
    return io.Combo.Input(
        "adapter_name",
        options=paths.adapter_names(),
        tooltip="A StyleInject adapter or a LoRA (.safetensors) from models/styleinject. Those from models/loras are "
        'listed with "loras/" before their name, trained ones with "output/". Those under "demo/" are for StyleInject Demo '
        "Model alone. Press R after adding files.",
    )


def strength_input(tooltip: str, name: str = "strength", label: str | None = None) -> io.Float.Input:
    """A strength: 0 is the model without the adapter, 1 the adapter as it was trained.

    Args:
        label: what the widget is called, where its id says little.
    """
    return io.Float.Input(name, display_name=label, default=1.0, tooltip=tooltip, **STRENGTH_RANGE)


def trigger_output() -> io.String.Output:
    """The words that call an adapter's style, where its file names any."""
    return io.String.Output(
        "trigger", display_name="trigger", tooltip="The words that call it in a prompt, where its file names any; else empty."
    )


def trigger_of(adapter: Adapter) -> str:
    """ModelSpec's field for them, or "" where an adapter has none."""
    return adapter.metadata.get("modelspec.trigger_phrase", "")


def percent_inputs(what: str, start: str = "", end: str = "") -> list[Any]:
    """The part of the noise schedule that something is active in: start_percent and end_percent, 0 to 1.

    Args:
        what: what begins and ends, with its article.
        start, end: what to add about each.
    """
    late = "With a denoise of 0.4, as in a second pass, only about 0.6 to 1 happens."
    percent: dict[str, Any] = {"min": 0.0, "max": 1.0, "step": 0.01, "round": 0.001}
    return [
        io.Float.Input(
            "start_percent",
            default=0.0,
            tooltip=f"Where in the noise schedule {what} begins: 0 is pure noise. {start}{late}",
            **percent,
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            tooltip=f"Where in the noise schedule {what} ends: 1 is the finished picture. {end}{late}",
            **percent,
        ),
    ]


def executing_node(node: type[io.ComfyNode]) -> str:
    """The execution id of a node that has asked for its hidden unique_id; "" outside of a server."""
    node_id = None if node.hidden is None else node.hidden.unique_id
    return str(node_id or "")


def trace_input(name: str = "trace") -> Any:
    """A trace: a monitor's, or kept ones."""
    return TraceType.Input(name, tooltip="From StyleInject Router Monitor, Keep Router Trace or Load Router Trace.")


def after_input(name: str = "after") -> Any:
    """What makes a node wait for the sampler, and tells which of a monitor's runs is meant."""
    return io.MultiType.Input(
        name,
        types=[io.Latent, io.Image],
        optional=True,
        tooltip="For a trace from a monitor: the LATENT of the sampler that used the monitored model. It makes this node wait "
        "until the trace is filled, and finds that sampler's run. An IMAGE works too; then the latest run is taken.",
    )
