"""What every node has: its id, a tooltip on each input and output, a help page, an order of inputs that never changes."""

from __future__ import annotations

import re

import comfyui
import pytest

# In the order of their widgets, for ever: saved workflows keep widget values by position. Append only.
INPUTS = {
    "StyleInjectLoader": ["adapter_name"],
    "StyleInjectApply": ["model", "adapter", "strength", "dma_strength", "sta_strength", "start_percent", "end_percent",
                         "layers", "router", "layer_weights", "control"],
    "StyleInjectLoadAndApply": ["model", "adapter_name", "strength", "clip", "clip_strength"],
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
    "StyleInjectRouterControl": ["temperature", "top_k", "weights", "bias", "floor", "hold", "role", "layers", "start_percent",
                                 "end_percent", "trace", "after", "control"],
    "StyleInjectStyleMixer": [*(f"style_{k}" for k in range(1, 17)), "role", "layers", "adapter", "control"],
    "StyleInjectStyleGrid": ["model", "adapter", "strength", "with_router"],
    "StyleInjectStyleSheet": ["images", "labels", "title", "columns"],
    "StyleInjectNameStyles": ["adapter", "names", "save_as"],
    "StyleInjectReference": ["model", "image", "deadiff_name", "weight", "clip_vision"],
    "StyleInjectLoadDeadiff": ["deadiff_name"],
    "StyleInjectEncodeReference": ["deadiff", "image", "stream", "batch", "clip_vision", "mask"],
    "StyleInjectMixTokens": ["tokens_a", "tokens_b", "how", "weight_a", "weight_b", "weight_c", "weight_d", "tokens_c",
                             "tokens_d"],
    "StyleInjectApplyDeadiff": ["model", "deadiff", "weight_style", "weight_content", "start_percent", "end_percent", "layers",
                                "style", "content", "mask", "negative", "layer_weights"],
    "StyleInjectSaveStyleCard": ["filename_prefix", "style", "content", "image"],
    "StyleInjectLoadStyleCard": ["card_name"],
    "StyleInjectPictures": ["folder", "captions", "caption", "trigger", "size", "keep_shape", "subfolders",
                            "images"],
    "StyleInjectPrompts": ["text", "before"],
    "StyleInjectTrain": ["model", "latents", "conditioning", "name", "method", "steps", "learning_rate", "batch_size", "rank",
                         "styles", "layers", "empty", "options", "trigger", "memory", "image_styles"],
    "StyleInjectDreamBooth": ["model", "latents", "conditioning", "class_conditioning", "name", "method", "steps",
                              "learning_rate", "batch_size", "rank", "styles", "layers", "class_images", "prior_weight",
                              "class_latents", "empty", "options", "trigger", "memory"],
    "StyleInjectDistill": ["model", "teacher", "conditioning", "name", "method", "steps", "learning_rate", "batch_size", "rank",
                          "styles", "layers", "output_weight", "feature_weight", "images_per_prompt", "size", "latents",
                          "teacher_conditioning", "empty", "teacher_empty", "options", "trigger", "memory"],
    "StyleInjectTrainOptions": ["seed", "existing_run", "accumulation", "optimizer", "schedule", "warmup", "weight_decay",
                                "clip", "min_snr_gamma", "caption_dropout", "gradient_checkpointing", "checkpoint_every",
                                "picture_every", "validation_images", "validate_every", "patience", "alpha", "router_pool",
                                "sta", "sampling_steps", "guidance", "dtype", "vae", "picture_prompt", "factors",
                                "tokens", "flow_times", "router_input"],
    "StyleInjectSave": ["adapter", "filename_prefix", "dtype", "title", "author", "trigger_phrase", "description", "license"],
    "StyleInjectLossPlot": ["losses"],
    "StyleInjectDemoModel": ["style"],
    "StyleInjectDemoPrompt": ["text"],
    "StyleInjectDemoDecode": ["samples", "upscale"],
    "StyleInjectDemoDataset": ["style", "things", "count", "prompt", "style_words"],
}  # fmt: skip
OUTPUTS = {
    "StyleInjectLoader": ["STYLEINJECT_ADAPTER", "STRING"],
    "StyleInjectApply": ["MODEL", "STRING"],
    "StyleInjectLoadAndApply": ["MODEL", "STRING", "CLIP"],
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
    "StyleInjectRouterControl": ["STYLEINJECT_ROUTER_CONTROL"],
    "StyleInjectStyleMixer": ["STYLEINJECT_ROUTER_CONTROL"],
    "StyleInjectStyleGrid": ["MODEL", "STRING"],
    "StyleInjectStyleSheet": ["IMAGE"],
    "StyleInjectNameStyles": ["STYLEINJECT_ADAPTER"],
    "StyleInjectReference": ["MODEL"],
    "StyleInjectLoadDeadiff": ["STYLEINJECT_DEADIFF", "STRING"],
    "StyleInjectEncodeReference": ["STYLEINJECT_TOKENS", "STYLEINJECT_TOKENS"],
    "StyleInjectMixTokens": ["STYLEINJECT_TOKENS"],
    "StyleInjectApplyDeadiff": ["MODEL", "STRING"],
    "StyleInjectSaveStyleCard": ["STRING"],
    "StyleInjectLoadStyleCard": ["STYLEINJECT_TOKENS", "STYLEINJECT_TOKENS", "IMAGE", "STRING"],
    "StyleInjectPictures": ["IMAGE", "STRING", "STRING", "STRING"],
    "StyleInjectPrompts": ["STRING", "STRING"],
    "StyleInjectTrain": ["STYLEINJECT_ADAPTER", "STYLEINJECT_LOSS", "INT"],
    "StyleInjectDreamBooth": ["STYLEINJECT_ADAPTER", "STYLEINJECT_LOSS", "INT"],
    "StyleInjectDistill": ["STYLEINJECT_ADAPTER", "STYLEINJECT_LOSS", "INT"],
    "StyleInjectTrainOptions": ["STYLEINJECT_TRAIN_OPTIONS"],
    "StyleInjectSave": ["STRING"],
    "StyleInjectLossPlot": ["IMAGE"],
    "StyleInjectDemoModel": ["MODEL", "VAE", "CLIP"],
    "StyleInjectDemoPrompt": ["CONDITIONING", "STRING"],
    "StyleInjectDemoDecode": ["IMAGE"],
    "StyleInjectDemoDataset": ["LATENT", "CONDITIONING", "IMAGE", "STRING"],
}  # fmt: skip

EVERYDAY = {
    *("StyleInjectLoadAndApply", "StyleInjectLoader", "StyleInjectApply", "StyleInjectStrength", "StyleInjectLayerWeights"),
    "StyleInjectInfo",
}


def section(node: type) -> str:
    """The last part of a node's category: the folder that its file is in."""
    return node.__module__.split(".")[-2]


def test_node_ids(pack) -> None:
    assert set(pack.nodes) == set(INPUTS) == set(OUTPUTS)


@pytest.mark.parametrize("node_id", INPUTS)
def test_inputs_and_outputs(pack, node_id) -> None:
    schema = pack[node_id].GET_SCHEMA()
    assert [item.id for item in schema.inputs] == INPUTS[node_id]
    assert [item.io_type for item in schema.outputs] == OUTPUTS[node_id]
    assert schema.category == ("StyleInject" if node_id in EVERYDAY else f"StyleInject/{section(pack[node_id])}")
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


def test_what_most_leave_alone_is_advanced(pack) -> None:
    """A node shows a handful of widgets; where this ComfyUI does not know such inputs, it shows them all."""
    kinds = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
    for node_id in INPUTS:
        widgets = [item for item in pack[node_id].GET_SCHEMA().inputs if item.io_type in kinds]
        if not all(hasattr(item, "advanced") for item in widgets):
            pytest.skip("this ComfyUI has no advanced inputs")
        shown = [item.id for item in widgets if not item.advanced]
        assert len(shown) <= 8, f"{node_id} shows {shown}"
        assert shown or not widgets


def test_the_one_node_path_is_found_first(pack) -> None:
    """The editor's search puts a name that is what was typed before all that only begin like it."""
    first = pack["StyleInjectLoadAndApply"].GET_SCHEMA()
    assert first.display_name == "StyleInject"
    assert [pack[node_id].GET_SCHEMA().display_name for node_id in INPUTS].count("StyleInject") == 1


def test_entry_point_is_the_only_one(pack) -> None:
    assert pack.module.WEB_DIRECTORY == "./web"
    assert not hasattr(pack.module, "NODE_CLASS_MAPPINGS")
