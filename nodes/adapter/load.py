"""Loading an adapter file, and looking into one."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ...integration import paths
from ...styleinject_core import Adapter, load_adapter
from ...styleinject_core.summary import as_text, summarize
from ..schema import AdapterType, adapter_name_input, schema, trigger_of, trigger_output


class StyleInjectLoader(io.ComfyNode):
    """Adapter file -> STYLEINJECT_ADAPTER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectLoader",
            display_name="Load StyleInject Adapter",
            description="Loads a StyleInject adapter, or a LoRA, for Apply StyleInject and StyleInject Info.",
            search_aliases=["style adapter", "lora", "load style"],
            inputs=[adapter_name_input()],
            outputs=[
                AdapterType.Output(
                    "adapter", display_name="adapter", tooltip="The adapter, for Apply StyleInject or StyleInject Info."
                ),
                trigger_output(),
            ],
        )

    @classmethod
    def validate_inputs(cls, adapter_name: str | None = None) -> bool | str:
        return paths.problem(adapter_name) or True

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str) -> str:
        return paths.fingerprint(adapter_name)

    @classmethod
    def execute(cls, adapter_name: str) -> io.NodeOutput:
        adapter = load_adapter(paths.adapter_path(adapter_name))
        return io.NodeOutput(adapter, trigger_of(adapter))


class StyleInjectInfo(io.ComfyNode):
    """STYLEINJECT_ADAPTER -> what it is, as text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectInfo",
            display_name="StyleInject Info",
            description="Shows what an adapter is: the model it was made for, its layers, rank, styles and metadata.",
            search_aliases=["adapter info", "lora info", "metadata"],
            inputs=[AdapterType.Input("adapter", tooltip="The adapter to look into, from Load StyleInject Adapter.")],
            outputs=[io.String.Output("info", display_name="info", tooltip="The same text as shown in the node.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, adapter: Adapter) -> io.NodeOutput:
        text: Any = as_text(summarize(adapter))
        return io.NodeOutput(text, ui=ui.PreviewText(text))
