"""The monitor: what it records is what the layers used, whatever the sampler does, and no bit of the latents changes."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from random_adapters import random_adapter
from torch.utils._python_dispatch import TorchDispatchMode

SAMPLERS = [("euler", 1, 4), ("heun", 3, 7), ("dpmpp_sde", 2, 7), ("uni_pc", 1, 4)]  # images, model calls in 4 steps


@pytest.fixture(scope="module")
def model(tiny_unet_model):
    return tiny_unet_model()


@pytest.fixture(scope="module")
def adapter(pack, model):
    return random_adapter(pack, model, "attention", "conv")


@pytest.fixture
def patched(model, adapter, run_node):
    return run_node("StyleInjectApply", model=model, adapter=adapter)[0]


@pytest.fixture
def traces_of(pack):
    return pack.submodule("integration.monitor").traces_of


def latent(samples):
    return {"samples": samples}


class Softmax(TorchDispatchMode):
    """Writes down what softmax makes of one router's logits."""

    def __init__(self, router):
        super().__init__()
        self.router, self.routing, self.used = router.data_ptr(), False, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name == "addmm":
            self.routing = args[2].data_ptr() == self.router
        elif name in ("softmax", "_softmax") and self.routing:  # in inference mode the former
            self.used.append(out.clone())
            self.routing = False
        return out


def spied(pack, model, seen: list, layer: str):
    """A clone that writes down, at each model call, sigma, what the rows are, and the s that one layer has used."""
    from comfy.patcher_extension import WrappersMP

    (injection,) = pack.submodule("integration.patcher").injections_of(model)
    wanted = injection.applied.adapter.layers[layer]

    def spy(executor, *args, **kwargs):
        with Softmax(wanted.router_weight) as softmax:
            out = executor(*args, **kwargs)
        seen.append((float(args[1][0]), list(args[5]["cond_or_uncond"]), args[0].shape[0], softmax.used))
        return out

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "spy", spy)
    return clone


@pytest.mark.parametrize(("sampler", "batch", "calls"), SAMPLERS)
def test_recorded_is_what_the_layer_used_and_no_bit_changes(pack, patched, run_node, sample, traces_of, sampler, batch, calls):
    settings = {"sampler": sampler, "steps": 4, "batch": batch, "scheduler": "karras"}
    expected = sample(patched, **settings)
    monitored, monitor = run_node("StyleInjectRouterMonitor", model=patched)
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    seen: list = []
    result = sample(spied(pack, monitored, seen, layer), **settings)
    assert torch.equal(result, expected)
    (trace,) = traces_of(monitor, latent(result))
    assert trace.finished and trace.total_steps == 4 and trace.remarks == ""
    assert len(trace.layers) > 30 and not trace.probabilities.isnan().any() and not trace.sizes.isnan().any()
    row, place = 0, trace.layers.index(layer)
    for sigma, entries, rows, used in seen:
        parts = used[0].chunk(len(entries))
        assert rows == batch * len(entries) and len(used) == 1
        for entry, s in zip(entries, parts, strict=True):
            assert trace.roles[row] == ("positive", "negative")[entry]  # as CFGGuider asks for them
            assert trace.sigmas[row] == pytest.approx(sigma)
            assert torch.equal(trace.probabilities[row, place], s)
            row += 1
    assert row == len(trace.roles)
    counts = {role: trace.roles.count(role) for role in ("positive", "negative")}
    assert counts == {"positive": calls, "negative": calls}
    assert sorted(set(trace.steps.tolist())) == [0, 1, 2, 3]


def test_separate_calls_for_each_conditioning_give_the_same_trace(
    patched, run_node, sample, conditioning, traces_of, monkeypatch
):
    """Prompts of other lengths cannot share a batch; with little memory none can."""
    import comfy.model_base

    def recorded(**settings):
        monitored, monitor = run_node("StyleInjectRouterMonitor", model=patched)
        return traces_of(monitor, latent(sample(monitored, batch=2, **settings)))[0]

    together = recorded()
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *_, **__: 1e30)
    apart = recorded()
    assert together.roles[:2] in [("negative", "positive"), ("positive", "negative")]
    for role in ("positive", "negative"):
        torch.testing.assert_close(apart.by_step(role), together.by_step(role), rtol=1e-3, atol=1e-5)
    monkeypatch.undo()
    longer = recorded(negative=conditioning(1, tokens=154))
    torch.testing.assert_close(longer.by_step("positive")[0], together.by_step("positive")[0], rtol=1e-3, atol=1e-5)
    swapped = recorded(positive=conditioning(1), negative=conditioning(0))
    torch.testing.assert_close(swapped.by_step("negative")[0], together.by_step("positive")[0], rtol=1e-3, atol=1e-5)


def test_several_conditionings_areas_and_cfg_one(patched, run_node, sample, conditioning, traces_of):
    def recorded(**settings):
        monitored, monitor = run_node("StyleInjectRouterMonitor", model=patched)
        return traces_of(monitor, latent(sample(monitored, steps=2, **settings)))[0]

    two = recorded(positive=conditioning(0) + conditioning(2))
    assert two.roles.count("positive") == 4 and two.roles.count("negative") == 2
    assert recorded(cfg=1.0).roles == ("positive", "positive")
    area = [[features, {**options, "area": (4, 8, 0, 0)}] for features, options in conditioning(2)]
    parts = recorded(positive=conditioning(0) + area)
    assert set(parts.roles) == {"positive", "negative"} and parts.roles.count("positive") == 4


def test_a_guider_of_three_conditionings_names_them(pack, patched, run_node, conditioning, traces_of):
    import comfy.sample
    import comfy.samplers

    class Guider(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            conds = [self.conds["negative"], self.conds["middle"], None, [entry.copy() for entry in self.conds["positive"]]]
            out = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
            strangers = [[{**self.conds["middle"][0], "uuid": "of nobody"}]]
            comfy.samplers.calc_cond_batch(self.inner_model, strangers, x, timestep, model_options)
            return out[0] + out[1]

    monitored, monitor = run_node("StyleInjectRouterMonitor", model=patched)
    guider = Guider(monitored)
    guider.inner_set_conds({"positive": conditioning(0), "middle": conditioning(1), "negative": conditioning(2)})
    with torch.inference_mode():
        noise = torch.randn(2, 4, 8, 8)
        result = guider.sample(
            noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), torch.tensor([3.0, 1.0, 0.0])
        )
    (trace,) = traces_of(monitor, latent(result))
    assert trace.role_names == ("positive", "negative", "cond 0", "middle")
    assert all(trace.roles.count(role) == 2 for role in trace.role_names)
    torch.testing.assert_close(trace.by_step("cond 0"), trace.by_step("middle"), rtol=1e-3, atol=1e-5)


def test_rows_that_are_not_what_was_asked_for_are_unknown(patched, run_node, sample, traces_of):
    """A pack that splits the batch by itself keeps `cond_or_uncond` as it was."""
    monitored, monitor = run_node("StyleInjectRouterMonitor", model=patched)

    def one_by_one(apply_model, options):
        rows = zip(options["input"].split(1), options["timestep"].split(1), options["c"]["c_crossattn"].split(1), strict=True)
        return torch.cat([apply_model(x, t, **{**options["c"], "c_crossattn": c}) for x, t, c in rows])

    monitored.set_model_unet_function_wrapper(one_by_one)
    (trace,) = traces_of(monitor, latent(sample(monitored)))
    assert set(trace.roles) == {"unknown"}


def test_schedules_leave_steps_without_rows(patched, model, adapter, run_node, sample, traces_of):
    late = run_node("StyleInjectApply", model=model, adapter=adapter, start_percent=0.5)[0]
    monitored, monitor = run_node("StyleInjectRouterMonitor", model=late)
    (trace,) = traces_of(monitor, latent(sample(monitored, steps=6)))
    means = trace.by_step("positive").mean((1, 2, 3))
    assert means.isnan().tolist() == [True] * 3 + [False] * 3
    never = run_node("StyleInjectApply", model=model, adapter=adapter, start_percent=0.2, end_percent=0.21)[0]
    monitored, monitor = run_node("StyleInjectRouterMonitor", model=never)
    with pytest.raises(ValueError, match="style was not active at any step of this run"):
        traces_of(monitor, latent(sample(monitored)))


def test_two_adapters_two_monitors_and_the_order_of_nodes(pack, model, adapter, patched, run_node, sample, traces_of):
    other = random_adapter(pack, model, "to_v", name="other", seed=4, n_styles=2)
    both = run_node("StyleInjectApply", model=patched, adapter=other)[0]
    expected = sample(both)
    first, of_one = run_node("StyleInjectRouterMonitor", model=both, adapter_name="other.safetensors")
    second, of_all = run_node("StyleInjectRouterMonitor", model=first)
    result = sample(second)
    assert torch.equal(result, expected)
    (trace,) = traces_of(of_one, latent(result))
    assert trace.adapter == "other" and len(trace.styles) == 2
    pair = traces_of(of_all, latent(result))
    assert [t.adapter for t in pair] == ["style", "other"]
    assert torch.equal(pair[1].probabilities, trace.probabilities)
    # one that takes no part does not keep the other's trace from being seen
    off = run_node("StyleInjectStrength", model=both, adapter_name="other", strength=0.0)[0]
    watched, some = run_node("StyleInjectRouterMonitor", model=off)
    assert [t.adapter for t in traces_of(some, latent(sample(watched)))] == ["style"]
    watched, none = run_node("StyleInjectRouterMonitor", model=off, adapter_name="other")
    with pytest.raises(ValueError, match="other was not active at any step of this run"):
        traces_of(none, latent(sample(watched)))
    # an adapter applied, or a strength set, after the monitor is seen as well
    early, monitor = run_node("StyleInjectRouterMonitor", model=patched)
    late = run_node("StyleInjectStrength", model=run_node("StyleInjectApply", model=early, adapter=adapter)[0], strength=0.5)[0]
    assert [t.adapter for t in traces_of(monitor, latent(sample(late)))] == ["style", "style (2)"]
    assert len(of_one.runs) == 1, "a model that is not the monitored one fills no trace"


def test_only_the_layers_that_take_part(model, adapter, run_node, sample, traces_of):
    part = run_node("StyleInjectApply", model=model, adapter=adapter, layers="cross & up", layer_weights="to_v = 0")[0]
    monitored, monitor = run_node("StyleInjectRouterMonitor", model=part)
    (trace,) = traces_of(monitor, latent(sample(monitored)))
    assert all("up_blocks" in name and "attn2" in name and "to_v" not in name for name in trace.layers)
    assert not trace.probabilities.isnan().any()


def test_a_latent_finds_its_own_run(patched, run_node, sample, traces_of):
    monitored, monitor = run_node("StyleInjectRouterMonitor", model=patched)
    results = [sample(monitored, seed=seed, steps=steps) for seed, steps in ((1, 2), (2, 3), (3, 4))]
    for result, steps in zip(results, (2, 3, 4), strict=True):
        assert traces_of(monitor, latent(result))[0].total_steps == steps
        assert traces_of(monitor, latent(result.to(torch.bfloat16)))[0].total_steps == steps
    assert traces_of(monitor, torch.zeros(1, 64, 64, 3))[0].label == "seed 3, 4 steps", "an IMAGE takes the latest"
    for stranger in (sample(patched, seed=9), results[0][:, :, :4]):
        with pytest.raises(ValueError, match="not the result of any of the 3 runs recorded by the monitor: connect"):
            traces_of(monitor, latent(stranger))
    for seed in range(8):
        sample(monitored, seed=10 + seed, steps=1)
    with pytest.raises(ValueError, match="not the result"):
        traces_of(monitor, latent(results[0]))


def test_nothing_recorded_is_an_error_that_says_what_to_connect(pack, patched, model, run_node, sample, traces_of):
    monitor = run_node("StyleInjectRouterMonitor", model=patched)[1]
    with pytest.raises(ValueError, match="nothing was recorded: connect the monitor's MODEL output to the sampler"):
        traces_of(monitor, latent(sample(patched)))
    with pytest.raises(ValueError, match=r"nothing makes this node wait for it: connect .* to `after`"):
        traces_of(monitor)
    with pytest.raises(ValueError, match="no StyleInject adapter is applied"):
        run_node("StyleInjectRouterMonitor", model=model)
    with pytest.raises(ValueError, match='no adapter named "x" is applied to this model; there are: style'):
        run_node("StyleInjectRouterMonitor", model=patched, adapter_name="x")
    lora = random_adapter(pack, model, n_styles=1, sta="none", name="lora")
    with pytest.raises(ValueError, match="a LoRA has no style router"):
        run_node("StyleInjectRouterMonitor", model=run_node("StyleInjectApply", model=model, adapter=lora)[0])
    beside, monitor = run_node("StyleInjectRouterMonitor", model=run_node("StyleInjectApply", model=patched, adapter=lora)[0])
    assert [t.adapter for t in traces_of(monitor, latent(sample(beside)))] == ["style"]


def test_an_interrupt_keeps_what_was_recorded_and_says_so(patched, run_node, sample, traces_of):
    import comfy.model_management

    monitored, monitor = run_node("StyleInjectRouterMonitor", model=patched)

    def stop(step, *_):
        if step == 1:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(monitored, steps=5, callback=stop)
    (trace,) = traces_of(monitor, torch.zeros(1, 8, 8, 3))
    assert not trace.finished and trace.remarks == "interrupted at step 2 of 5"
    assert trace.roles.count("positive") == 2
    assert torch.equal(sample(monitored, steps=2), sample(patched, steps=2))


def test_copies_and_models_that_go(pack, tiny_unet_model, adapter, run_node, sample, traces_of):
    """Options are deep-copied on some versions; and nothing keeps a model alive."""
    model = tiny_unet_model(seed=3)
    patched = run_node("StyleInjectApply", model=model, adapter=adapter)[0]
    monitored, monitor = run_node("StyleInjectRouterMonitor", model=patched)
    copied = copy.deepcopy({"wrappers": monitored.wrappers, "monitor": monitor})
    assert copied["monitor"] is monitor
    result = sample(monitored)
    inner = weakref.ref(model.model)
    import comfy.model_management

    comfy.model_management.unload_all_models()
    del model, patched, monitored, copied
    gc.collect()
    assert inner() is None
    assert traces_of(monitor, latent(result))


def test_hypertile_and_token_routers(pack, model, run_node, sample, traces_of):
    """One image split over rows of the batch is one image; a router by token is recorded as its mean."""
    adapter = random_adapter(pack, model, "self", router_pool="token")
    patched = run_node("StyleInjectApply", model=model, adapter=adapter)[0]
    monitored, monitor = run_node("StyleInjectRouterMonitor", model=patched)
    settings = {"height": 16, "width": 16, "batch": 2}
    result = sample(monitored, **settings)
    assert torch.equal(result, sample(patched, **settings))
    (trace,) = traces_of(monitor, latent(result))
    assert trace.probabilities.shape[2:] == (2, 3)
    torch.testing.assert_close(trace.probabilities.sum(-1), torch.ones(trace.probabilities.shape[:-1]))


def test_a_compiled_layer_is_recorded_and_steered_without_compiling_anew(pack, model, adapter, run_node, sample, traces_of):
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from torch._dynamo.utils import counters

    control = run_node("StyleInjectRouterControl", temperature=0.5, role="positive")[0]
    patched = run_node("StyleInjectApply", model=model, adapter=adapter, control=control)[0]
    plain, of_plain = run_node("StyleInjectRouterMonitor", model=patched)
    (expected,) = traces_of(of_plain, latent(sample(plain, steps=2)))
    monitored, monitor = run_node("StyleInjectRouterMonitor", model=patched)
    set_torch_compile_wrapper(monitored, backend="eager", keys=["diffusion_model.middle_block.1.transformer_blocks.0.attn1"])
    torch._dynamo.reset()
    graphs = []
    for seed in (0, 1, 0):
        result = sample(monitored, steps=2, seed=seed)
        graphs.append(counters["stats"]["unique_graphs"])
    (trace,) = traces_of(monitor, latent(result))
    torch.testing.assert_close(trace.probabilities, expected.probabilities, rtol=1e-3, atol=1e-4)
    assert graphs[0] > 0 and graphs[1] == graphs[0] == graphs[2]


def test_a_saved_trace_comes_back(comfy_base, patched, run_node, sample):
    monitored, monitor = run_node("StyleInjectRouterMonitor", model=patched)
    result = sample(monitored)
    kept = run_node(
        "StyleInjectRouterTrace",
        trace=monitor,
        after=latent(result),
        label="a lighthouse",
        save=True,
        filename_prefix="../x/run",
    )[0]
    files = sorted(path.name for path in (comfy_base / "output" / "styleinject_traces").iterdir())
    assert files == ["run_00001_.safetensors"]
    loaded = run_node("StyleInjectLoadRouterTrace", trace_name=files[0])[0]
    assert loaded[0].label == "a lighthouse" and torch.equal(loaded[0].probabilities, kept[0].probabilities)
    three = run_node(
        "StyleInjectRouterTrace", trace=loaded, others=run_node("StyleInjectRouterTrace", trace=kept, others=loaded)[0]
    )[0]
    assert len(three) == 3
    with pytest.raises(FileNotFoundError, match=r"'\.\./other\.safetensors' not found"):
        run_node("StyleInjectLoadRouterTrace", trace_name="../other.safetensors")
