"""What every node has: its id, a tooltip on each input and output, a help page, an order of inputs that never changes."""

from __future__ import annotations

import re

import comfyui
import pytest

# In the order of their widgets, for ever: saved workflows keep widget values by position. Append only.
INPUTS = {
    "StyleInjectLoader": ["adapter_name"],
    "StyleInjectApply": ["model", "adapter", "strength", "dma_strength", "sta_strength", "start_percent", "end_percent",
                         "layers", "layer_weights"],
    "StyleInjectLoadAndApply": ["model", "adapter_name", "strength"],
    "StyleInjectLayerWeights": ["self_attention", "cross_attention", "feed_forward", "convolutions", "down", "mid", "up",
                                "extra", "layer_weights"],
    "StyleInjectStrength": ["model", "adapter_name", "strength"],
    "StyleInjectInfo": ["adapter"],
    "StyleInjectRouterMonitor": ["model", "adapter_name"],
    "StyleInjectRouterTrace": ["trace", "label", "save", "filename_prefix", "after", "others"],
    "StyleInjectLoadRouterTrace": ["trace_name"],
    "StyleInjectRouterHeatmap": ["trace", "view", "role", "image", "layers", "after"],
    "StyleInjectRouterTimeline": ["trace", "role", "image", "layers", "after"],
    "StyleInjectRouterLayers": ["trace", "role", "image", "layers", "after"],
    "StyleInjectRouterMap": ["trace", "method", "color", "role", "layers", "seed", "after"],
    "StyleInjectRouterCompare": ["trace_a", "trace_b", "role", "layers", "after_a", "after_b"],
    "StyleInjectDemoModel": [],
    "StyleInjectDemoPrompt": ["text"],
    "StyleInjectDemoDecode": ["samples", "upscale"],
}  # fmt: skip
OUTPUTS = {
    "StyleInjectLoader": ["STYLEINJECT_ADAPTER"],
    "StyleInjectApply": ["MODEL", "STRING"],
    "StyleInjectLoadAndApply": ["MODEL"],
    "StyleInjectLayerWeights": ["STYLEINJECT_LAYER_WEIGHTS"],
    "StyleInjectStrength": ["MODEL"],
    "StyleInjectInfo": ["STRING"],
    "StyleInjectRouterMonitor": ["MODEL", "STYLEINJECT_TRACE"],
    "StyleInjectRouterTrace": ["STYLEINJECT_TRACE"],
    "StyleInjectLoadRouterTrace": ["STYLEINJECT_TRACE"],
    "StyleInjectRouterHeatmap": ["IMAGE"],
    "StyleInjectRouterTimeline": ["IMAGE"],
    "StyleInjectRouterLayers": ["IMAGE"],
    "StyleInjectRouterMap": ["IMAGE"],
    "StyleInjectRouterCompare": ["IMAGE"],
    "StyleInjectDemoModel": ["MODEL"],
    "StyleInjectDemoPrompt": ["CONDITIONING", "STRING"],
    "StyleInjectDemoDecode": ["IMAGE"],
}


def test_node_ids(pack) -> None:
    assert set(pack.nodes) == set(INPUTS) == set(OUTPUTS)


@pytest.mark.parametrize("node_id", INPUTS)
def test_inputs_and_outputs(pack, node_id) -> None:
    schema = pack[node_id].GET_SCHEMA()
    assert [item.id for item in schema.inputs] == INPUTS[node_id]
    assert [item.io_type for item in schema.outputs] == OUTPUTS[node_id]
    assert schema.category == "StyleInject"
    assert schema.description and schema.display_name
    for item in [*schema.inputs, *schema.outputs]:
        assert item.tooltip and item.tooltip.endswith("."), f"{node_id}.{item.id} has no tooltip"
    ids = [item.id for item in [*schema.inputs, *schema.outputs]]
    assert len(set(ids)) == len(ids), "older versions want ids unique over inputs and outputs"


@pytest.mark.parametrize("node_id", INPUTS)
def test_help_page(pack, node_id) -> None:
    text = (comfyui.REPO / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
    schema = pack[node_id].GET_SCHEMA()
    assert text.startswith(f"# {schema.display_name}\n")
    for item in schema.inputs:
        assert f"`{item.id}`" in text, f"{node_id}: the help page does not explain {item.id}"
    for heading in ("## Inputs", "## Outputs", "## Example"):
        assert heading in text
    assert not re.search(r"\n{3,}", text)


def test_entry_point_is_the_only_one(pack) -> None:
    assert pack.module.WEB_DIRECTORY == "./web"
    assert not hasattr(pack.module, "NODE_CLASS_MAPPINGS")
