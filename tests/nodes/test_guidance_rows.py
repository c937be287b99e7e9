"""Whose rows are whose, whatever other nodes do between the guider and the model: windows, guidances, other guiders."""

from __future__ import annotations

import pytest
import torch
from random_adapters import close, random_adapter


@pytest.fixture(scope="module")
def model(tiny_unet_model):
    return tiny_unet_model()


@pytest.fixture(scope="module")
def adapter(pack, model):
    return random_adapter(pack, model, "attention", scale=0.5)


@pytest.fixture
def apply(run_node, adapter):
    return lambda model, **inputs: run_node("StyleInjectApply", model=model, adapter=adapter, **inputs)[0]


@pytest.fixture
def recorded(run_node, sample):
    """Sample a MODEL that has an adapter, behind the monitor what `wrap` makes of it; the latent and the trace."""

    def run(patched, wrap=lambda model: model, **settings):
        monitored, monitor = run_node("StyleInjectRouterMonitor", model=patched)
        result = sample(wrap(monitored), **settings)
        return result, monitor.find({"samples": result})[0]

    return run


def windows(executor, model, conds, x, timestep, options):
    """Context windows as motion packs have them: some images after the others, with copies of the conditionings."""
    out = [torch.zeros_like(x) for _ in conds]
    for place in (slice(0, 2), slice(2, 4)):
        some = [None if entries is None else [dict(entry) for entry in entries] for entries in conds]
        for result, part in zip(out, executor(model, some, x[place], timestep[place], options), strict=True):
            result[place] = part
    return out


def windowed(model, function=windows):
    from comfy.patcher_extension import WrappersMP

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "windows", function)
    return clone


@pytest.mark.parametrize("order", ["windows last", "windows first"])
def test_a_control_for_one_prompt_and_context_windows(model, apply, recorded, run_node, order, caplog) -> None:
    control = run_node("StyleInjectRouterControl", weights="1 = 1", role="negative")[0]
    expected, _ = recorded(apply(model, control=control), batch=4)
    free, _ = recorded(apply(model), batch=4)
    if order == "windows last":
        result, trace = recorded(apply(model, control=control), windowed, batch=4)
    else:
        result, trace = recorded(apply(windowed(model), control=control), batch=4)
    assert close(result, expected, 1e-3) and not close(result, free, 0.05)
    assert set(trace.roles) == {"positive", "negative"}
    assert trace.probabilities[trace.rows("negative"), ..., 0].eq(1).all()
    assert not trace.probabilities[trace.rows("positive"), ..., 0].eq(1).any()
    assert "rearranged" not in caplog.text


def test_conditionings_one_by_one_and_in_another_order(model, apply, recorded, run_node) -> None:
    """A wrapper inside of ours that asks for each by itself: its place in the list says nothing."""

    def apart(executor, model, conds, x, timestep, options):
        return [executor(model, [entries], x, timestep, options)[0] for entries in conds]

    def turned(executor, model, conds, x, timestep, options):
        return executor(model, conds[::-1], x, timestep, options)[::-1]

    control = run_node("StyleInjectRouterControl", weights="1 = 1", role="negative")[0]
    expected, _ = recorded(apply(model, control=control))
    for function in (apart, turned):
        result, trace = recorded(apply(model, control=control), lambda model: windowed(model, function))  # noqa: B023
        assert close(result, expected, 1e-3)
        assert trace.probabilities[trace.rows("negative"), ..., 0].eq(1).all()
        assert not trace.probabilities[trace.rows("positive"), ..., 0].eq(1).any()


def guided(name: str, model):
    """A core guidance node on a model."""
    import comfy_extras.nodes_pag
    import comfy_extras.nodes_sag

    if name == "PAG":
        node, inputs = comfy_extras.nodes_pag.PerturbedAttentionGuidance, {"scale": 3.0}
    else:
        node, inputs = comfy_extras.nodes_sag.SelfAttentionGuidance, {"scale": 0.5, "blur_sigma": 2.0}
    run = node.execute if hasattr(node, "execute") else getattr(node(), node.FUNCTION)
    out = run(model, **inputs)
    return (out.result if hasattr(out, "result") else out)[0]


@pytest.mark.parametrize(("name", "role"), [("PAG", "positive"), ("SAG", "negative")])
@pytest.mark.parametrize("order", ["guidance last", "guidance first"])
def test_passes_of_a_guidance_are_not_the_prompts_own(model, apply, recorded, run_node, sample, name, role, order) -> None:
    patched = guided(name, apply(model)) if order == "guidance last" else apply(guided(name, model))
    settings = {"steps": 2, "height": 16, "width": 16}
    result, trace = recorded(patched, **settings)
    assert torch.equal(result, sample(patched, **settings))
    assert trace.roles.count("positive") == trace.roles.count("negative") == 2
    assert trace.roles.count(f"{role} guidance") == 2 and len(trace.roles) == 6
    _, plain = recorded(apply(model), **settings)
    for own in ("positive", "negative"):  # the first step has the same latent in both runs
        torch.testing.assert_close(trace.by_step(own)[0], plain.by_step(own)[0], rtol=1e-3, atol=1e-4)
    # what steers a prompt steers the passes of its guidance too
    control = run_node("StyleInjectRouterControl", weights="1 = 1", role=role)[0]
    _, steered = recorded(guided(name, apply(model, control=control)), **settings)
    for whose in (role, f"{role} guidance"):
        assert steered.probabilities[steered.rows(whose), ..., 0].eq(1).all()


def test_a_guider_that_asks_twice_and_a_sampler_that_does(apply, model, recorded, run_node, conditioning, sample) -> None:
    import comfy.samplers

    class Twice(comfy.samplers.CFGGuider):
        """Guidance without a function of its own, as video packs have it: the same prompt with some blocks changed."""

        def predict_noise(self, x, timestep, model_options=None, seed=None):
            negative, positive = self.conds["negative"], self.conds["positive"]
            first = comfy.samplers.calc_cond_batch(self.inner_model, [negative, positive], x, timestep, model_options)
            (again,) = comfy.samplers.calc_cond_batch(self.inner_model, [positive], x, timestep, model_options)
            return first[0] + first[1] - again

    monitored, monitor = run_node("StyleInjectRouterMonitor", model=apply(model))
    guider = Twice(monitored)
    guider.set_conds(conditioning(0), conditioning(1))
    with torch.inference_mode():
        noise = torch.randn(1, 4, 8, 8)
        sampler = comfy.samplers.sampler_object("euler")
        result = guider.sample(noise, torch.zeros_like(noise), sampler, torch.tensor([3.0, 1.0, 0.0]))
    (trace,) = monitor.find({"samples": result})
    assert {role: trace.roles.count(role) for role in trace.role_names} == {
        "positive": 2, "negative": 2, "positive guidance": 2
    }  # fmt: skip
    _, heun = recorded(apply(model), sampler="heun", steps=3)
    assert set(heun.roles) == {"positive", "negative"}
