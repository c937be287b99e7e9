"""Training a DEADiff: which pairs, which gradients, that training sees what sampling does, and that a run resumes exactly."""

from __future__ import annotations

import deadiff_models as models
import pytest
import torch

from styleinject_core import deadiff
from styleinject_core.deadiff import Reference, ReferenceMismatchError, Tokens, load_deadiff, referenced
from styleinject_core.train.models.noise import DiscreteSchedule
from styleinject_core.train.models.training_model import TrainingModel
from styleinject_core.train.objectives.reference import PairedImages, ReferenceTask, Shares, align, start_from_host
from styleinject_core.train.random_numbers import RandomNumbers
from styleinject_core.train.run.checkpoints import CheckpointError
from styleinject_core.train.run.loop import train
from styleinject_core.train.run.reference_folder import ReferenceFolder
from styleinject_core.train.settings import TrainSettings

CONFIG = models.tiny_config(deadiff, width=64, vision_tokens=9, vision_width=16)
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
STYLES, SUBJECTS = ("ink", "oil", "clay"), ("cat", "dog", "tree", "cup")


class TinyModel(TrainingModel):
    def predict(self, noisy, times, conditioning):
        return self.denoiser(noisy, times, conditioning["context"]).sample


@pytest.fixture(scope="module")
def model():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64, attention_head_dim=4, **blocks
    ).requires_grad_(False).eval()  # fmt: skip
    return TinyModel(unet, DiscreteSchedule.from_diffusers(SCHEDULE))


def images(styles=STYLES, subjects=SUBJECTS):
    g = torch.Generator().manual_seed(1)
    labels = [(style, subject) for style in styles for subject in subjects]
    count = len(labels)

    def prompts(rows=count):
        return {"context": torch.randn(rows, 8, 64, generator=g)}

    return PairedImages(
        torch.randn(count, 4, 8, 8, generator=g), torch.randn(count, 9, 16, generator=g), [s for s, _ in labels],
        [s for _, s in labels], prompts(), prompts(), prompts(1),
    )  # fmt: skip


def fresh(seed=0, config=CONFIG):
    return models.random_model(deadiff, config, seed).requires_grad_(True)


def task(model, shares, **settings):
    dropout = settings.pop("dropout", 0.0)
    values = TrainSettings(**{"steps": 4, "batch_size": 2, "learning_rate": 1e-3, **settings})
    return ReferenceTask(model, images(), values, shares, dropout=dropout, validation=images(("pen", "ink"), ("owl", "fox")))


def test_pairs_share_one_label_and_not_the_other():
    own = images()
    for kind, same, other in (("style", own.styles, own.subjects), ("content", own.subjects, own.styles)):
        for k, partners in enumerate(own.partners(kind)):
            assert partners and all(same[j] == same[k] and other[j] != other[k] for j in partners)
    assert own.partners("reconstruction") == [[k] for k in range(12)]
    with pytest.raises(ValueError, match="content pairs: no image has a partner of the same subject in another style"):
        images(styles=("ink",)).partners("content")
    with pytest.raises(ValueError, match="12 latents and 11 styles"):
        PairedImages(own.latents, own.features, own.styles[1:], own.subjects, own.subject_prompts, own.style_prompts, own.empty)


def test_shares():
    shares = Shares(1, 2, 1)
    assert [shares.pick(u) for u in (0.0, 0.24, 0.26, 0.74, 0.76, 0.999)] == [
        "style", "style", "content", "content", "reconstruction", "reconstruction",
    ]  # fmt: skip
    assert Shares(1, 0, 0).pick(0.9999999) == "style"
    for bad in ((0, 0, 0), (-1, 2, 0)):
        with pytest.raises(ValueError, match="expected numbers of at least 0"):
            Shares(*bad)


@pytest.mark.parametrize(
    ("shares", "used"), [(Shares(1, 0, 0), {"style"}), (Shares(0, 1, 0), {"content"}), (Shares(0, 0, 1), {"style", "content"})]
)
def test_a_task_trains_its_streams_and_layers_alone(model, shares, used):
    own = fresh()
    with (work := task(model, shares)).installed(own):
        work.loss(RandomNumbers(0, 0)).backward()
    for stream in ("style", "content"):
        grads = [p.grad for p in own.streams[stream].parameters()]
        if stream in used:
            assert all(g is not None and g.abs().max() > 0 for g in grads[:3])
        else:
            assert all(g is None for g in grads)
    for site, weights in zip(CONFIG.sites, own.to_kv, strict=True):
        for weight in weights.values():
            assert (weight.grad is not None and weight.grad.abs().max() > 0) == (site.stream in used), site.name
    assert all(p.grad is None for p in model.denoiser.parameters())


def test_training_sees_what_sampling_does(model):
    """The prediction of a batch is that of the model with the references on it."""
    own, work, seen = fresh(), task(model, Shares(1, 0, 0)), []

    class Spy(TinyModel):
        def predict(self, noisy, times, conditioning):
            prediction = super().predict(noisy, times, conditioning)
            seen.append((noisy, times, conditioning, prediction.detach()))
            return prediction

    work.model = Spy(model.denoiser, model.schedule)
    with work.installed(own):
        loss = work.loss(RandomNumbers(0, 3))
        values = work._tokens["style"].detach()
    noisy, times, conditioning, prediction = seen[0]
    with referenced(model.denoiser, Reference(own, Tokens(values, "style")), roles=("positive",)), torch.no_grad():
        expected = model.denoiser(noisy, times, conditioning["context"]).sample
    torch.testing.assert_close(prediction, expected, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(loss)
    assert not any("forward" in m.__dict__ for m in model.denoiser.modules())


def test_prompts_follow_the_task(model):
    own = images()
    for shares, source in ((Shares(1, 0, 0), own.subject_prompts), (Shares(0, 1, 0), own.style_prompts)):
        (kind,) = [name for name in ("style", "content") if getattr(shares, name)]
        given = task(model, shares)._prompts(own, kind, [3, 5])["context"]
        assert torch.equal(given, source["context"][[3, 5]])
    empty = task(model, Shares())._prompts(own, "reconstruction", [3, 5])["context"]
    assert torch.equal(empty, own.empty["context"].expand(2, -1, -1))


def test_dropped_tokens_really_drop(model):
    """With every token dropped the loss is the null tokens', whatever the DEADiff, and it has no gradient."""
    losses = []
    for seed in (0, 1):
        own = fresh(seed)
        with (work := task(model, Shares(1, 0, 0), dropout=1.0)).installed(own):
            losses.append(loss := work.loss(RandomNumbers(0, 0)))
            loss.backward()
        assert all(p.grad is None or p.grad.abs().max() == 0 for p in own.parameters())
    assert losses[0] == losses[1]


def test_i_to_k_starts_as_to_k(model):
    own = fresh()
    start_from_host(own, model.denoiser)
    name = CONFIG.layers[2][0]
    assert torch.equal(own.weight(2, "to_v"), model.denoiser.get_submodule(f"{name}.to_v").weight)
    narrow = fresh(config=models.tiny_config(deadiff, width=24))
    start_from_host(narrow, model.denoiser)
    assert 0.1 < narrow.weight(0, "to_k").std() < 0.3
    with pytest.raises(ReferenceMismatchError):
        start_from_host(fresh(config=models.tiny_config(deadiff, context=32)), model.denoiser)


def test_alignment_brings_content_tokens_to_the_text():
    own, data = fresh(), images()
    texts = data.subject_prompts["context"]
    first = align(own, data.features, texts, steps=1, batch=12)
    last = align(own, data.features, texts, steps=60, batch=12)
    assert last < 0.7 * first
    with pytest.raises(ValueError, match="tokens are 24 wide, the text encoder's output 64"):
        align(fresh(config=models.tiny_config(deadiff, width=24)), data.features, texts, steps=1)


def test_it_learns_and_a_run_resumes_bit_for_bit(model, tmp_path):
    settings = {"steps": 6, "checkpoint_every": 3, "validate_every": 3, "schedule": "cosine", "learning_rate": 3e-3}
    whole, stopped = fresh(), fresh()
    result = train(whole, task(model, Shares(), **settings), TrainSettings(**settings, batch_size=2))

    class Stop(Exception):
        pass

    from styleinject_core.train.run.loop import Observer

    class StopAt3(Observer):
        def progress(self, progress):
            if progress.step == 3:
                raise Stop

    folder = ReferenceFolder(tmp_path / "run", {"license": "none"}, dtype=torch.float32)
    with pytest.raises(Stop):
        train(
            stopped, task(model, Shares(), **settings), TrainSettings(**settings, batch_size=2), run=folder, observer=StopAt3()
        )
    again = fresh(7)
    resumed = train(again, task(model, Shares(), **settings), TrainSettings(**settings, batch_size=2), run=folder)
    assert resumed.resumed_from == 3 and resumed.losses == result.losses and resumed.validation == result.validation
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    saved = load_deadiff(tmp_path / "run" / "step-000006.safetensors")
    assert saved.metadata["deadiff_steps"] == "6" and saved.config == CONFIG
    with pytest.raises(CheckpointError, match="shares"):
        train(fresh(), task(model, Shares(1, 0, 0), **settings), TrainSettings(**settings, batch_size=2), run=folder)


def test_the_loss_goes_down(model):
    own, settings = fresh(), {"steps": 40, "learning_rate": 5e-3, "batch_size": 4}
    result = train(own, task(model, Shares(0, 0, 1), **settings), TrainSettings(**settings))
    assert sum(result.losses[-10:]) < 0.97 * sum(result.losses[:10])
