"""Every transformer that ComfyUI 0.33 draws with: an adapter's way onto it, on a small one of each class.

`test_transformers` compares some of them with the method written out; here is what has to hold of all.
"""

from __future__ import annotations

import all_models
import comfyui
import dit_models
import pytest
import torch
from random_adapters import close
from training import assert_clean

VERSION = comfyui.comfyui_version(comfyui.find_comfyui())


def draw(model, small, kept: bool = False) -> torch.Tensor:
    """A picture; with what the network has kept of earlier runs, or as the first of all."""
    import nodes

    if not kept and hasattr(model.model.diffusion_model, "clear_kv_cache"):
        model.model.diffusion_model.clear_kv_cache()
    with torch.inference_mode():
        latent = {"samples": torch.zeros(1, *small.latent)}
        settings = (model, 5, 2, 1.0, "euler", "simple", small.prompt(), small.prompt(1), latent)
        return nodes.KSampler().sample(*settings)[0]["samples"]


def made(pack, model, **config):
    """A random adapter for the model."""
    core, places = pack.submodule("styleinject_core"), pack.submodule("integration.places")
    adapter = core.Adapter.create(places.layer_shapes(model.model), core.AdapterConfig(r=2, n_styles=3, **config), "ink")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
    return adapter


@pytest.mark.skipif(not VERSION.startswith("0.33."), reason="the table is of ComfyUI 0.33's classes")
@pytest.mark.parametrize("kind", all_models.MODELS)
def test_an_adapter_on_it(pack, run_node, kind) -> None:
    small = all_models.MODELS[kind]
    model = dit_models.of(kind, small.config)
    core, places = pack.submodule("styleinject_core"), pack.submodule("integration.places")
    shapes = places.layer_shapes(model.model)
    words = pack.submodule("styleinject_core.layer_names")
    for word in ("default", "attention", "all", "first", "last", "block.0"):
        config = core.AdapterConfig(r=2, n_styles=3, target_modules=(word,))
        adapter = core.Adapter.create(shapes, config, "ink")
        assert adapter.names and all(words.parse(name).has_tokens for name in adapter.names)
    adapter = made(pack, model, target_modules=("default",))
    bare = draw(model, small)
    assert torch.equal(draw(model, small), bare) and not bare.isnan().any()
    off, *_ = run_node("StyleInjectApply", model=model, adapter=adapter, strength=0.0)
    assert torch.equal(draw(off, small), bare)
    patched, report, *_ = run_node("StyleInjectApply", model=model, adapter=adapter, strength=1.0)
    found = draw(patched, small)
    assert not found.isnan().any() and not close(found, bare, 1e-3)
    assert f"{len(adapter.names)} of {len(adapter.names)} layers matched" in report
    unknown = pack.submodule("integration.tokens").layers_with_unknown_tokens(model.model, adapter)
    assert (f"in {len(unknown)} layer" in report) == ("cannot be told" in report) == bool(unknown)
    assert torch.equal(draw(model, small), bare)
    assert_clean(model)


@pytest.mark.skipif(not VERSION.startswith("0.33."), reason="HiDream-O1 is not in older ones")
@pytest.mark.parametrize("tokens", ["image", "all"])
@pytest.mark.parametrize("references", [0, 3])
def test_keys_and_values_that_a_network_keeps_of_the_prompt(pack, run_node, tokens, references) -> None:
    """HiDream-O1 keeps them from one call, and run, to the next, whoever changed the layers that they come from."""
    small = all_models.MODELS["HiDreamO1"]
    model = dit_models.of("HiDreamO1", small.config)
    if references:  # their tokens follow the image's
        given = model.model.extra_conds
        patches = torch.randn(1, references, 3 * 32 * 32, generator=torch.Generator().manual_seed(2))

        def with_references(**named):
            import comfy.conds

            conds = given(**named)
            mask = torch.nn.functional.pad(conds["vinput_mask"].cond, (0, references), value=True)
            positions = torch.nn.functional.pad(conds["position_ids"].cond, (0, references), value=3)
            made = {"vinput_mask": mask, "position_ids": positions, "ref_patches": patches}
            return {**conds, **{name: comfy.conds.CONDRegular(value) for name, value in made.items()}}

        model.model.extra_conds = with_references
    adapter = made(pack, model, target_modules=("attention",), tokens=tokens)
    patched, report, *_ = run_node("StyleInjectApply", model=model, adapter=adapter)
    assert "cannot be told" not in report
    bare, adapted = draw(model, small), draw(patched, small)
    assert not close(adapted, bare, 1e-2)
    draw(model, small)
    assert close(draw(patched, small, kept=True), adapted, 1e-4)
    assert close(draw(model, small, kept=True), bare, 1e-4)


@pytest.mark.skipif(not VERSION.startswith("0.33."), reason="the table is of ComfyUI 0.33's classes")
def test_the_table_is_whole() -> None:
    """Every class that ComfyUI can load is here, among those tested at length, a U-Net, or known as untested."""
    import comfy.supported_models

    named = {kind.__name__ for kind in comfy.supported_models.models}
    groups = (all_models.MODELS, all_models.AT_LENGTH, all_models.U_NETS, all_models.UNTESTED)
    assert named == {name for group in groups for name in group}
    assert sum(map(len, groups)) == len(named), "each in one of them"
