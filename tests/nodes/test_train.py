"""The training nodes inside ComfyUI: what they learn, and that they leave everything else as it was."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from random_adapters import close, random_adapter
from training import assert_clean, latents, mean, same


@pytest.fixture(scope="module")
def model(tiny_unet_model):
    return tiny_unet_model()


def test_it_learns_and_the_model_stays_as_it_was(model, sample, train, run_node, trained_folder) -> None:
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    plain = sample(model)
    adapter, losses, step = train(model=model, steps=30, layers="conv", rank=4, learning_rate=1e-2)
    assert step == 30 and len(losses.losses) == 30
    assert mean(losses.losses[-5:]) < 0.8 * mean(losses.losses[:5])
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())
    assert torch.equal(sample(model), plain)
    assert_clean(model)
    patched, report, *_ = run_node("StyleInjectApply", model=model, adapter=adapter)
    assert "rough: " in report and not close(sample(patched), plain, 0.01)
    assert sorted(path.name for path in (trained_folder / "rough").iterdir() if path.name != ".lock") == [
        "loss.jsonl", "resume.state", "rough.safetensors", "step-000030.safetensors"]  # fmt: skip
    loaded, _ = run_node("StyleInjectLoader", adapter_name="output/rough/rough.safetensors")
    assert set(loaded.names) == set(adapter.names) and loaded.metadata["styleinject.steps"] == "30"
    assert loaded.metadata["modelspec.architecture"] == "SD15/styleinject"
    assert all(tensor.device.type == "cpu" and not tensor.requires_grad for tensor in adapter.parameters())


def test_the_loader_lists_adapters_only(model, train, pack) -> None:
    train(model=model, options={"checkpoint_every": 2})
    listed = [name for name in pack.submodule("integration.paths").adapter_names() if name.startswith("output/")]
    assert listed == [
        "output/rough/rough.safetensors",
        "output/rough/step-000002.safetensors",
        "output/rough/step-000004.safetensors",
    ]


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("styleinject", {"A", "B", "router_weight", "router_bias", "hyper_weight", "hyper_bias"}),
        ("lora", {"A", "B"}),
        ("dma-only", {"A", "B", "router_weight", "router_bias"}),
        ("sta-only", {"A", "B", "router_weight", "router_bias", "hyper_weight", "hyper_bias"}),
    ],
)
def test_methods(model, train, method, parts) -> None:
    adapter, _, _ = train(model=model, method=method, steps=1)
    layer = next(iter(adapter.layers.values()))
    assert set(layer.tensors()) == parts
    assert layer.A.shape[:2] == (1 if method in ("lora", "sta-only") else 2, 2)
    assert adapter.metadata["modelspec.architecture"].endswith(f"/{method}")
    trained = [name for name, tensor in layer.tensors().items() if name != "A" and tensor.abs().max() > 0]
    assert "B" in trained


def test_an_interrupt_keeps_what_was_reached_and_goes_on_bit_for_bit(model, sample, train, trained_folder, monkeypatch) -> None:
    import comfy.model_management
    import comfy.utils

    plain = sample(model)
    whole, history, _ = train(model=model, steps=8, name="whole")

    def hook(value: int, total: int, *_args: Any, **_others: Any) -> None:
        if value >= 3:
            comfy.model_management.interrupt_current_processing(True)
        comfy.model_management.throw_exception_if_processing_interrupted()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0.0, raising=False)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(model=model, steps=8)
    comfy.model_management.interrupt_current_processing(False)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", None)
    assert_clean(model)
    assert torch.equal(sample(model), plain)
    assert [path.name for path in (trained_folder / "rough").glob("*.safetensors")] == ["step-000003.safetensors"]
    resumed, losses, step = train(model=model, steps=8)
    assert step == 8 and losses.losses == history.losses
    assert same(resumed, whole)
    assert not (trained_folder / "rough_2").exists()


def test_a_run_of_the_same_name(model, train, trained_folder) -> None:
    """The same settings: it is taken as it is, or goes on. Others: a numbered run, or an error that says what differs."""
    first, _, _ = train(model=model)
    again, losses, step = train(model=model)
    assert same(first, again) and step == 4 and len(losses.losses) == 4
    longer, _, step = train(model=model, steps=6)
    assert step == 6 and longer.name == "rough" and not same(longer, first)
    other, _, _ = train(model=model, rank=3)
    assert other.name == "rough_2"
    assert train(model=model, rank=3)[0].name == "rough_2"
    assert train(model=model, steps=6)[0].name == "rough"
    with pytest.raises(ValueError, match=r"adapter\.r: was 3, is 5"):
        train(model=model, rank=5, options={"existing_run": "go on"})
    assert train(model=model, rank=3, options={"existing_run": "new"})[0].name == "rough_3"
    with pytest.raises(ValueError, match="no run named 'fine' in output/styleinject"):
        train(model=model, name="fine", options={"existing_run": "go on"})
    with pytest.raises(ValueError, match="is at step 4 already, and 3 steps are asked for"):
        train(model=model, rank=3, steps=3, options={"existing_run": "go on"})
    fewer, _, step = train(model=model, rank=3, steps=3)
    assert step == 3 and fewer.name == "rough_4", "of fewer steps, not the one that has more"
    assert sorted(path.name for path in trained_folder.iterdir()) == ["rough", "rough_2", "rough_3", "rough_4"]


def test_what_else_makes_another_run(pack, model, train, run_node, conditioning, trained_folder) -> None:
    """The empty prompt, how the model samples, and the adapters that are on it."""
    import comfy_extras.nodes_model_advanced as advanced

    patched, _, *_ = run_node("StyleInjectApply", model=model, adapter=random_adapter(pack, model, name="ink"))
    shifted = advanced.ModelSamplingSD3().patch(model, 3.0)[0]
    cases = [
        {"model": model},
        {"model": model, "empty": conditioning(9)},
        {"model": model, "empty": conditioning(8)},
        {"model": advanced.ModelSamplingDiscrete().patch(model, "v_prediction", False)[0]},
        {"model": shifted},
        {"model": advanced.ModelSamplingSD3().patch(model, 2.0)[0]},
        {"model": patched},
        {"model": run_node("StyleInjectStrength", model=patched, adapter_name="all", strength=0.5)[0]},
    ]
    names = [train(**case, steps=1)[0].name for case in cases]
    assert names == ["rough", *(f"rough_{k}" for k in range(2, len(cases) + 1))]
    assert [train(**case, steps=1)[0].name for case in cases] == names
    no_dropout = {"options": {"caption_dropout": 0.0}, "name": "none", "steps": 1}
    assert {train(**case, **no_dropout)[0].name for case in cases[:3]} == {"none"}, "an empty prompt that is not used"


def test_a_folder_that_another_program_trains_in_is_left_alone(pack, model, train, trained_folder) -> None:
    """Two ComfyUIs with one output folder."""
    checkpoints = pack.submodule("styleinject_core.train.run.checkpoints")
    train(model=model)
    folder = checkpoints.RunFolder(trained_folder / "rough")
    with folder.locked():
        assert train(model=model)[0].name == "rough_2"
        with pytest.raises(checkpoints.CheckpointError, match="rough_?2?: another run is training in this folder"), \
                checkpoints.RunFolder(trained_folder / "rough_2").locked():  # fmt: skip
            train(model=model, options={"existing_run": "go on"})
    new = checkpoints.RunFolder(trained_folder / "new")  # before its first checkpoint
    with new.locked():
        assert train(model=model, name="new")[0].name == "new_2"


def test_another_model_is_another_run(model, tiny_unet_model, train) -> None:
    train(model=model, steps=1)
    assert train(model=tiny_unet_model(seed=5), steps=1)[0].name == "rough_2"


def test_nan_stops_with_the_step_and_the_last_checkpoint(pack, model, sample, train, trained_folder) -> None:
    plain = sample(model)
    broken = {"samples": latents()["samples"].clone()}
    broken["samples"][2] = 3e38
    order = pack.submodule("styleinject_core.train.data.buckets").BatchOrder
    seed = next(seed for seed in range(100) if order([(8, 8)] * 4, 1, seed).batch(2) == [2])
    with pytest.raises(
        RuntimeError,
        match=r"(loss|gradient) became (nan|inf) at step 3 of 4: lower the learning rate\. The last checkpoint is step 2, in rough",
    ):
        train(model=model, latents=broken, batch_size=1, options={"checkpoint_every": 1, "seed": seed})
    assert_clean(model)
    assert torch.equal(sample(model), plain)
    assert (trained_folder / "rough" / "step-000002.safetensors").exists()


def test_latents_that_are_no_numbers_are_the_vaes(model, train) -> None:
    broken = {"samples": latents()["samples"].clone()}
    broken["samples"][1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"latents: 1 of 4 hold NaN.*number 2.*the VAE.*--fp32-vae"):
        train(model=model, latents=broken)


def test_an_adapter_that_cannot_be_saved_is_still_there(pack, model, train, run_node, trained_folder, monkeypatch) -> None:
    def refused(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(pack.submodule("integration.training.named_runs"), "save_adapter", refused)
    adapter, _, step = train(model=model)
    assert step == 4 and adapter.name == "rough"
    (name,) = run_node("StyleInjectSave", adapter=adapter, filename_prefix="elsewhere")
    assert (trained_folder / name.removeprefix("output/")).is_file()


def test_prompts_and_images_of_every_form(model, train, conditioning) -> None:
    """A batch, a list, and several sizes; one prompt, a list of prompts, several in one CONDITIONING, prompts of other lengths."""
    several = [conditioning(k)[0] for k in range(4)]  # as ConditioningCombine makes them
    batch, _, _ = train(model=model, conditioning=several, name="a")
    singles = [{"samples": latents()["samples"][k : k + 1]} for k in range(4)]
    lists, _, _ = train(model=model, latents=singles, conditioning=[[entry] for entry in several], name="b")
    assert same(batch, lists)
    tensors = torch.cat([entry[0] for entry in several])
    pooled = torch.cat([entry[1]["pooled_output"] for entry in several])
    rows, _, _ = train(model=model, conditioning=[[tensors, {"pooled_output": pooled}]], name="c")
    assert same(batch, rows)
    mixed = [latents(2), latents(2, height=12)]
    lengths = [conditioning(0), conditioning(1, tokens=154), conditioning(2), conditioning(3)]
    assert train(model=model, latents=mixed, conditioning=lengths, name="d", empty=conditioning(9))[2] == 4


def _with(extra: dict[str, Any], conditioning: list) -> list:
    return [[tensor, {**extras, **extra}] for tensor, extras in conditioning]


def test_images_of_several_styles_teach_a_router_that_reads_the_prompt(
    model, train, run_node, conditioning, sample, pack
) -> None:
    """Each style has a place and its name; after training, the words that were beside its images choose it by themselves."""
    prompts = [conditioning(k)[0] for k in range(3)] + [conditioning(0)[0]]
    names = ["ink", "water color", "", "ink"]
    adapter, losses, _ = train(
        model=model, conditioning=prompts, image_styles=names, styles=0, batch_size=4, steps=40, learning_rate=3e-2
    )
    assert adapter.style_names == ("ink", "water color") and adapter.config.router_input == "prompt"
    assert adapter.config.n_styles == 2
    patched, *_ = run_node("StyleInjectApply", model=model, adapter=adapter)
    for k, style in enumerate(adapter.style_names):
        watched, monitor = run_node("StyleInjectRouterMonitor", model=patched)
        result = sample(watched, positive=conditioning(k))
        (trace,) = pack.submodule("integration.monitor").traces_of(monitor, {"samples": result})
        shares = pack.submodule("styleinject_core.router.analysis").by_layer(trace, "positive")
        assert (shares[:, k] > 0.8).all(), style
    again, others, _ = train(
        model=model, conditioning=prompts, image_styles=names, styles=0, batch_size=4, steps=40, learning_rate=3e-2
    )
    assert same(adapter, again) and others.losses == losses.losses, "the same run"
    plain, *_ = train(model=model, conditioning=prompts, image_styles=["", None, "", ""], steps=1, name="plain")
    assert plain.config.router_input == "layer" and plain.style_names == ("style 1", "style 2")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"image_styles": ["ink", "wash"]}, "image_styles: 2 styles for 4 images; expected one for each"),
        ({"image_styles": ["a", "b", "c", "a"], "styles": 2}, "image_styles: 3 names, but the adapter has 2 styles"),
        (
            {"image_styles": ["a", "b", "c", "a"], "method": "lora"},
            "image_styles: an adapter of the method 'lora' has no styles",
        ),
        ({"prompts": 3}, "conditioning: 3 prompts for 4 images; expected as many, or one for all"),
        ({"extra": {"control": object()}}, "conditioning: prompt 1 has a ControlNet"),
        ({"extra": {"mask": torch.ones(1, 8, 8)}}, "conditioning: prompt 1 has a mask"),
        ({"latents": {"samples": torch.zeros(0, 4, 8, 8)}}, "latents: no images"),
        ({"latents": {"samples": torch.zeros(1, 16, 8, 8)}}, "latent 1 has 16 channels, this model takes 4"),
        ({"name": "../other"}, "name: expected the name of a file, without folders"),
        ({"layers": "to_z"}, "'to_z' matches none"),
        ({"options": {"validation_images": 4}}, "validation_images: 4 of 4 images leave none to train on"),
        ({"options": {"optimizer": "adamw8bit"}}, "pip install bitsandbytes"),
    ],
)
def test_bad_input(model, train, conditioning, inputs, message, trained_folder, monkeypatch) -> None:
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    inputs = dict(inputs)
    prompts = [conditioning(k)[0] for k in range(inputs.pop("prompts", 1))]
    prompts = _with(inputs.pop("extra", {}), prompts)
    with pytest.raises((ValueError, ImportError), match=message):
        train(model=model, conditioning=prompts, **inputs)
    assert_clean(model)
    assert not list(trained_folder.rglob("*.safetensors"))


def test_validation_images_are_never_trained_on_and_choose_the_best(model, train, trained_folder) -> None:
    options = {"validation_images": 2, "validate_every": 1, "patience": 3}
    adapter, losses, step = train(model=model, steps=40, learning_rate=1.0, options=options)
    measured = dict(losses.validation)
    assert len(measured) < 40, "it stops early"
    assert measured[step] == min(measured.values()) and adapter.metadata["styleinject.steps"] == str(step)


def test_an_interrupt_in_a_validation_ends_the_run_after_it(model, train, trained_folder) -> None:
    import comfy.model_management

    management, calls = comfy.model_management, []

    def hook(*_: Any) -> None:  # newer versions look for an interrupt inside of a model call
        if not torch.is_grad_enabled():
            calls.append(len(calls))
            if len(calls) == 3:  # two in each validation
                management.interrupt_current_processing(True)
            management.throw_exception_if_processing_interrupted()

    handle = model.model.diffusion_model.register_forward_hook(hook)
    try:
        with pytest.raises(management.InterruptProcessingException):
            train(model=model, options={"validation_images": 2, "validate_every": 1})
    finally:
        handle.remove()
        management.interrupt_current_processing(False)
    history = [json.loads(line) for line in (trained_folder / "rough" / "loss.jsonl").read_text().splitlines()]
    assert [line["step"] for line in history] == [1, 2] and all("validation" in line for line in history)
    assert (trained_folder / "rough" / "step-000002.safetensors").exists()


def test_what_is_on_the_model_is_trained_with(pack, model, train, run_node, sample, trained_folder) -> None:
    """An adapter that is on the model stays and is frozen, also where blocks run again in the backward pass."""
    trained_folder.mkdir(parents=True)
    path = trained_folder / "ink.safetensors"
    pack.submodule("styleinject_core").save_adapter(random_adapter(pack, model, "to_q", "conv"), path, None, torch.float16)
    first, _ = run_node("StyleInjectLoader", adapter_name="output/ink.safetensors")
    patched, _, *_ = run_node("StyleInjectApply", model=model, adapter=first)
    before = sample(patched)
    plain, _, _ = train(model=model, name="plain")
    beside, _, _ = train(model=patched, name="beside")
    again, _, _ = train(model=patched, name="again", options={"gradient_checkpointing": True})
    assert not close(beside.layers[beside.names[0]].B, plain.layers[beside.names[0]].B, 0.01)
    for name in beside.names:
        torch.testing.assert_close(again.layers[name].B, beside.layers[name].B, rtol=1e-3, atol=1e-5)
    assert torch.equal(sample(patched), before)
    assert_clean(model)
    part, _, *_ = run_node("StyleInjectApply", model=model, adapter=first, end_percent=0.5)
    with pytest.raises(ValueError, match='adapter "ink" is on this model for 0% to 50% of sampling'):
        train(model=part)
    (control,) = run_node("StyleInjectRouterControl", top_k=1)
    steered, _, *_ = run_node("StyleInjectApply", model=model, adapter=first, control=control)
    by_one_style, _, _ = train(model=steered, name="steered")
    assert not close(by_one_style.layers[beside.names[0]].B, beside.layers[beside.names[0]].B, 0.01)
    with pytest.raises(ValueError, match='gradient_checkpointing: adapter "ink" on this model has a router control'):
        train(model=steered, options={"gradient_checkpointing": True})


def test_save_and_its_metadata(pack, model, train, run_node, trained_folder) -> None:
    adapter, _, _ = train(model=model, steps=1)
    about = {"title": "Rough ink", "author": "me", "trigger_phrase": "rough ink", "description": "", "license": "MIT"}
    names = [
        run_node("StyleInjectSave", adapter=adapter, filename_prefix="mine/ink", dtype="float32", **about)[0] for _ in range(2)
    ]
    assert names == ["output/mine/ink_00001_.safetensors", "output/mine/ink_00002_.safetensors"]
    loaded, _ = run_node("StyleInjectLoader", adapter_name=names[0])
    assert same(loaded, adapter)
    assert loaded.metadata["modelspec.title"] == "Rough ink" and loaded.metadata["modelspec.license"] == "MIT"
    assert "modelspec.description" not in loaded.metadata
    assert loaded.metadata["styleinject.objective"] == "fine-tune"
    with pytest.raises(Exception, match="outside the output folder"):
        run_node("StyleInjectSave", adapter=adapter, filename_prefix="../../escaped")


def test_loss_plot(model, train, run_node) -> None:
    pytest.importorskip("matplotlib")
    _, losses, _ = train(model=model)
    (image,) = run_node("StyleInjectLossPlot", losses=losses)
    assert image.ndim == 4 and image.shape[-1] == 3 and 0 <= image.min() < image.max() <= 1


def test_the_options_node_has_the_defaults_that_hold_without_it(pack, run_node) -> None:
    (options,) = run_node("StyleInjectTrainOptions")
    assert options == pack.submodule("integration.training.train_options").TrainOptions()


def test_nodes_and_command_line_ask_for_the_same_by_default(pack, run_node) -> None:
    core = pack.submodule("styleinject_core.train.request")
    (options,) = run_node("StyleInjectTrainOptions")
    schema = {given.id: given.default for given in pack["StyleInjectTrain"].define_schema().inputs if hasattr(given, "default")}
    widgets = {
        name: schema[name] for name in ("name", "method", "steps", "learning_rate", "batch_size", "rank", "styles", "layers")
    }
    assert options.request(**widgets) == core.TrainingRequest(name=schema["name"])
    assert options.drawing == core.Drawing()


@pytest.mark.parametrize(("client", "sent"), [("tab", [("a line", "7", "tab")]), (None, [])])
def test_the_line_of_progress_is_for_the_browser_that_queued(pack, tmp_path, monkeypatch, client, sent) -> None:
    """Of a run that none has queued, it would appear in another one's workflow, in the node of that number there."""
    runs = pack.submodule("integration.training.named_runs")
    told: list[tuple] = []

    class Server:
        client_id = client

        def send_progress_text(self, text: str, node_id: str, sid: str | None = None) -> None:
            told.append((text, node_id, sid))

    monkeypatch.setattr(runs, "running_server", Server)
    runs.Watch(None, "title", "7", None).say("a line")
    assert told == sent


def test_a_training_says_how_to_use_what_it_made(model, pack, train, monkeypatch) -> None:
    runs = pack.submodule("integration.training.named_runs")
    told: list[str] = []
    monkeypatch.setattr(runs.Watch, "say", lambda self, text: told.append(text))
    outcomes = []
    original = runs.train_in_folder
    monkeypatch.setattr(
        pack.submodule("integration.training.job"),
        "train_in_folder",
        lambda *a, **k: outcomes.append(original(*a, **k)) or outcomes[-1],
    )
    train(model=model, name="fine", steps=2, trigger="zwx")
    message = outcomes[0].message
    assert "Saved as output/styleinject/fine/fine.safetensors" in message
    assert "choose output/fine/fine.safetensors" in message and "strength 1" in message and '"zwx"' in message
    assert told[-1] == message.split("\n")[0], "the line of progress is one line"


def watched(pack, folder, pictures, monkeypatch) -> tuple:
    """A Watch that draws these pictures, and what it says."""
    folder_of_run = pack.submodule("styleinject_core.train.run.checkpoints").RunFolder(folder / "run")
    watch, said = pack.submodule("integration.training.named_runs").Watch(folder_of_run, "title", None, pictures), []
    monkeypatch.setattr(watch, "say", said.append)
    return watch, said


def test_pictures_before_the_memory_ran_out_are_kept(pack, tmp_path, monkeypatch) -> None:
    from PIL import Image

    def pictures():
        yield torch.full((8, 6, 3), 0.5)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    watch, said = watched(pack, tmp_path, pictures, monkeypatch)
    watch.sample(3)
    assert said == ["pictures of step 3: CUDA out of memory. Tried to allocate 2 GiB"]
    with Image.open(tmp_path / "run" / "samples" / "step-000003.png") as picture:
        assert picture.size == (6, 8) and picture.getextrema() == ((128, 128),) * 3


def test_pictures_of_nan_are_called_so_and_drawn_black(pack, tmp_path, monkeypatch) -> None:
    from PIL import Image

    both = [torch.ones(8, 6, 3), torch.full((8, 6, 3), float("nan"))]
    watch, said = watched(pack, tmp_path, lambda: both, monkeypatch)
    watch.sample(3)
    assert len(said) == 1 and "pictures of step 3: 1 of 2 (number 2) came out as NaN" in said[0]
    with Image.open(tmp_path / "run" / "samples" / "step-000003.png") as picture:
        assert picture.size == (12, 8)
        assert picture.crop((0, 0, 6, 8)).getextrema() == ((255, 255),) * 3
        assert picture.crop((6, 0, 12, 8)).getextrema() == ((0, 0),) * 3


def test_no_picture_at_all_leaves_no_file(pack, tmp_path, monkeypatch) -> None:
    def pictures():
        raise RuntimeError("no kernel")
        yield

    watch, said = watched(pack, tmp_path, pictures, monkeypatch)
    watch.sample(3)
    assert said == ["pictures of step 3: no kernel"] and not list((tmp_path / "run").rglob("*.png"))
