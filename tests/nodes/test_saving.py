"""Saving and merging: what weights can hold is in them, and what they cannot is said where it is lost."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch
from random_adapters import close, random_adapter
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def model(tiny_unet_model):
    return tiny_unet_model()


@pytest.fixture(scope="module")
def adapter(pack, model):
    return random_adapter(pack, model, "attention")


@pytest.fixture
def apply(run_node):
    return lambda model, adapter, **inputs: run_node("StyleInjectApply", model=model, adapter=adapter, **inputs)[0]


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING)
    return lambda: [
        r.getMessage() for r in caplog.records if " is not saved" in r.getMessage() or "not merged" in r.getMessage()
    ]


@pytest.fixture(scope="module")
def lora(pack, tmp_path_factory):
    """A plain LoRA on one layer."""
    path = tmp_path_factory.mktemp("lora") / "plain.safetensors"
    key = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    generator = torch.Generator().manual_seed(3)
    save_file(
        {
            f"{key}.lora_down.weight": torch.randn(4, 64, generator=generator) * 0.2,
            f"{key}.lora_up.weight": torch.randn(64, 4, generator=generator) * 0.2,
        },
        path,
    )
    return pack.submodule("styleinject_core").load_adapter(path)


def save(model, path):
    """What the core's nodes for it do."""
    import comfy.sd

    with torch.inference_mode():
        comfy.sd.save_checkpoint(str(path), model)
    return load_file(path)


def merge(first, second, ratio=0.5):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    with torch.inference_mode():
        return ModelMergeSimple().merge(first, second, ratio)[0]


KEY = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"


def test_a_router_cannot_be_saved_and_that_is_said(model, adapter, apply, said, tmp_path) -> None:
    bare = save(model, tmp_path / "bare.safetensors")
    assert said() == []
    patched = save(apply(model, adapter), tmp_path / "patched.safetensors")
    (line,) = said()
    assert '"style" is not saved: what it changes depends on the picture' in line and "where the checkpoint is loaded" in line
    assert bare.keys() == patched.keys() and all(torch.equal(bare[key], patched[key]) for key in bare)
    save(apply(model, adapter, strength=0.0), tmp_path / "nothing.safetensors")
    assert len(said()) == 1


def test_a_plain_lora_is_saved_with_the_model(model, lora, apply, said, tmp_path) -> None:
    bare = save(model, tmp_path / "bare.safetensors")
    saved = save(apply(model, lora, strength=0.5), tmp_path / "with.safetensors")
    (layer,) = lora.layers.values()
    torch.testing.assert_close(saved[KEY].float(), bare[KEY].float() + 0.5 * layer.delta(), rtol=1e-3, atol=1e-3)
    assert said() == []
    scheduled = save(apply(model, lora, end_percent=0.5), tmp_path / "half.safetensors")
    assert torch.equal(scheduled[KEY], bare[KEY])
    assert '"plain" is not saved: it is on from 0 to 0.5 only' in said()[0]


def test_merging(model, adapter, lora, apply, sample, tiny_unet_model, said) -> None:
    other = tiny_unet_model(seed=5)
    plain = sample(merge(model, other))
    with_lora = sample(merge(model, apply(other, lora)))
    assert not close(with_lora, plain, 0.01) and said() == [], "a plain LoRA is part of the weights that are merged"
    merged = merge(model, apply(other, adapter))
    (line,) = said()
    assert '"style" is not merged' in line and "to the merged model" in line
    assert torch.equal(sample(merged), plain)
    kept = sample(merge(apply(model, adapter), other))
    assert len(said()) == 1 and close(kept, sample(apply(merge(model, other), adapter))), "the first model's stay on"


def test_it_is_shown_in_the_node_that_loses_it(model, adapter, apply, said, tmp_path, monkeypatch) -> None:
    sent = []
    server = types.SimpleNamespace(client_id="tab", last_node_id="9", send_progress_text=lambda *args: sent.append(args))
    monkeypatch.setitem(sys.modules, "server", types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=server)))
    save(apply(model, adapter), tmp_path / "patched.safetensors")
    ((text, node, client),) = sent
    assert (node, client) == ("9", "tab") and said() == [f"StyleInject: {text}"]


def test_watching_twice_says_it_once(pack, model, adapter, apply, said, tmp_path) -> None:
    pack.submodule("integration.saving").watch()
    save(apply(model, adapter), tmp_path / "patched.safetensors")
    assert len(said()) == 1


def test_a_lora_is_extracted_with_what_weights_hold(model, adapter, lora, apply, said, tmp_path, monkeypatch) -> None:
    """Core's node for the difference of two models: a router cannot be in it, and that is said; a plain LoRA is."""
    import folder_paths

    nodes = pytest.importorskip("comfy_extras.nodes_lora_extract")
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))

    def extract(model):
        execute = getattr(nodes.LoraSave, "execute", None) or nodes.LoraSave().save
        options = {"filename_prefix": "l", "rank": 2, "lora_type": "standard", "bias_diff": False}
        with torch.inference_mode():
            execute(model_diff=model, **options)
        return load_file(max(tmp_path.glob("l_*.safetensors")))

    bare, with_lora = extract(model), extract(apply(model, lora))
    key = KEY.removeprefix("model.").removesuffix(".weight") + ".lora_up.weight"
    assert not torch.equal(bare[key], with_lora[key])
    lost = []
    monkeypatch.setattr("logging.warning", lambda text, *args: lost.append(text % args))
    extract(apply(model, adapter))
    assert lost == [
        'StyleInject: "style" is not in the weights that are extracted: what it changes depends on the picture, and weights cannot '
        "hold that. Apply it beside what comes of them."
    ]
