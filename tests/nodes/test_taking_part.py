"""An adapter takes part in what a run samples, whoever calls the model's layers; where it cannot, that is said once."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch
from random_adapters import close, random_adapter
from running_blocks import cached, run_blocks


@pytest.fixture(scope="module")
def model(tiny_unet_model):
    return tiny_unet_model()


@pytest.fixture(scope="module")
def adapter(pack, model):
    return random_adapter(pack, model, "attention", "conv")


@pytest.fixture
def apply(run_node):
    return lambda model, adapter, **inputs: run_node("StyleInjectApply", model=model, adapter=adapter, **inputs)[0]


@pytest.fixture
def said(caplog):
    """The lines about adapters without effect that were logged so far."""
    caplog.set_level(logging.WARNING)
    return lambda: [r.getMessage() for r in caplog.records if "had no effect" in r.getMessage()]


@pytest.mark.parametrize("order", ["pack last", "pack first"])
def test_packs_that_run_the_blocks_themselves(model, adapter, apply, sample, said, order) -> None:
    expected, vanilla = sample(apply(model, adapter, end_percent=0.6), batch=2), sample(model, batch=2)
    assert close(sample(cached(model), batch=2), vanilla)
    patched = apply(model, adapter, end_percent=0.6)
    patched = cached(patched) if order == "pack last" else apply(cached(model), adapter, end_percent=0.6)
    assert close(sample(patched, batch=2), expected)
    assert not close(expected, vanilla, 0.05)
    assert torch.equal(sample(model, batch=2), vanilla) and said() == []


def test_a_pack_that_runs_the_blocks_is_recorded_and_steered_as_any(pack, model, adapter, apply, sample, run_node) -> None:
    control = run_node("StyleInjectRouterControl", weights="1 = 1", role="negative")[0]

    def traced(wrap):
        monitored, monitor = run_node("StyleInjectRouterMonitor", model=wrap(apply(model, adapter, control=control)))
        return monitor.find({"samples": sample(monitored, batch=2)})[0]

    expected, trace = traced(lambda model: model), traced(cached)
    assert trace.roles == expected.roles and trace.steps.tolist() == expected.steps.tolist()
    torch.testing.assert_close(trace.probabilities, expected.probabilities, rtol=1e-3, atol=1e-4)
    assert trace.probabilities[trace.rows("negative"), ..., 0].eq(1).all()


def test_a_function_that_calls_apply_model_changes_nothing(model, adapter, apply, sample, run_node) -> None:
    def passed_on(apply_model, args):
        assert apply_model.__self__ is model.model
        return apply_model(args["input"], args["timestep"], **args["c"])

    patched = apply(model, adapter)
    wrapped = patched.clone()
    wrapped.set_model_unet_function_wrapper(passed_on)
    monitored, monitor = run_node("StyleInjectRouterMonitor", model=wrapped)
    result = sample(monitored)
    assert torch.equal(result, sample(patched))
    assert len(monitor.find({"samples": result})[0].roles) == 2 * 3, "each row once"


def test_another_model_inside_of_such_a_function_has_its_own_adapters(model, adapter, apply, sample) -> None:
    """The same weights without adapters, asked from a wrapper of the MODEL that has some: nothing of them is there."""
    seen = []

    def both(apply_model, args):
        options = {**args["c"]["transformer_options"], "wrappers": {}}
        base = model.model.apply_model(args["input"], args["timestep"], **{**args["c"], "transformer_options": options})
        seen.append((args, base, apply_model(args["input"], args["timestep"], **args["c"])))
        return seen[-1][2]

    patched = apply(model, adapter)
    expected = sample(patched, steps=1)
    patched.set_model_unet_function_wrapper(both)
    assert torch.equal(sample(patched, steps=1), expected)
    ((args, base, adapted),) = seen
    with torch.inference_mode():
        bare = model.model.apply_model(args["input"], args["timestep"], **{**args["c"], "transformer_options": {}})
    assert torch.equal(base, bare) and not close(adapted, bare, 0.01)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("calling", [False, True])
def test_clean_after_an_error_in_such_a_function(model, adapter, apply, sample, said, error, calling) -> None:
    vanilla = sample(model)

    def fail(base, apply_model, args):
        run_blocks(base, apply_model, {**args, "c": dict(args["c"])})
        if calling:
            handle = base.diffusion_model.middle_block[1].register_forward_hook(stop)
            try:
                apply_model(args["input"], args["timestep"], **args["c"])
            finally:
                handle.remove()
        stop()

    def stop(*_):
        raise error("in the middle")

    with pytest.raises(error):
        sample(cached(apply(model, adapter), fail))
    left = [name for name, part in model.model.named_modules() if "forward" in part.__dict__]
    assert left == [] and "apply_model" not in model.model.__dict__
    assert torch.equal(sample(model), vanilla) and said() == []


@pytest.mark.parametrize(
    ("percents", "run", "parts"),
    [
        ((0.0, 0.3), {"steps": 4, "denoise": 0.4}, ["none of its 4 steps is inside of start_percent 0 to end_percent 0.3",
                                                    "they go from 0.6", "denoise below 1"]),
        ((0.2, 1.0), {"steps": 1}, ["its only step is at 0 of the noise schedule", "start_percent 0.2 to end_percent 1"]),
        ((0.4, 0.41), {"steps": 3}, ["none of its 3 steps"]),
    ],
)  # fmt: skip
def test_percents_that_no_step_falls_into_are_said_once(model, adapter, apply, sample, said, percents, run, parts) -> None:
    start, end = percents
    patched = apply(apply(model, adapter, strength=0.5), adapter, start_percent=start, end_percent=end)
    assert torch.equal(sample(patched, **run), sample(apply(model, adapter, strength=0.5), **run))
    (line,) = said()
    assert all(part in line for part in ['"style" had no effect in this run', *parts]), line
    sample(patched, **run)
    assert len(said()) == 2, "once in each run"


def test_what_is_no_surprise_is_not_said(model, adapter, apply, sample, said) -> None:
    sample(apply(model, adapter, start_percent=0.4, end_percent=0.41, strength=0.0))
    sample(apply(model, adapter, start_percent=0.4, end_percent=0.41, dma_strength=0.0, sta_strength=0.0))
    sample(apply(model, adapter, start_percent=0.4, end_percent=0.41, layer_weights="all = 0"))
    sample(apply(model, adapter, end_percent=0.1))
    with pytest.raises(RuntimeError):
        sample(apply(model, adapter, start_percent=0.99), callback=interrupt)
    assert said() == []


def interrupt(*_):
    raise RuntimeError("interrupted")


def test_a_pack_in_the_place_of_the_model_is_named(model, adapter, apply, sample, said) -> None:
    def instead(args):
        return [torch.zeros_like(args["input"]) for _ in args["conds"]]

    instead.__module__ = "custom_nodes.somebodys_pack"
    patched = apply(model, adapter)
    patched.set_model_sampler_calc_cond_batch_function(instead)
    sample(patched)
    (line,) = said()
    assert "works the model out by itself" in line and "(custom_nodes.somebodys_pack)" in line


def test_a_pack_that_calls_none_of_its_layers_is_named(pack, model, apply, sample, said) -> None:
    def skipping(_apply_model, args):
        return torch.zeros_like(args["input"])

    skipping.__module__ = "custom_nodes.skips"
    patched = apply(model, random_adapter(pack, model, "mid"))
    patched.set_model_unet_function_wrapper(skipping)
    sample(patched)
    assert "(custom_nodes.skips)" in said()[0] and len(said()) == 1


def test_it_is_shown_in_its_node_to_whoever_queued(pack, model, adapter, sample, said, monkeypatch) -> None:
    sent = []
    server = types.SimpleNamespace(client_id="tab", send_progress_text=lambda *args: sent.append(args))
    monkeypatch.setitem(sys.modules, "server", types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=server)))
    apply_adapter = pack.submodule("integration.patcher").apply_adapter
    patched, _ = apply_adapter(model, adapter, strength=1.0, start_percent=0.4, end_percent=0.41, node_id="3:7")
    sample(patched)
    ((text, node, client),) = sent
    assert node == "3:7" and client == "tab" and said() == [f"StyleInject: {text}"]
    server.client_id = None
    sample(patched)
    assert len(sent) == 1 and len(said()) == 2, "nobody to show it to"


def test_the_second_model_of_a_guider_has_its_adapters(model, adapter, apply, conditioning, tiny_unet_model, said) -> None:
    nodes = pytest.importorskip("comfy_extras.nodes_custom_sampler")
    if not hasattr(nodes, "Guider_DualModel"):
        pytest.skip("this ComfyUI has no guider of two models")
    import comfy.samplers

    other = tiny_unet_model(seed=3)

    def sampled(first, second):
        guider = nodes.Guider_DualModel(first, second)
        guider.set_conds(conditioning(0), conditioning(1))
        guider.set_cfg(4.0)
        with torch.inference_mode():
            noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
            sigmas = torch.tensor([3.0, 1.0, 0.0])
            return guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas)

    plain = sampled(model, other)
    styled = sampled(model, apply(other, adapter))
    both = sampled(apply(model, adapter), apply(other, adapter))
    assert not close(styled, plain, 0.01) and not close(both, styled, 0.01)
    assert not close(both, sampled(apply(model, adapter), other), 0.01)
    assert torch.equal(sampled(model, other), plain) and said() == []


@pytest.mark.parametrize(
    ("rule", "run", "reason"),
    [
        ({"role": "negative"}, {"cfg": 1.0}, "the model was never asked for the negative prompt alone (at a CFG of 1"),
        (
            {"start_percent": 0.4, "end_percent": 0.41},
            {},
            "none of its 3 steps is inside of start_percent 0.4 to end_percent 0.41",
        ),
        ({"role": "positive", "end_percent": 0.2}, {"denoise": 0.4}, "denoise below 1"),
    ],
)
def test_a_router_control_without_effect_is_said(model, adapter, apply, sample, run_node, said, rule, run, reason) -> None:
    control = run_node("StyleInjectRouterControl", weights="1 = 1", **rule)[0]
    patched = apply(model, adapter, control=control)
    assert torch.equal(sample(patched, **run), sample(apply(model, adapter), **run))
    (line,) = said()
    assert line.startswith('StyleInject: a router control of "style" (for ') and reason in line
    both = run_node("StyleInjectRouterControl", weights="1 = 1", control=control)[0]
    sample(apply(model, adapter, control=both), **run)
    assert len(said()) == 2, "the one that acted is not named"


def test_router_controls_that_act_are_no_surprise(model, adapter, apply, sample, run_node, said) -> None:
    for rule in ({"role": "negative"}, {"role": "positive", "end_percent": 0.3}, {"start_percent": 0.4}):
        sample(apply(model, adapter, control=run_node("StyleInjectRouterControl", weights="1 = 1", **rule)[0]))
    assert said() == []


@pytest.mark.parametrize("kind", ["EasyCacheNode", "LazyCacheNode"])
def test_packs_that_skip_steps(model, adapter, apply, sample, said, kind) -> None:
    """Core's caches: what they keep between steps is the adapted model's, wherever they stand."""
    nodes = pytest.importorskip("comfy_extras.nodes_easycache")

    def skipping(model):
        return getattr(nodes, kind).execute(model, 0.9, 0.0, 1.0, False).result[0]

    bare, styled = sample(skipping(model), steps=8), sample(skipping(apply(model, adapter)), steps=8)
    assert not close(styled, bare, 0.05) and close(sample(apply(skipping(model), adapter), steps=8), styled)
    assert torch.equal(sample(skipping(model), steps=8), bare) and said() == []
