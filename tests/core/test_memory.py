"""The memory choice: what it counts against what is really there, what it chooses, and what it says."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from styleinject_core.demo.training import DemoTrainingModel
from styleinject_core.train.activations import count
from styleinject_core.train.data.batches import rows
from styleinject_core.train.data.source import LatentSource
from styleinject_core.train.memory import GB, MemoryChoiceError, Workload, choose, free_memory
from styleinject_core.train.objectives.losses import checkpointed
from styleinject_core.train.objectives.tasks import DreamBooth, FineTune
from styleinject_core.train.random_numbers import RandomNumbers
from styleinject_core.train.request import AdapterRequest, TrainingRequest
from styleinject_core.train.run.optimizers import make_optimizer
from styleinject_core.train.settings import TrainSettings

LATENTS = (16, 16, 16)


@pytest.fixture(scope="module")
def model() -> DemoTrainingModel:
    return DemoTrainingModel.load()


def request(memory: str = "auto", rank: int = 4, styles: int = 2, **settings: Any) -> TrainingRequest:
    return TrainingRequest("ink", AdapterRequest(rank=rank, styles=styles), TrainSettings(memory=memory, **settings))


def work(model: DemoTrainingModel, asked: TrainingRequest, **values: Any) -> Workload:
    return Workload(model, asked, LATENTS, model.encode_text(["an apple"]), **values)


class Living(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that are still there: now, and at most."""

    def __init__(self, *modules: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.most = 0
        tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
        self.known: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in tensors}  # of which views are made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return output

    def note(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self.known:
            self.known[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.gone, key)

    def gone(self, key: int) -> None:
        self.now -= self.known.pop(key, 0)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("batch", [1, 3])
def test_what_is_counted_is_what_a_real_pass_keeps(model: DemoTrainingModel, again: bool, batch: int) -> None:
    adapter = request().new_adapter(model.denoiser)
    prompt = model.encode_text(["an apple"])
    counted = count(model, adapter, LATENTS, prompt, batch)
    own = {t.untyped_storage()._cdata for t in (*model.denoiser.parameters(), *model.denoiser.buffers(), *adapter.parameters())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    prompts = rows(prompt, [0] * batch)
    blocks = model.blocks() if again else {}
    with model.attachment(adapter), checkpointed(blocks), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.predict(torch.randn(batch, *LATENTS), torch.full((batch,), 500), prompts)
    real = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
    if again:  # the block that runs again comes on top, in the backward pass
        real += max(counted.blocks.values())
        assert 0.8 * real <= counted.checkpointed <= 1.1 * real
    else:
        assert counted.whole == real
    assert counted.checkpointed < 0.7 * counted.whole


@pytest.mark.parametrize("settings", [{}, {"batch_size": 4}, {"gradient_checkpointing": True, "batch_size": 4}])
@pytest.mark.parametrize("prior", [False, True], ids=["fine-tune", "dreambooth"])
def test_the_need_of_a_step_holds_what_lives_in_it(model: DemoTrainingModel, settings: dict, prior: bool) -> None:
    """All tensors of a real training step, at the moment when they are most."""
    asked = request(rank=16, styles=4, caption_dropout=0.0, **settings)
    adapter = asked.new_adapter(model.denoiser)
    source = LatentSource(
        [torch.randn(LATENTS) for _ in range(4)], model.encode_text(["an apple"]), batch_size=asked.settings.batch_size
    )
    classes = {"prior": source} if prior else {}
    task = (DreamBooth if prior else FineTune)(model, source, asked.settings, **classes)
    need = work(model, asked, images=4, passes=2 if prior else 1).need(asked.adapter, asked.settings)
    optimizer = make_optimizer(adapter.parameters(), asked.settings)
    gc.collect()
    with task.installed(adapter):
        for step in range(2):
            optimizer.zero_grad()
            with Living(model.denoiser, adapter) as living:
                loss = task.loss(RandomNumbers(0, step))
                loss.backward()
                optimizer.step()
            del loss
    state = sum(t.nbytes for values in optimizer.state.values() for t in values.values() if t.numel() > 1)
    parameters = sum(p.nbytes for p in adapter.parameters())
    assert need.trained == 2 * parameters + state
    real = living.most - parameters  # the gradients are made in it, and counted with what is trained
    assert real <= need.passes <= 1.8 * real
    assert need.weights == sum(t.nbytes for t in (*model.denoiser.parameters(), *model.denoiser.buffers()))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "schedulefree", "prodigy"])
def test_the_state_of_every_optimizer(model: DemoTrainingModel, optimizer: str) -> None:
    asked = request(rank=32, styles=16, optimizer=optimizer)
    adapter = asked.new_adapter(model.denoiser)
    made = make_optimizer(adapter.parameters(), asked.settings)
    for parameter in adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    tables = ("qmap1", "qmap2")  # one for all
    state = sum(
        t.nbytes for values in made.state.values() for name, t in values.items()
        if isinstance(t, torch.Tensor) and t.numel() > 1 and name not in tables
    )  # fmt: skip
    trained = work(model, asked).need(asked.adapter, asked.settings).trained
    assert trained - 8 * adapter.parameter_count() == pytest.approx(state, rel=0.05)


def room_for(need: int) -> int:
    """What must be free so that "auto" lets a training have this much."""
    return int((need + GB // 4) / 0.95) + GB // 1000


def test_with_memory_to_spare_nothing_changes(model: DemoTrainingModel) -> None:
    choice = choose(work(model, request(rank=0, styles=0, batch_size=4)), 64 * GB)
    assert choice.request == request(rank=32, styles=16, batch_size=4)
    assert "rank 32, 16 styles, batch 4, gradient checkpointing off, adamw" in choice.report
    assert "not measured on a graphics card" in choice.report


def test_batches_are_divided_first_then_blocks_run_again_then_the_adapter_shrinks(model: DemoTrainingModel) -> None:
    asked = request(rank=0, styles=0, batch_size=4, accumulation=2)
    load = work(model, asked, images=4)
    full = asked.adapter.sized(32, 16)

    def fits(free: int) -> Any:
        return choose(load, free).request

    def need(adapter: AdapterRequest = full, **settings: Any) -> int:
        return room_for(load.need(adapter, replace(asked.settings, **settings)).total)

    assert fits(need()).settings == asked.settings
    divided = fits(need(batch_size=2, accumulation=4))
    assert (divided.settings.batch_size, divided.settings.accumulation) == (
        2,
        4,
    ) and not divided.settings.gradient_checkpointing
    again = fits(need(batch_size=1, accumulation=8, gradient_checkpointing=True))
    assert again.settings.gradient_checkpointing and again.adapter == full
    assert again.settings.batch_size * again.settings.accumulation == 8
    small = fits(need(full.sized(0, 0).__class__(rank=16, styles=4), batch_size=1, accumulation=8, gradient_checkpointing=True))
    assert (small.adapter.rank, small.adapter.styles) == (16, 4)


def test_what_is_set_stays(model: DemoTrainingModel) -> None:
    asked = request(rank=24, styles=3, gradient_checkpointing=True)
    choice = choose(work(model, asked), 64 * GB)
    assert choice.request == asked
    off = request("off", rank=0, styles=0)
    assert choose(work(model, off), 0).request == request("off", rank=32, styles=16)


def test_a_run_goes_on_as_it_began_as_long_as_that_fits(model: DemoTrainingModel) -> None:
    before = {"batch_size": 2, "accumulation": 2, "optimizer": "adamw", "r": 16, "n_styles": 8}
    asked = request(rank=0, styles=0, batch_size=4)
    chosen = choose(work(model, asked), 64 * GB, before).request
    assert (chosen.settings.batch_size, chosen.adapter.rank, chosen.adapter.styles) == (2, 16, 8)
    other = choose(work(model, replace(asked, adapter=AdapterRequest(rank=4, styles=2))), 64 * GB, before).request
    assert (other.settings.batch_size, other.adapter.rank) == (4, 4), "another adapter is another run"


def test_a_choice_that_cannot_be_kept_says_what_would_fit(model: DemoTrainingModel) -> None:
    asked = request("8 GB", rank=0, styles=0)
    load = Workload(model, asked, LATENTS, model.encode_text(["an apple"]), images=1)
    load._kept = lambda batch, dtype: replace_kept(batch)  # as a model of many gigabytes would keep
    with pytest.raises(
        MemoryChoiceError,
        match=r'memory "8 GB": a card of 8 GB, of which a training can have 6.7 GB.* what would fit: memory "16 GB"',
    ):
        choose(load, 0)


def replace_kept(batch: int) -> Any:
    from styleinject_core.train.activations import Kept

    return Kept(outside=batch * 12 * GB, blocks={"down.0": GB}, inputs=GB // 4, largest=GB // 8)


def test_smaller_pictures_and_ranks_are_offered(model: DemoTrainingModel) -> None:
    load = work(model, request(rank=0, styles=0), images=1)
    least = load.need(AdapterRequest(rank=8, styles=4), request(gradient_checkpointing=True).settings).total
    with pytest.raises(MemoryChoiceError, match=r"pictures of (75|50)% of the side"):
        choose(load, room_for(least) - GB // 500)
    with pytest.raises(MemoryChoiceError, match="a smaller model, or one with weights in fp8, may fit"):
        choose(load, 0)
    wide = work(model, request(rank=512, styles=64), images=1)
    with pytest.raises(MemoryChoiceError, match="rank 8 with 4 styles"):
        choose(wide, room_for(least))


def test_a_model_that_cannot_be_counted_still_trains(model: DemoTrainingModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DemoTrainingModel, "predict", lambda self, noisy, *_: float(noisy.sum()))
    choice = choose(work(model, request()), 64 * GB)
    assert choice.request.settings.gradient_checkpointing and "cannot be counted (DataDependent" in choice.report


def test_weights_stay_in_ram_last_and_only_where_blocks_run_again(model: DemoTrainingModel) -> None:
    load = work(model, request(rank=0, styles=0), images=1, may_lend=True)
    least = load.need(AdapterRequest(rank=8, styles=4), request(gradient_checkpointing=True).settings)
    choice = choose(load, room_for(least.total) - GB // 500)
    assert choice.lent > 0 and choice.request.settings.gradient_checkpointing
    assert choice.need.weights == least.weights - choice.lent and "of the model in RAM" in choice.report
    assert choose(load, room_for(least.total)).lent == 0


def test_free_memory_is_read() -> None:
    assert GB // 8 < free_memory(torch.device("cpu")) < 4096 * GB
