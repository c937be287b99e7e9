"""The plot nodes: pictures from a monitor or from kept traces, and numbers for programs."""

from __future__ import annotations

import json

import pytest
import torch
from random_adapters import random_adapter

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def recorded(pack, tiny_unet_model, run_node, sample):
    """(monitor, LATENT) of a run with two images, and of another seed."""
    model = tiny_unet_model()
    patched = run_node("StyleInjectApply", model=model, adapter=random_adapter(pack, model, "attention", scale=1.0))[0]
    monitored, monitor = run_node("StyleInjectRouterMonitor", model=patched)
    results = [{"samples": sample(monitored, seed=seed, steps=4, batch=2)} for seed in (1, 2)]
    return monitor, *results


@pytest.fixture
def execute(pack):
    """Run a node and return (outputs, ui)."""

    def run(node_id, **inputs):
        node = pack[node_id]
        for name, spec in node.INPUT_TYPES()["required"].items():
            if name not in inputs and len(spec) > 1 and "default" in spec[1]:
                inputs[name] = spec[1]["default"]
        output = node.execute(**inputs)
        return output.result, output.ui

    return run


@pytest.mark.parametrize(("node", "inputs", "shape"), [
    ("StyleInjectRouterHeatmap", {}, ("layers", 3)),
    ("StyleInjectRouterHeatmap", {"view": "styles x steps", "image": 2}, (4, 3)),
    ("StyleInjectRouterHeatmap", {"view": "layers x steps", "layers": "up"}, ("layers", 4)),
    ("StyleInjectRouterTimeline", {"role": "positive"}, (4, 3)),
])  # fmt: skip
def test_pictures_and_numbers(execute, recorded, node, inputs, shape):
    monitor, latent, _ = recorded
    (image,), shown = execute(node, trace=monitor, after=latent, **inputs)
    assert image.ndim == 4 and image.shape[0] == 1 and image.shape[2] == 800 and image.std() > 0.02
    assert len(shown["images"]) == 1
    (numbers,) = json.loads(json.dumps(shown["styleinject"]))
    assert numbers["steps"] == 4 and numbers["adapter"] == "style"
    values = torch.tensor(numbers["values"]["positive"])
    assert values.shape == (len(numbers["layers"]) if shape[0] == "layers" else shape[0], shape[1])
    assert set(numbers["values"]) == ({"positive"} if "role" in inputs else {"positive", "negative"})
    if shape[1] == 3:
        torch.testing.assert_close(values.sum(1), torch.ones(len(values)), atol=1e-3, rtol=0)


def test_layers(execute, recorded):
    monitor, latent, _ = recorded
    (image,), shown = execute("StyleInjectRouterLayers", trace=monitor, after=latent)
    statistics = shown["styleinject"][0]["values"]["negative"]
    assert set(statistics) == {"entropy", "reaction", "unused", "dma", "sta"}
    assert all(0 < value < 1 for value in statistics["entropy"])
    assert all(value is not None and value > 0 for key in ("dma", "sta") for value in statistics[key])
    assert image.std() > 0.02


def test_compare_and_map(execute, recorded, run_node):
    monitor, first, second = recorded
    (image,), shown = execute("StyleInjectRouterCompare", trace_a=monitor, after_a=first, trace_b=monitor, after_b=second)
    assert image.std() > 0.02 and max(max(row) for row in shown["styleinject"][0]["distance"]) > 0.001
    (_,), same = execute("StyleInjectRouterCompare", trace_a=monitor, after_a=first, trace_b=monitor, after_b=first)
    assert max(max(row) for row in same["styleinject"][0]["distance"]) == 0
    one = run_node("StyleInjectRouterTrace", trace=monitor, after=first, label="one")[0]
    both = run_node("StyleInjectRouterTrace", trace=monitor, after=second, label="two", others=one)[0]
    (image,), shown = execute("StyleInjectRouterMap", trace=both, role="positive")
    (numbers,) = json.loads(json.dumps(shown["styleinject"]))
    assert torch.tensor(numbers["points"]).shape == (2 * 4 * 2, 2)
    assert set(numbers["prompt"]) == {"one [1]", "one [2]", "two [1]", "two [2]"}
    (image,), shown = execute("StyleInjectRouterHeatmap", trace=both)
    assert image.shape[0] == 2 and len(shown["images"]) == 2, "a picture for each trace"


def test_errors(execute, recorded):
    monitor, latent, _ = recorded
    with pytest.raises(ValueError, match="nothing makes this node wait for it"):
        execute("StyleInjectRouterHeatmap", trace=monitor)
    with pytest.raises(ValueError, match="image 3 of the batch: the trace has 2"):
        execute("StyleInjectRouterTimeline", trace=monitor, after=latent, image=3)
    with pytest.raises(ValueError, match="'conv' matches none of the"):
        execute("StyleInjectRouterLayers", trace=monitor, after=latent, layers="conv")
    with pytest.raises(ValueError, match="no trace in what is connected"):
        execute("StyleInjectRouterLayers", trace=())
