"""Recording the style router: the monitor, and traces that outlive the run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from ...integration.monitor import Monitor, traces_of
from ...integration.patcher import ModelPatcher, monitored
from ...styleinject_core.router.trace import RouterTrace, load_trace, save_trace
from ..schema import TraceType, after_input, executing_node, schema, trace_input

TRACES = "styleinject_traces"  # the folder in ComfyUI's output folder
_SUFFIX = ".safetensors"


class StyleInjectRouterMonitor(io.ComfyNode):
    """MODEL -> the same MODEL, whose sampling runs are recorded, and the recording."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectRouterMonitor",
            section="router",
            display_name="StyleInject Router Monitor",
            description="Records what the style router does while the model samples, and shows it live. Changes no picture.",
            search_aliases=["style router", "trace", "record", "heat map"],
            inputs=[
                io.Model.Input("model", tooltip="A model that has adapters, from Apply StyleInject."),
                io.String.Input(
                    "adapter_name", default="all", tooltip='The adapter\'s file name, or "all" for every adapter on the model.'
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", display_name="MODEL", tooltip="To the sampler whose run is to be recorded."),
                TraceType.Output(
                    "trace", display_name="trace", tooltip="To the router's plots. It is filled while the sampler runs."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # else ComfyUI may answer with another monitor's cached output, which is shown in that node
        )

    @classmethod
    def execute(cls, model: ModelPatcher, adapter_name: str) -> io.NodeOutput:
        monitor = Monitor(executing_node(cls), adapter_name)
        return io.NodeOutput(monitored(model, monitor), monitor)


class StyleInjectRouterTrace(io.ComfyNode):
    """A monitor's recording of one run -> a trace that stays as it is, named, together with others, and saved if wanted."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectRouterTrace",
            section="router",
            display_name="Keep Router Trace",
            description="Takes one run's trace from a monitor: to name it, to bring several together for one plot, to save it.",
            search_aliases=["style router", "save trace", "collect"],
            advanced=("filename_prefix",),
            inputs=[
                trace_input(),
                io.String.Input(
                    "label", default="", tooltip="A name for the plots, the prompt for example. Empty: seed and steps."
                ),
                io.Boolean.Input(
                    "save",
                    default=False,
                    tooltip=f"Write it to {TRACES} in the output folder, for Load Router Trace and for styleinject plot.",
                ),
                io.String.Input("filename_prefix", default="trace", tooltip="Start of the file name."),
                after_input(),
                TraceType.Input(
                    "others", optional=True, tooltip="Traces to add this one to, from another Keep or Load Router Trace."
                ),
            ],
            outputs=[
                TraceType.Output("traces", display_name="trace", tooltip="The other traces and this one, for the plots."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, trace: Any, label: str, save: bool, filename_prefix: str, after: Any = None, others: Any = ()
    ) -> io.NodeOutput:
        traces = tuple(t.renamed(label.strip()) if label.strip() else t for t in traces_of(trace, after))
        files = [_save(t, filename_prefix) for t in traces] if save else []
        lines = [
            f"{t.title}: {len(t.roles)} rows, {len(t.layers)} layers" + (f" ({t.remarks})" if t.remarks else "") for t in traces
        ]
        text: Any = "\n".join([*lines, *(f"saved as {name}" for name in files)])
        return io.NodeOutput((*traces_of(others or ()), *traces), ui=ui.PreviewText(text))


class StyleInjectLoadRouterTrace(io.ComfyNode):
    """A saved trace -> STYLEINJECT_TRACE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectLoadRouterTrace",
            section="router",
            display_name="Load Router Trace",
            description="Loads a trace that Keep Router Trace has saved, to look at it again or to compare.",
            search_aliases=["style router", "load trace"],
            inputs=[
                io.Combo.Input(
                    "trace_name",
                    options=trace_names(),
                    tooltip=f"A file in {TRACES} in the output folder. Press R after saving.",
                ),
            ],
            outputs=[
                TraceType.Output("trace", display_name="trace", tooltip="For the router's plots; they need no `after` then.")
            ],
        )

    @classmethod
    def validate_inputs(cls, trace_name: str | None = None) -> bool | str:
        if trace_name is None or trace_name in trace_names():
            return True
        return f"router trace {trace_name!r} not found in {_folder()}"

    @classmethod
    def fingerprint_inputs(cls, trace_name: str) -> str:
        path = _folder() / trace_name
        return f"{path.stat().st_mtime_ns}" if trace_name in trace_names() else ""

    @classmethod
    def execute(cls, trace_name: str) -> io.NodeOutput:
        if trace_name not in trace_names():
            raise FileNotFoundError(f"router trace {trace_name!r} not found in {_folder()}")
        return io.NodeOutput((load_trace(_folder() / trace_name),))


def trace_names() -> list[str]:
    """The saved traces, newest first."""
    files = [path for path in _folder().glob(f"*{_SUFFIX}") if path.is_file()]
    return [path.name for path in sorted(files, key=lambda path: (-path.stat().st_mtime_ns, path.name))]


def _folder() -> Path:
    return Path(folder_paths.get_output_directory()) / TRACES


def _save(trace: RouterTrace, prefix: str) -> str:
    """Write a trace under the next free number; the name it got."""
    name = prefix.replace("\\", "/").rsplit("/", 1)[-1].strip() or "trace"
    folder, stem, counter, _, _ = folder_paths.get_save_image_path(
        os.path.join(TRACES, name), folder_paths.get_output_directory()
    )
    path = Path(folder) / f"{stem}_{counter:05}_{_SUFFIX}"
    save_trace(trace, path)
    return path.name
