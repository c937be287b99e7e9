"""The router's workflow in a running ComfyUI: pictures, numbers in the history, and what the cache does."""

from __future__ import annotations

import pytest


@pytest.fixture
def graph(example):
    """The committed workflow with few steps; nodes are found by their class."""
    found = example("10 See and steer the style router.json")
    sampler(found)["steps"] = 4
    return found


def named(graph, class_type):
    (node_id,) = [key for key, node in graph.items() if node["class_type"] == class_type]
    return node_id


def sampler(graph):
    return graph[named(graph, "KSampler")]["inputs"]


def heat(run, graph):
    (numbers,) = run.shown("styleinject", named(graph, "StyleInjectRouterHeatmap"))
    return numbers


def test_the_workflow_draws_and_hands_out_numbers(client, graph) -> None:
    client.free()
    run = client.queue(graph)
    for class_type in ("StyleInjectRouterHeatmap", "StyleInjectRouterTimeline"):
        (image,) = run.shown("images", named(graph, class_type))
        assert client.fetch_image(image).std() > 5
    numbers = heat(run, graph)
    assert numbers["steps"] == 4 and numbers["label"] == f"seed {sampler(graph)['seed']}, 4 steps"
    assert len(numbers["values"]["positive"]) == len(numbers["layers"]) == 95
    assert all(abs(sum(row) - 1) < 0.01 for row in numbers["values"]["negative"])


def test_a_plot_shows_the_run_of_its_own_sampler_whatever_is_cached(client, graph) -> None:
    """The monitor stays cached while the sampler runs anew; a plot changed later still finds the run it belongs to."""
    client.free()
    first = heat(client.queue(graph), graph)
    seed = sampler(graph)["seed"]
    sampler(graph)["seed"] = seed + 1
    run = client.queue(graph)
    assert named(graph, "StyleInjectRouterMonitor") not in run.executed
    second = heat(run, graph)
    assert second["label"] == f"seed {seed + 1}, 4 steps" and second["values"] != first["values"]
    sampler(graph)["seed"] = seed
    graph[named(graph, "StyleInjectRouterHeatmap")]["inputs"]["role"] = "positive"
    again = heat(client.queue(graph), graph)
    assert again["label"] == first["label"] and again["values"]["positive"] == first["values"]["positive"]


def test_the_mixer_steers(client, graph) -> None:
    client.free()
    mixer = graph[named(graph, "StyleInjectStyleMixer")]["inputs"]
    mixer |= {"style_1": 0.5, "style_4": 0.5}
    run = client.queue(graph)
    assert all(row == [0.5, 0, 0, 0.5] for row in heat(run, graph)["values"]["positive"])
    assert "50%  vivid" in "".join(run.shown("text", named(graph, "StyleInjectStyleMixer")))


def test_each_style_alone_on_one_sheet(client, graph) -> None:
    client.free()
    for class_type in (
        "StyleInjectRouterMonitor",
        "StyleInjectRouterHeatmap",
        "StyleInjectRouterTimeline",
        "StyleInjectStyleMixer",
    ):
        del graph[named(graph, class_type)]
    node_id = named(graph, "StyleInjectApply")
    inputs = graph[node_id]["inputs"]
    graph["grid"] = {
        "class_type": "StyleInjectStyleGrid",
        "inputs": {"model": inputs["model"], "adapter": inputs["adapter"], "strength": 1.0, "with_router": True},
    }
    del graph[node_id]
    sampler(graph)["model"] = ["grid", 0]
    graph["sheet"] = {
        "class_type": "StyleInjectStyleSheet",
        "inputs": {"images": [named(graph, "StyleInjectDemoDecode"), 0], "labels": ["grid", 1], "title": "", "columns": 0},
    }
    run = client.queue(graph)
    assert len(run.shown("images", named(graph, "SaveImage"))) == 5
    (sheet,) = run.shown("images", "sheet")
    assert client.fetch_image(sheet).shape[1] == 800
