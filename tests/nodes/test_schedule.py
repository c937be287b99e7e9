"""When an adapter is active, on whose model, and what a wrapper does with calls that are not for it."""

from __future__ import annotations

import copy

import pytest
import torch
from random_adapters import close, random_adapter


@pytest.fixture(scope="module")
def model(tiny_unet_model):
    return tiny_unet_model()


@pytest.fixture(scope="module")
def adapter(pack, model):
    return random_adapter(pack, model)


def spied(model, seen: list):
    """A clone that records at each apply_model call the sigma, the number of conds and whether a layer is overridden."""
    from comfy.patcher_extension import WrappersMP

    layer = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1.to_q

    def spy(executor, *args, **kwargs):
        seen.append((float(args[1][0]), len(args[5]["cond_or_uncond"]), "forward" in layer.__dict__))
        return executor(*args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "spy", spy)  # added last, it is called inside ours
    return clone


@pytest.mark.parametrize("scheduler", ["normal", "karras"])
@pytest.mark.parametrize(("start", "end"), [(0, 0.5), (0.5, 1), (0.25, 0.75), (0.5, 0.5), (1, 1)])
def test_active_at_the_steps_of_a_core_schedule(model, adapter, run_node, sample, conditioning, scheduler, start, end) -> None:
    """The same steps as ComfyUI's own timestep range for a conditioning, of which the batch has one row more."""
    ranged = [[features, {**options, "start_percent": start, "end_percent": end}] for features, options in conditioning(2)]
    patched = run_node("StyleInjectApply", model=model, adapter=adapter, start_percent=start, end_percent=end)[0]
    seen: list = []
    sample(spied(patched, seen), steps=4, scheduler=scheduler, positive=conditioning(0) + ranged)
    assert len(seen) == 4
    assert [active for _, _, active in seen] == [conds == 3 for _, conds, _ in seen]
    assert end == start or 0 < sum(active for *_, active in seen) < 4


@pytest.mark.parametrize("start", [0.3, 0.7, 0.123])
def test_boundary_sigma_is_inside_although_percents_are_doubles(pack, model, adapter, start) -> None:
    """A step whose sigma is exactly the boundary's is active, in float32 as samplers have it."""
    core, injection = pack.submodule("styleinject_core"), pack.submodule("integration.injection")
    one = injection.Injection(core.Applied(adapter), start, 1.0)
    sigma = torch.tensor([model.model.model_sampling.percent_to_sigma(start)], dtype=torch.float32)
    assert one.active(model.model, sigma)
    assert not one.active(model.model, torch.nextafter(sigma, torch.tensor(1e9)))

    class Flow(torch.nn.Module):  # as ModelSamplingFlux and others: in Python's doubles
        def percent_to_sigma(self, percent):
            return 3.1 * (1 - percent) / (1 + 2.1 * (1 - percent))

    class Model:
        model_sampling = Flow()

    sigma = torch.tensor([Model.model_sampling.percent_to_sigma(start)], dtype=torch.float32)
    assert one.active(Model, sigma)


def test_inactive_steps_are_exactly_the_base_models(model, adapter, run_node, sample) -> None:
    patched = run_node("StyleInjectApply", model=model, adapter=adapter, start_percent=0.2, end_percent=0.21)[0]
    seen: list = []
    assert torch.equal(sample(spied(patched, seen)), sample(model))
    assert not any(active for *_, active in seen)


def test_two_schedules_side_by_side(pack, model, adapter, run_node, sample) -> None:
    other = random_adapter(pack, model, "to_q", seed=2, name="other")

    def both(first_end: float, second_start: float):
        first = run_node("StyleInjectApply", model=model, adapter=adapter, end_percent=first_end)[0]
        return run_node("StyleInjectApply", model=first, adapter=other, start_percent=second_start)[0]

    seen: list = []
    split = sample(spied(both(0.5, 0.5), seen), steps=4)
    assert [active for *_, active in seen] == [True] * 4
    assert not close(split, sample(both(1.0, 0.0), steps=4), 0.01)
    early = run_node("StyleInjectApply", model=model, adapter=adapter, end_percent=0.5)[0]
    assert not close(split, sample(early, steps=4), 1e-3)


def test_wrapper_leaves_the_models_of_others_alone(model, adapter, tiny_unet_model, run_node, sample) -> None:
    """A guider of two models may hand the wrappers of one to the other."""
    from comfy.patcher_extension import WrappersMP

    patched = run_node("StyleInjectApply", model=model, adapter=adapter)[0]
    (ours,) = patched.get_wrappers(WrappersMP.APPLY_MODEL, "styleinject")
    stranger = tiny_unet_model(seed=1)
    expected = sample(stranger)
    confused = stranger.clone()
    confused.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "another guider", ours)
    assert torch.equal(sample(confused), expected)
    assert copy.deepcopy({"wrappers": [ours]})["wrappers"][0] is ours


def test_another_object_of_the_same_model_gets_the_adapter_too(model, adapter, tiny_unet_model, run_node, sample) -> None:
    """Hooks on dynamic models, and several GPUs, run copies of the model under a clone of the patcher."""
    patched = run_node("StyleInjectApply", model=model, adapter=adapter)[0]
    twin = patched.clone()
    twin.model = tiny_unet_model().model
    assert torch.equal(sample(twin), sample(patched))
    assert torch.equal(sample(patched), sample(twin))
