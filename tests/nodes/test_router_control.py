"""Steering inside ComfyUI: the right rows, the right steps, nothing left from one run to the next; grids and names."""

from __future__ import annotations

import pytest
import torch
from random_adapters import random_adapter


@pytest.fixture(scope="module")
def model(tiny_unet_model):
    return tiny_unet_model()


@pytest.fixture(scope="module")
def adapter(pack, model):
    return random_adapter(pack, model, "attention", scale=0.5)


@pytest.fixture
def steer(run_node, model, adapter):
    """steer(control=..., ...) -> (MODEL with the adapter, its monitor)."""

    def apply(**inputs):
        patched = run_node("StyleInjectApply", model=model, adapter=adapter, **inputs)[0]
        return run_node("StyleInjectRouterMonitor", model=patched)

    return apply


@pytest.fixture
def recorded(pack, steer, sample):
    """Sample with a control; the latent, and the probabilities by step of one role."""
    traces_of = pack.submodule("integration.monitor").traces_of

    def run(control, steps=4, **settings):
        steered, monitor = steer(control=control)
        result = sample(steered, steps=steps, **settings)
        (trace,) = traces_of(monitor, {"samples": result})
        return result, trace

    return run


def rule(run_node, **inputs):
    return run_node("StyleInjectRouterControl", **inputs)[0]


def test_a_control_that_changes_nothing_changes_no_bit(run_node, model, adapter, sample, steer):
    plain = sample(run_node("StyleInjectApply", model=model, adapter=adapter)[0])
    assert torch.equal(sample(steer(control=rule(run_node))[0]), plain)
    assert torch.equal(sample(steer(control=run_node("StyleInjectStyleMixer")[0])[0]), plain)
    sharper = sample(steer(control=rule(run_node, temperature=0.1))[0])
    assert not torch.allclose(sharper, plain, atol=1e-3)


def test_weights_for_one_prompt_in_some_layers_and_steps(run_node, recorded):
    control = rule(run_node, weights="1 = 3, 3 = 1", role="negative", layers="cross", start_percent=0.5)
    _, trace = recorded(control, batch=2)
    _, free = recorded(())
    fixed = torch.tensor([0.75, 0, 0.25])
    for k, name in enumerate(trace.layers):
        negative = trace.by_step("negative")[:, k]
        expected = torch.tensor([False, False, "attn2" in name, "attn2" in name])
        assert torch.equal((negative == fixed).all(-1).all(-1), expected), name
        assert not (trace.by_step("positive")[:, k] == fixed).all(-1).any()
    torch.testing.assert_close(trace.by_step("negative")[0], free.by_step("negative")[0].expand(-1, 2, -1), rtol=1, atol=1)


def test_the_first_step_is_held_and_forgotten_after_the_run(run_node, steer, sample, pack):
    traces_of = pack.submodule("integration.monitor").traces_of
    steered, monitor = steer(control=rule(run_node, hold="first step"))
    firsts = []
    for seed in (1, 2):
        result = sample(steered, seed=seed, steps=3, sampler="heun", batch=2)
        (trace,) = traces_of(monitor, {"samples": result})
        for role in ("positive", "negative"):
            s = trace.probabilities[trace.rows(role)]
            assert torch.equal(s, s[:1].expand_as(s))
        firsts.append(trace.by_step("positive")[0])
    assert not torch.allclose(*firsts, atol=1e-4), "another run has a first step of its own"


def test_two_prompts_in_one_conditioning_are_held_apart(run_node, steer, sample, conditioning, pack, monkeypatch):
    import comfy.model_base

    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *_, **__: 1e30)  # one by one
    steered, monitor = steer(control=rule(run_node, hold="first step"))
    result = sample(steered, steps=3, positive=conditioning(0) + conditioning(5))
    (trace,) = pack.submodule("integration.monitor").traces_of(monitor, {"samples": result})
    s = trace.probabilities[trace.rows("positive")].unflatten(0, (3, 2))
    assert torch.equal(s[1], s[0]) and torch.equal(s[2], s[0])
    assert not torch.allclose(s[0, 0], s[0, 1], atol=1e-4)


def test_an_area_of_one_prompt_is_held_apart_from_the_others(run_node, steer, sample, conditioning, pack):
    """ComfyUI gives the other prompt an entry for the area too, with the id of the first one's."""
    traces_of = pack.submodule("integration.monitor").traces_of
    ((tensor, extras),) = conditioning(5)
    area = [[tensor, {**extras, "area": (4, 4, 0, 0), "strength": 1.0}]]
    steered, monitor = steer(control=rule(run_node, hold="first step"))
    (held,) = traces_of(monitor, {"samples": sample(steered, steps=2, positive=area)})
    free, watch = steer()
    (plain,) = traces_of(watch, {"samples": sample(free, steps=2, positive=area)})
    assert set(held.roles) == set(plain.roles) >= {"positive", "negative"}
    for role in ("positive", "negative"):
        first = plain.probabilities[plain.rows(role)][: len(plain.rows(role)) // 2]
        assert torch.equal(held.probabilities[held.rows(role)], torch.cat([first, first]))
    assert not torch.allclose(held.by_step("positive"), held.by_step("negative"), atol=1e-4)


def test_holding_to_a_trace_repeats_its_run(run_node, recorded):
    result, trace = recorded((), steps=4)
    other, _ = recorded((), steps=4, seed=7)
    again, held = recorded(rule(run_node, hold="trace", trace=(trace,)), steps=4)
    torch.testing.assert_close(again, result, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(held.by_step("negative"), trace.by_step("negative"))
    _, moved = recorded(rule(run_node, hold="trace", trace=(trace,)), steps=4, seed=7)
    torch.testing.assert_close(moved.by_step("positive"), trace.by_step("positive"))
    assert not torch.allclose(other, result, atol=1e-2)
    with pytest.raises(ValueError, match='hold is "trace": connect a trace'):
        rule(run_node, hold="trace")


def test_the_router_is_held_at_its_mean(run_node, model, adapter, sample, recorded, pack):
    """By Apply's widget and by a control alike; controls act after the widget."""
    mean = pack.submodule("styleinject_core.router.mean")
    for inputs in ({"router": "held at its mean"}, {"control": rule(run_node, hold="mean")}):
        with pytest.raises(ValueError, match="does not have the mean of its router"):
            run_node("StyleInjectApply", model=model, adapter=adapter, **inputs)
    held = adapter.with_style_names(["a", "b", "c"])
    mean.keep_router_mean(held, {name: torch.tensor([0.5, 0.3, 0.2]) for name in held.routed})
    free = sample(run_node("StyleInjectApply", model=model, adapter=held)[0])
    by_widget = sample(run_node("StyleInjectApply", model=model, adapter=held, router="held at its mean")[0])
    by_control = sample(run_node("StyleInjectApply", model=model, adapter=held, control=rule(run_node, hold="mean"))[0])
    by_hand = sample(run_node("StyleInjectApply", model=model, adapter=held, control=rule(run_node, weights="5, 3, 2"))[0])
    assert torch.equal(by_widget, by_control) and not torch.allclose(by_widget, free, atol=1e-3)
    torch.testing.assert_close(by_widget, by_hand, atol=1e-4, rtol=1e-4)
    alone = rule(run_node, weights="1 = 1")
    after = sample(run_node("StyleInjectApply", model=model, adapter=held, router="held at its mean", control=alone)[0])
    assert torch.equal(after, sample(run_node("StyleInjectApply", model=model, adapter=held, control=alone)[0]))


def test_controls_stay_when_the_strength_changes_and_add_up(run_node, steer, sample, recorded):
    first = rule(run_node, weights="all = 1")
    both = rule(run_node, bias="2 = 100", role="positive", control=first)
    assert len(both) == 2
    _, trace = recorded(both)
    assert (trace.by_step("positive")[..., 1] > 0.999).all()
    torch.testing.assert_close(trace.by_step("negative"), torch.full_like(trace.by_step("negative"), 1 / 3))
    steered = steer(control=both)[0]
    weaker = run_node("StyleInjectStrength", model=steered, strength=0.5)[0]
    expected = steer(control=both, strength=0.5)[0]
    assert torch.equal(sample(weaker), sample(expected))


def test_errors_come_when_the_graph_is_built(run_node, model, adapter, pack):
    def apply(**inputs):
        run_node("StyleInjectApply", model=model, adapter=adapter, control=rule(run_node, **inputs))

    with pytest.raises(ValueError, match="weights: style has no style 'ink'; it has 3: style 1, style 2, style 3"):
        apply(weights="ink = 1")
    with pytest.raises(ValueError, match="'conv' matches none"):
        apply(layers="conv")
    with pytest.raises(ValueError, match='expected "style = number"'):
        apply(bias="much")
    with pytest.raises(ValueError, match="weights: style has no style '9'"):
        run_node("StyleInjectApply", model=model, adapter=adapter, control=run_node("StyleInjectStyleMixer", style_9=0.5)[0])


def test_model_calls_outside_of_a_run_are_steered_too(run_node, model, steer):
    """Training and other tools call the model without a sampler."""
    steered = steer(control=rule(run_node, weights="2 = 1"))[0]
    plain = steer()[0]
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 1.0]), torch.randn(2, 77, 64)

    def call(patcher):
        patcher.model.current_patcher = patcher
        with torch.inference_mode():
            return patcher.model.apply_model(x, t, c_crossattn=context, transformer_options={"wrappers": patcher.wrappers})

    assert not torch.allclose(call(steered), call(plain), atol=1e-4)
    assert torch.equal(call(steered), call(steered))


def test_the_grid_has_each_style_alone(pack, run_node, model, adapter, sample):
    named = run_node("StyleInjectNameStyles", adapter=adapter, names="flat\n\nglossy")[0]
    models, labels = run_node("StyleInjectStyleGrid", model=model, adapter=named)
    assert labels == ["router", "flat", "style 2", "glossy"]
    results = [sample(one) for one in models]
    alone = rule(run_node, weights="glossy = 1")
    assert torch.equal(results[3], sample(run_node("StyleInjectApply", model=model, adapter=named, control=alone)[0]))
    assert torch.equal(results[0], sample(run_node("StyleInjectApply", model=model, adapter=adapter)[0]))
    assert all(not torch.allclose(a, b, atol=1e-3) for k, a in enumerate(results) for b in results[:k])
    assert len(run_node("StyleInjectStyleGrid", model=model, adapter=named, with_router=False)[0]) == 3


def test_names_reach_traces_and_files(pack, comfy_base, run_node, model, adapter, sample):
    named = run_node("StyleInjectNameStyles", adapter=adapter, names="flat <b>\n$ink$", save_as="named")[0]
    loaded = run_node("StyleInjectLoader", adapter_name="named.safetensors")[0]
    assert loaded.style_names == named.style_names == ("flat <b>", "$ink$", "style 3")
    monitored, monitor = run_node(
        "StyleInjectRouterMonitor", model=run_node("StyleInjectApply", model=model, adapter=loaded)[0]
    )
    result = sample(monitored)
    (trace,) = pack.submodule("integration.monitor").traces_of(monitor, {"samples": result})
    assert trace.styles == named.style_names
    written = (path := pack.submodule("integration.paths").adapter_path("named.safetensors")).stat().st_mtime_ns
    again = run_node("StyleInjectNameStyles", adapter=adapter, names="flat <b>\n$ink$", save_as="named")[0]
    assert again.style_names == named.style_names and path.stat().st_mtime_ns == written, "the workflow runs again"
    with pytest.raises(FileExistsError, match=r"named\.safetensors is in .* already"):
        run_node("StyleInjectNameStyles", adapter=adapter, names="x", save_as="named")
    with pytest.raises(ValueError, match="expected a plain file name"):
        run_node("StyleInjectNameStyles", adapter=adapter, names="x", save_as="../named")


def test_mixer_shows_what_it_mixes(pack, run_node, adapter):
    output = pack["StyleInjectStyleMixer"].execute(
        role="all", layers="all", adapter=adapter.with_style_names(["flat"]), style_1=0.3, style_2=0.1, style_3=0.0
    )
    assert output.ui["text"] == (" 75%  flat\n 25%  style 2",)
    assert output.ui["styleinject_styles"] == ["flat", "style 2", "style 3"]
    assert output.result[0][0].weights == {"1": 0.3, "2": 0.1}


def test_the_sheet(pack):
    pytest.importorskip("matplotlib")
    images = [torch.rand(1, 8, 8, 3), torch.rand(2, 8, 6, 3)]
    output = pack["StyleInjectStyleSheet"].execute(images=images, labels=["a", "$b"], title=["t"], columns=[0])
    assert output.result[0].shape[2] == 800
    with pytest.raises(ValueError, match="2 images for 1 labels"):
        pack["StyleInjectStyleSheet"].execute(images=images, labels=["a"], title=["t"], columns=[0])
