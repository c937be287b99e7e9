"""Routers that read the prompt, in ComfyUI: every row of a batch its own, recorded, steered and trained as any other."""

from __future__ import annotations

import pytest
import torch
from random_adapters import close, random_adapter
from tiny_model import CONTEXT


@pytest.fixture(scope="module")
def model(tiny_unet_model):
    return tiny_unet_model()


@pytest.fixture
def adapter(pack, model):
    return random_adapter(pack, model, "to_q", "conv", router_input="prompt", scale=0.5)


def told(adapter, layer: str, cond) -> torch.Tensor:
    """s of one layer for one CONDITIONING, by the equation."""
    parts = adapter.layers[layer]
    return (cond[0][0].mean(1) @ parts.router_prompt.T + parts.router_bias).softmax(-1)[0]


def test_every_prompt_of_a_batch_is_read(pack, model, adapter, run_node, sample, conditioning, monkeypatch) -> None:
    positive, negative = conditioning(1), conditioning(2, tokens=154)
    patched = run_node("StyleInjectApply", model=model, adapter=adapter)[0]
    recorded, monitor = run_node("StyleInjectRouterMonitor", model=patched)
    batched = sample(recorded, positive=positive, negative=negative, batch=2)
    (trace,) = pack.submodule("integration.monitor").traces_of(monitor, {"samples": batched})
    layer = adapter.names[0]
    for role, cond in (("positive", positive), ("negative", negative)):
        rows = torch.stack(
            [s for k, s in enumerate(trace.probabilities[:, trace.layers.index(layer)]) if trace.roles[k] == role]
        )
        assert len(rows) and (rows - told(adapter, layer, cond)).abs().max() < 1e-5
    monkeypatch.setattr(type(model.model), "memory_required", lambda *_args, **_kwargs: 1e30)
    assert close(sample(patched, positive=positive, negative=negative, batch=2), batched)


def test_another_encoders_prompts_are_refused_by_apply(model, tiny_unet_model, adapter, run_node) -> None:
    other = tiny_unet_model(context_dim=CONTEXT * 2)
    with pytest.raises(ValueError, match=f"reads text conditioning of {CONTEXT} features, this model .*has {CONTEXT * 2}"):
        run_node("StyleInjectApply", model=other, adapter=adapter)


def test_a_model_that_is_called_without_a_prompt(model, adapter, run_node) -> None:
    patched = run_node("StyleInjectApply", model=model, adapter=adapter)[0]
    with torch.inference_mode():
        patched.pre_run()
        options = {"wrappers": patched.wrappers, "callbacks": patched.callbacks}
        x, sigma = torch.randn(1, 4, 8, 8), torch.ones(1)
        with pytest.raises(ValueError, match="its router reads the prompt, and this model is called without text conditioning"):
            patched.model.apply_model(x, sigma, transformer_options=options)
    assert not any("forward" in module.__dict__ for module in model.model.diffusion_model.modules())


@pytest.mark.parametrize("reads", ["prompt", "both"])
def test_it_is_trained_and_its_file_samples_what_training_made(model, train, run_node, sample, trained_folder, reads) -> None:
    adapter, _, _ = train(model=model, steps=4, learning_rate=1e-2, options={"router_input": reads})
    layer = next(iter(adapter.layers.values()))
    assert layer.router_prompt.shape == (2, CONTEXT) and layer.router_prompt.abs().max() > 0
    assert (layer.router_weight is None) == (reads == "prompt")
    loaded, _ = run_node("StyleInjectLoader", adapter_name="output/rough/rough.safetensors")
    made, read = (sample(run_node("StyleInjectApply", model=model, adapter=one)[0]) for one in (adapter, loaded))
    assert close(made, read, 0.02), "files are float16"
