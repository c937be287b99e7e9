"""Adapters beside what else ComfyUI does to a model: LoRAs, hooks, HyperTile, torch.compile, offloading, casting."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_model
import torch
from random_adapters import close, random_adapter


@pytest.fixture
def model(tiny_unet_model):
    return tiny_unet_model()


@pytest.fixture
def adapter(pack, model):
    return random_adapter(pack, model, "to_q", "to_v", "conv1")


@pytest.fixture
def lora(model) -> dict[str, torch.Tensor]:
    """A LoRA file's content, kohya spelling, for the self-attention queries."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, module in model.model.diffusion_model.named_modules():
        if name.endswith("attn1.to_q"):
            key = "lora_unet_" + name.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = torch.randn(4, module.in_features, generator=generator) * 0.2
            tensors[f"{key}.lora_up.weight"] = torch.randn(module.out_features, 4, generator=generator) * 0.2
    return tensors


@pytest.fixture
def apply(run_node):
    return lambda model, adapter, **inputs: run_node("StyleInjectApply", model=model, adapter=adapter, **inputs)[0]


def with_lora(model, lora, loader: str = "load_lora_for_models"):
    import comfy.sd

    return getattr(comfy.sd, loader)(model, None, lora, 1.0, 0)[0]


def merged(tiny_unet_model, lora):
    """The same model with the LoRA added to its weights by hand."""
    model = tiny_unet_model()
    with torch.inference_mode():
        for name, module in model.model.diffusion_model.named_modules():
            key = "lora_unet_" + name.replace(".", "_")
            if f"{key}.lora_up.weight" in lora:
                module.weight += lora[f"{key}.lora_up.weight"] @ lora[f"{key}.lora_down.weight"]
    return model


def test_native_lora_in_both_orders(model, adapter, lora, apply, sample, tiny_unet_model) -> None:
    vanilla = sample(model)
    expected = sample(apply(merged(tiny_unet_model, lora), adapter))
    assert close(sample(apply(with_lora(model, lora), adapter)), expected)
    assert close(sample(with_lora(apply(model, adapter), lora)), expected)
    assert not close(expected, sample(apply(model, adapter)), 0.01)
    assert torch.equal(sample(model), vanilla)


def test_bypass_lora_of_the_core_in_both_orders(model, adapter, lora, apply, sample, tiny_unet_model) -> None:
    import comfy.sd

    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip("this ComfyUI has no bypass LoRA")
    vanilla = sample(model)
    expected = sample(apply(merged(tiny_unet_model, lora), adapter))
    bypass = "load_bypass_lora_for_models"
    assert close(sample(apply(with_lora(model, lora, bypass), adapter)), expected)
    assert close(sample(with_lora(apply(model, adapter), lora, bypass)), expected)
    assert torch.equal(sample(model), vanilla)


def test_hook_lora(model, adapter, lora, apply, sample, conditioning, tiny_unet_model) -> None:
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    positive, negative = (comfy.hooks.set_hooks_for_conditioning(conditioning(seed), hooks) for seed in (0, 1))
    expected = sample(apply(merged(tiny_unet_model, lora), adapter))
    assert close(sample(apply(model, adapter), positive=positive, negative=negative), expected)
    one_sided = sample(apply(model, adapter), positive=positive)
    assert not close(one_sided, expected, 0.01)
    assert torch.isfinite(one_sided).all()


def test_hypertile_keeps_statistics_per_image(pack, model, adapter, apply, sample, monkeypatch) -> None:
    program = pack.submodule("integration.injection").ComfyProgram
    tiles: list[tuple[int, int]] = []
    samples = program.samples
    monkeypatch.setattr(
        program,
        "samples",
        lambda self, x, name, images: (
            tiles.append((x.shape[0], samples(self, x, name, images))) or samples(self, x, name, images)
        ),
    )

    tiled = hypertile(apply(model, adapter))
    result = sample(tiled, steps=2)
    assert any(rows == 4 * images for rows, images in tiles), "HyperTile has not tiled anything"
    assert torch.isfinite(result).all()
    monkeypatch.setattr(program, "samples", lambda self, x, name, images: x.shape[0])
    assert not close(sample(tiled, steps=2), result, 1e-3)


def test_regional_prompts_are_images_of_their_own(pack, model, adapter, apply, run_node, sample, monkeypatch) -> None:
    """Attention Couple repeats the positive rows once per region in cross-attention: the same, batched with the negative or not."""
    import comfy.model_base

    def couple(patched, regions: int = 3):
        patched = patched.clone()

        def widen(q, k, v, options):
            parts, texts = q.chunk(len(options["cond_or_uncond"])), k.chunk(len(options["cond_or_uncond"]))
            more = [regions if entry == 0 else 1 for entry in options["cond_or_uncond"]]
            q = torch.cat([part.repeat(n, 1, 1) for part, n in zip(parts, more, strict=True)])
            scaled = [torch.cat([text * (1 + 0.3 * k) for k in range(n)]) for text, n in zip(texts, more, strict=True)]
            return q, torch.cat(scaled), torch.cat(scaled)

        def narrow(out, options):
            entries = options["cond_or_uncond"]
            more = [regions if entry == 0 else 1 for entry in entries]
            images = out.shape[0] // sum(more)
            parts = out.split([n * images for n in more])
            return torch.cat([part.unflatten(0, (n, images)).mean(0) for part, n in zip(parts, more, strict=True)])

        patched.set_model_attn2_patch(widen)
        patched.set_model_attn2_output_patch(narrow)
        return patched

    styled = couple(apply(model, adapter))
    together = sample(styled, steps=2)
    assert not close(together, sample(couple(model), steps=2), 0.05)
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *_a, **_k: 1e30)
    assert close(sample(styled, steps=2), together, 1e-3), "one call for each prompt, as with little memory"
    monkeypatch.undo()
    monitored, trace = run_node("StyleInjectRouterMonitor", model=styled)
    assert torch.equal(sample(monitored, steps=2), together)
    (recorded,) = trace.find({"samples": together})
    names = [name for name in recorded.layers if ".attn2." in name]
    assert names and recorded.probabilities[:, [recorded.layers.index(name) for name in names]].isnan().all()
    others = [k for k, name in enumerate(recorded.layers) if name not in names]
    assert not recorded.probabilities[:, others].isnan().any()


def test_an_incomplete_match_is_said(pack, model, adapter, run_node, caplog) -> None:
    core = pack.submodule("styleinject_core")
    name = adapter.names[0]
    partly = core.Adapter({**adapter.layers, "no.such.to_q": adapter.layers[name]}, adapter.config, {}, "partly")
    _, report, *_ = run_node("StyleInjectApply", model=model, adapter=partly)
    assert "no.such.to_q" in report
    assert "36 of 37 layers matched" in caplog.text and "no.such.to_q" in caplog.text


def test_tiled_tokens_give_the_tiles_of_the_whole(pack, model, adapter) -> None:
    core, injection = pack.submodule("styleinject_core"), pack.submodule("integration.injection")
    attachment = injection.Injection(core.Applied(adapter)).attachment(model.model)
    call = pack.submodule("styleinject_core.call").ModelCall(images=2)
    layer = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1.to_q
    tokens = torch.randn(2, 16, layer.in_features)
    with torch.inference_mode(), attachment, attachment.in_call(call):
        whole, tiled = layer(tokens), layer(tokens.reshape(8, 4, -1))
    assert torch.allclose(tiled.reshape(whole.shape), whole, atol=1e-6)


def hypertile(model):
    from comfy_extras.nodes_hypertile import HyperTile

    node: Any = HyperTile
    run = node.execute if hasattr(node, "execute") else node().patch
    out = run(model, tile_size=32, swap_size=1, max_depth=0, scale_depth=False)
    return (out.result if hasattr(out, "result") else out)[0]


@pytest.mark.parametrize("order", ["compiled last", "compiled first"])
def test_torch_compile(model, adapter, apply, sample, order) -> None:
    """One attention layer, for the compiler's sake: it takes a minute for the whole model, with or without adapters."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def compiled(model):
        clone = model.clone()
        block = "diffusion_model.middle_block.1.transformer_blocks.0.attn1"
        set_torch_compile_wrapper(clone, backend="eager", keys=[block])
        return clone

    torch._dynamo.reset()
    expected = sample(apply(model, adapter, end_percent=0.5), steps=2)
    patched = apply(model, adapter, end_percent=0.5)
    patched = compiled(patched) if order == "compiled last" else apply(compiled(model), adapter, end_percent=0.5)
    assert close(sample(patched, steps=2), expected)
    assert close(sample(compiled(model), steps=2), sample(model, steps=2))


def test_comfyuis_own_compile_node(pack, model, apply, sample) -> None:
    """The whole model, and then with another strength. The node's compilers take minutes; this one only captures, which takes
    its time per adapted layer: those of the middle are of every kind."""
    adapter = random_adapter(pack, model, "mid")
    nodes = pytest.importorskip("comfy_extras.nodes_torch_compile")
    node: Any = nodes.TorchCompileModel

    def compiled(strength: float) -> Any:
        patched = apply(model, adapter, strength=strength)
        out = node.execute(patched, "eager") if hasattr(node, "execute") else node().patch(patched, "eager")
        return (out.result if hasattr(out, "result") else out)[0]

    torch._dynamo.reset()
    expected = {strength: sample(apply(model, adapter, strength=strength), steps=2) for strength in (1.0, 0.4)}
    assert not close(expected[1.0], expected[0.4], 0.01)
    for strength, result in expected.items():
        assert close(sample(compiled(strength), steps=2), result)


def test_layers_inside_of_compiled_blocks_are_found(pack, model, adapter) -> None:
    def layer_names() -> dict[str, str]:
        found = pack.submodule("integration.places").find_places(model.model, adapter)
        return {name: where.place.module for name, where in found.items()}

    host = model.model.diffusion_model
    plain = layer_names()
    host.middle_block[1].transformer_blocks[0] = torch.compile(host.middle_block[1].transformer_blocks[0])
    compiled = layer_names()
    assert plain.keys() == compiled.keys() == set(adapter.names)
    assert any("_orig_mod" in name for name in compiled.values())
    assert {name: value.replace("_orig_mod.", "") for name, value in compiled.items()} == plain


def test_fp8_weights_cast_at_use(pack, apply, sample) -> None:
    fp8, twin = tiny_model.fp8_model()
    adapter = random_adapter(pack, twin, "to_q", "to_v", "conv1")
    patched = apply(fp8, adapter)
    (weights,) = patched.get_additional_models_with_key("styleinject")
    assert next(weights.model.parameters()).dtype == torch.float32
    assert close(sample(patched), sample(apply(twin, adapter)))
    assert next(fp8.model.diffusion_model.parameters()).dtype == torch.float8_e4m3fn


class Int8Linear(torch.nn.Module):
    """A Linear as quantization packs make them: no nn.Linear, no weight that could be read."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.step = linear.weight.abs().max() / 127
        self.weight = torch.nn.Parameter((linear.weight / self.step).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.step, self.bias)


def test_quantized_layers_of_other_packs(pack, model, tiny_unet_model, apply, sample) -> None:
    adapter = random_adapter(pack, model, "to_q", "to_v")
    twin = tiny_unet_model()
    with torch.inference_mode():
        for ours, theirs in zip(attentions(model), attentions(twin), strict=True):
            ours.to_q = Int8Linear(ours.to_q)
            theirs.to_q.weight.copy_(ours.to_q.weight * ours.to_q.step)
    assert close(sample(apply(model, adapter)), sample(apply(twin, adapter)))


def attentions(model) -> list:
    return [m for m in model.model.diffusion_model.modules() if hasattr(m, "to_q")]


@pytest.mark.parametrize("budget", [1, 200_000])
def test_partially_loaded_models(model, adapter, lora, apply, sample, monkeypatch, budget) -> None:
    """What does not fit is cast, and patched by the LoRA, at each use: those weights must not be read as they lie."""
    import comfy.model_management
    import comfy.model_patcher

    patched = apply(with_lora(model, lora), adapter)
    expected = sample(patched)
    loaded: list[int] = []

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        self.patch_model(device_to, lowvram_model_memory=budget, load_weights=True)
        loaded.append(self.lowvram_patch_counter())
        return 0

    comfy.model_management.unload_all_models()
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "partially_load", partially_load)
    assert close(sample(patched), expected)
    assert max(loaded) > 0, "no LoRA is applied at use: nothing was tested"


def test_sdxl_type_unet(pack, apply, sample) -> None:
    model = tiny_model.sdxl_model()
    adapter = random_adapter(pack, model, "to_q", "to_v", "conv", "proj_in")
    assert any("transformer_blocks.1." in name for name in adapter.names)
    assert adapter.shapes["mid_block.attentions.0.proj_in"].kernel is None
    vanilla = sample(model, steps=2)
    styled = sample(apply(model, adapter), steps=2)
    assert torch.isfinite(styled).all() and not close(styled, vanilla, 0.01)
    assert torch.equal(sample(model, steps=2), vanilla)
