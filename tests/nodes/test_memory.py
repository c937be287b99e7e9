"""The memory choice inside ComfyUI: it reads the model at hand, is shown, goes on with runs, and leaves weights in RAM."""

from __future__ import annotations

from typing import Any

import dit_models
import pytest
import tiny_model
import torch
from training import assert_clean, latents, same

MODELS = {
    "SD 1.5": tiny_model.build_tiny_model,
    "SDXL": tiny_model.sdxl_model,
    "fp8": lambda: tiny_model.fp8_model()[0],
    **dit_models.MODELS,
}
GB = 2**30


@pytest.fixture
def train(train):
    """Training with memory "auto", as the node has it."""
    return lambda *node, **inputs: train(*node, **{"memory": "auto", **inputs})


@pytest.fixture
def free(pack, monkeypatch):
    """``free(gigabytes)``: what ComfyUI says is free."""
    module = pack.submodule("integration.training.job")
    return lambda size: monkeypatch.setattr(module, "free_memory", lambda models: int(size * GB))


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_can_be_counted(pack, kind) -> None:
    """What one forward pass keeps, without and with values in its tensors."""
    model = pack.submodule("integration.training.graph_model").GraphModel(MODELS[kind]())
    latent = model.encoder.framed(torch.randn(model.encoder.channels, 16, 16))
    prompt = (tiny_model.conditioning(0)[0][0], {"pooled_output": torch.ones(1, 64)})
    if kind == "Z-Image":
        prompt[1]["attention_mask"] = torch.ones(1, prompt[0].shape[1], dtype=torch.long)
    (row,), _ = model.conditionings([prompt], [latent], False)
    requests = pack.submodule("styleinject_core.train.request")
    asked = requests.TrainingRequest("ink", requests.AdapterRequest(rank=4, styles=2))
    adapter = asked.new_adapter(model.network.layer_shapes())
    counted = pack.submodule("styleinject_core.train.activations").count(model.network, adapter, latent.shape, row, 2)

    comfy_model, kept = pack.submodule("integration.training.comfy_model"), {}
    with torch.inference_mode(False), comfy_model.Loaded([model.network], [2, *latent.shape]).running(), torch.enable_grad():
        whole = model.patcher.model
        own = {t.untyped_storage()._cdata for t in (*whole.parameters(), *whole.buffers(), *adapter.parameters())}

        def keep(tensor):
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), model.network.attachment(adapter):
            rows = pack.submodule("styleinject_core.train.data.batches").rows(row, [0, 0])
            model.network.predict(torch.randn(2, *latent.shape), torch.full((2,), 0.5), rows)
    real = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    assert counted.whole == pytest.approx(real, rel=0.08)  # norms of some models are given copies, for in-place blocks
    assert counted.checkpointed < counted.whole


def test_it_is_chosen_printed_and_shown(train, tiny_unet_model, trained_folder, free, caplog, pack) -> None:
    free(32)
    seen = []
    watch = pack.submodule("integration.training.named_runs").Watch
    watch.say, former = lambda self, text: seen.append(text), watch.say
    try:
        with caplog.at_level("INFO"):
            adapter, *_ = train(model=tiny_unet_model(), rank=0, styles=0, steps=1)
    finally:
        watch.say = former
    assert (adapter.config.r, adapter.config.n_styles) == (32, 16)
    report = "Memory auto (32.0 GB free): rank 32, 16 styles, batch 2, gradient checkpointing off, adamw. Needs about"
    assert report in caplog.text and any(report in text for text in seen)


def test_a_run_goes_on_when_less_is_free(train, tiny_unet_model, trained_folder, free) -> None:
    asked = {"model": tiny_unet_model(), "rank": 0, "styles": 0, "layers": "attention", "steps": 2}
    free(32)
    train(**asked | {"steps": 1})
    free(0.294)
    other, *_ = train(**asked | {"name": "other"})
    assert other.config.r < 32, "a new run gets a smaller adapter"
    free(0.31)
    adapter, _, step = train(**asked)
    assert adapter.name == "rough" and step == 2 and adapter.config.r == 32


def test_what_does_not_fit_is_said_before_anything_is_written(train, tiny_unet_model, trained_folder, free) -> None:
    free(0.26)
    with pytest.raises(ValueError, match=r'memory "auto": 0\.3 GB free, of which .* and this one needs'):
        train(model=tiny_unet_model(), steps=1)
    assert not trained_folder.exists()
    train(model=tiny_unet_model(), steps=1, memory="off")


def test_weights_in_ram_learn_the_same(train, tiny_unet_model, trained_folder, pack, monkeypatch) -> None:
    """A card that holds a part of the model only: the rest is lent to it block by block."""
    import comfy.model_management
    import comfy.model_patcher

    model = tiny_unet_model()
    expected, *_ = train(model=model, name="whole", options={"gradient_checkpointing": True}, memory="off")
    comfy.model_management.unload_all_models()
    lent = []

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        self.patch_model(device_to, lowvram_model_memory=100_000, load_weights=True)
        lent.append((self.model.model_lowvram, comfy.model_management.NUM_STREAMS))
        return 0

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "partially_load", partially_load)
    monkeypatch.setattr(comfy.model_management, "NUM_STREAMS", 2)
    job = pack.submodule("integration.training.job")
    choose = job.choose
    chosen = []

    def lending(work, free, previous):
        choice = choose(work, free, previous)
        settings = job.replace(choice.request.settings, gradient_checkpointing=True)
        chosen.append(job.replace(choice, lent=1, request=job.replace(choice.request, settings=settings)))
        return chosen[-1]

    monkeypatch.setattr(job, "choose", lending)
    adapter, *_ = train(model=model, name="partly")
    assert lent and all(low and not streams for low, streams in lent) and comfy.model_management.NUM_STREAMS == 2
    assert chosen and same(adapter, expected)
    assert_clean(model)


def test_dreambooth_and_distillation_count_what_they_keep(
    train, tiny_unet_model, trained_folder, pack, monkeypatch, conditioning
) -> None:
    works = []
    job = pack.submodule("integration.training.job")
    choose = job.choose
    monkeypatch.setattr(job, "choose", lambda work, *others: works.append(work) or choose(work, *others))
    model, teacher = tiny_unet_model(), tiny_unet_model(seed=1)
    train(model=model, steps=1)
    train("StyleInjectDreamBooth", model=model, steps=1, name="b", class_latents=latents(2), class_conditioning=conditioning(3))
    train("StyleInjectDistill", model=model, teacher=teacher, steps=1, name="c", latents=latents())
    needs = [work.need(work.request.adapter.sized(2, 2), work.request.settings) for work in works]
    assert needs[1].passes > 1.5 * needs[0].passes, "the graphs of both passes are there at once"
    assert needs[2].weights == 2 * needs[0].weights and needs[2].passes > needs[0].passes


def test_reference_images_count(train, pack, monkeypatch) -> None:
    """A step's memory is that of the prompt with the most of them, however short it is."""

    class Enough(Exception):
        pass

    def stop(work, *_others):
        needs.append(work.need(work.request.adapter.sized(2, 2), work.request.settings).passes)
        raise Enough

    needs: list[int] = []
    monkeypatch.setattr(pack.submodule("integration.training.job"), "choose", stop)
    model, pooled = dit_models.flux(), {"pooled_output": torch.ones(1, dit_models.WIDTH)}
    alone = [[tiny_model.conditioning(0, tokens=9)[0][0], pooled]]
    edited = [[tiny_model.conditioning(1, tokens=7)[0][0], {**pooled, "reference_latents": [torch.zeros(1, 16, 16, 16)]}]]
    for prompts in ([alone], [edited], [alone, edited]):
        with pytest.raises(Enough):
            train(model=model, latents={"samples": torch.zeros(len(prompts), 16, 8, 8)}, conditioning=prompts, layers="default")
    assert needs[0] * 1.5 < needs[1] == needs[2]


def sdxl() -> Any:
    """Stable Diffusion XL in its full size, without its weights."""
    import comfy.model_patcher
    import comfy.supported_models

    unet = {
        **tiny_model.UNET_CONFIG, "model_channels": 320, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "context_dim": 2048,
        "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10, "use_linear_in_transformer": True, "num_head_channels": 64, "adm_in_channels": 2816,
        "num_classes": "sequential",
    }  # fmt: skip
    config = comfy.supported_models.SDXL(unet)
    config.unet_config["num_heads"] = -1
    config.set_inference_dtype(torch.float16, None)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(
        config.get_model({}, "", device=torch.device("meta")), load_device=cpu, offload_device=cpu
    )


def test_what_the_help_page_says_of_sdxl(pack) -> None:
    model = pack.submodule("integration.training.graph_model").GraphModel(sdxl())
    requests, memory = (pack.submodule(f"styleinject_core.train.{name}") for name in ("request", "memory"))
    settings = pack.submodule("styleinject_core.train.settings").TrainSettings
    latent = torch.zeros(4, 128, 128)
    (row,), _ = model.conditionings([(torch.zeros(1, 77, 2048), {"pooled_output": torch.ones(1, 1280)})], [latent], False)
    work = memory.Workload(model.network, requests.TrainingRequest("ink"), latent.shape, row, may_lend=True)
    found = {}
    for card in ("8 GB", "12 GB", "16 GB", "24 GB and more"):
        work.request = requests.TrainingRequest("ink", settings=settings(memory=card))
        choice = memory.choose(work, 0)
        adapter, checkpointing = choice.request.adapter, choice.request.settings.gradient_checkpointing
        found[card] = (adapter.rank, adapter.styles, checkpointing, round(choice.lent / GB, 1))
    assert found == {
        "8 GB": (8, 4, True, 0.6),
        "12 GB": (16, 8, True, 0.0),
        "16 GB": (32, 16, True, 0.0),
        "24 GB and more": (32, 16, False, 0.0),
    }
