"""Noise schedules, objectives and tasks, on models where the answer is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from styleinject_core import Adapter, AdapterConfig, attach
from styleinject_core.call import Listener, ModelCall
from styleinject_core.router.control import GivenStyles
from styleinject_core.train.data.batches import joined, rows, where
from styleinject_core.train.data.source import LatentSource
from styleinject_core.train.models.noise import (
    DiscreteSchedule,
    add_noise,
    matching_times,
    min_snr_weight,
    predicted_sample,
    prediction_of,
    target,
    zero_terminal_snr,
)
from styleinject_core.train.models.training_model import TrainingModel
from styleinject_core.train.objectives.losses import block_features, checkpointed, distil_loss, fine_tune_loss
from styleinject_core.train.objectives.tasks import FOLLOWING, Distil, DreamBooth, FineTune
from styleinject_core.train.parallel import Processes
from styleinject_core.train.random_numbers import RandomNumbers
from styleinject_core.train.run.loop import train
from styleinject_core.train.settings import TrainSettings

ALPHAS = torch.linspace(0.99, 0.01, 100)


@dataclass(frozen=True)
class FlowSchedule:
    """Rectified flow: z_t = (1 - t) x0 + t ε, the model predicts ε - x0; times are shifted."""

    shift: float = 1.0
    prediction_type: str = "flow"

    def coefficients(self, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 1 - times.float(), times.float()

    def times(self, uniform: torch.Tensor) -> torch.Tensor:
        return self.shift * uniform / (1 + (self.shift - 1) * uniform)


SCHEDULES = [DiscreteSchedule(ALPHAS, kind) for kind in ("epsilon", "v_prediction", "sample")] + [FlowSchedule(3.0)]


@pytest.fixture(params=SCHEDULES, ids=lambda s: s.prediction_type)
def schedule(request):
    return request.param


def test_predictions_and_samples_are_inverse(schedule):
    x0, noise = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    times = schedule.times(torch.tensor([0.05, 0.3, 0.6, 0.95]))
    assert (times.diff() > 0).all()
    noisy, wanted = add_noise(schedule, x0, noise, times), target(schedule, x0, noise, times)
    torch.testing.assert_close(predicted_sample(schedule, wanted, noisy, times), x0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(prediction_of(schedule, x0, noisy, times), wanted, atol=1e-4, rtol=1e-4)
    assert fine_tune_loss(wanted, schedule, x0, noise, times) == 0
    assert fine_tune_loss(wanted + 2, schedule, x0, noise, times) == pytest.approx(4)


def test_targets_of_the_paper():
    x0, noise, t = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2), torch.tensor([10, 90])
    alpha = ALPHAS[t].view(-1, 1, 1, 1)
    for schedule in SCHEDULES[:3]:
        torch.testing.assert_close(add_noise(schedule, x0, noise, t), alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise)
    torch.testing.assert_close(target(SCHEDULES[1], x0, noise, t), alpha.sqrt() * noise - (1 - alpha).sqrt() * x0)
    torch.testing.assert_close(target(SCHEDULES[3], x0, noise, torch.tensor([0.2, 0.9])), noise - x0)


def test_min_snr_weights_are_one_error_in_x0():
    """min(SNR, γ) ‖δx0‖², whatever the model predicts."""
    t = torch.tensor([0, 30, 60, 99])
    snr = ALPHAS[t] / (1 - ALPHAS[t])
    x0, noise = torch.randn(4, 1, 3, 3), torch.randn(4, 1, 3, 3)
    for schedule in SCHEDULES[:3]:
        noisy = add_noise(schedule, x0, noise, t)
        wrong = prediction_of(schedule, x0 + 1, noisy, t)
        loss = fine_tune_loss(wrong, schedule, x0, noise, t, min_snr_gamma=5)
        torch.testing.assert_close(loss, snr.clamp(max=5).mean(), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="no meaning for a model that predicts flow"):
        min_snr_weight(SCHEDULES[3], torch.tensor([0.5]), 5)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="prediction_type: expected epsilon, v_prediction or sample, found 'flow'"):
        DiscreteSchedule(ALPHAS, "flow")
    with pytest.raises(ValueError, match="beta_schedule: expected linear or scaled_linear, found 'squaredcos'"):
        DiscreteSchedule.from_diffusers(
            {"beta_start": 1, "beta_end": 2, "num_train_timesteps": 3, "beta_schedule": "squaredcos"}
        )
    with pytest.raises(ValueError, match="EDMEulerScheduler: beta_schedule: expected linear or scaled_linear, found None"):
        DiscreteSchedule.from_diffusers({"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "prediction_type": "epsilon"})
    with pytest.raises(ValueError, match="rescale_betas_zero_snr: .* expected v or x0"):
        DiscreteSchedule.from_diffusers({"beta_start": 1e-3, "beta_end": 1e-2, "num_train_timesteps": 9, "beta_schedule": "linear",
                                         "rescale_betas_zero_snr": True})  # fmt: skip


@pytest.mark.parametrize("config", [
    {"beta_schedule": "linear"}, {"beta_schedule": "scaled_linear"}, {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    {"trained_betas": [0.1, 0.2, 0.05]}])  # fmt: skip
def test_schedules_are_diffusers(config):
    schedulers = pytest.importorskip("diffusers")
    common = {"beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction", "num_train_timesteps": 1000}
    theirs = schedulers.DDIMScheduler(**{**common, **config})
    ours = DiscreteSchedule.from_diffusers(theirs.config)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-5, atol=1e-7)
    last = len(ours.alphas_cumprod) - 1
    assert (ours.coefficients(torch.tensor([last]))[0] == 0).item() == bool(config.get("rescale_betas_zero_snr"))
    sample, noise = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3)
    noisy = add_noise(ours, sample, noise, torch.tensor([last]))
    velocity = theirs.get_velocity(sample, noise, torch.tensor([last]))
    torch.testing.assert_close(target(ours, sample, noise, torch.tensor([last])), velocity, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(predicted_sample(ours, velocity, noisy, torch.tensor([last])), sample, rtol=1e-3, atol=1e-3)


def test_draws_are_shared_between_processes():
    like = torch.zeros(6, 2, 3)
    whole = RandomNumbers(7, 3)
    parts = [RandomNumbers(7, 3, Processes(rank, 3)) for rank in range(3)]
    assert torch.equal(whole.uniform(6), torch.cat([d.uniform(2) for d in parts]))
    assert torch.equal(whole.normal(like), torch.cat([d.normal(like[:2]) for d in parts]))
    assert not torch.equal(RandomNumbers(7, 4).uniform(6), RandomNumbers(7, 3).uniform(6))
    assert not torch.equal(RandomNumbers(8, 3).uniform(6), RandomNumbers(7, 3).uniform(6))


class Tiny(TrainingModel):
    """A denoiser of two blocks that a prompt shifts: prediction = W2 (W1 z + prompt)."""

    def __init__(self, seed, prediction_type="epsilon", channels=4):
        torch.manual_seed(seed)
        net = nn.Module()
        net.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1)) for _ in range(2)])
        super().__init__(net.requires_grad_(False), DiscreteSchedule(ALPHAS, prediction_type))
        self.prompts = []

    def predict(self, noisy, times, conditioning):
        self.prompts.append(conditioning["context"][:, 0, 0].tolist())
        shift = conditioning["context"].mean((1, 2)).view(-1, 1, 1, 1)
        return self.denoiser.blocks[1](self.denoiser.blocks[0](noisy) + shift)

    def adapter(self, seed=0):
        torch.manual_seed(seed)
        return Adapter.create(self.denoiser, AdapterConfig(r=2, n_styles=2, target_modules=("blocks.0.0", "blocks.1.0")))


def source(count=6, teacher=False, **kwargs):
    torch.manual_seed(3)
    prompts = {"context": torch.arange(1.0, count + 1).view(-1, 1, 1).repeat(1, 2, 3)}
    others = {"context": -prompts["context"].repeat(1, 1, 2)} if teacher else None
    return LatentSource(list(torch.randn(count, 4, 8, 8)), prompts, others, **{"batch_size": 3, **kwargs})


EMPTY = {"context": torch.zeros(1, 2, 3)}


def test_fine_tuning_is_the_formula():
    model, settings = Tiny(0), TrainSettings(batch_size=3, caption_dropout=0)
    task = FineTune(model, source(), settings, EMPTY)
    batch, rng = source().batch(5), RandomNumbers(0, 5)
    times = (rng.uniform(3) * 100).long()
    noise = rng.normal(batch.latents)
    alpha = ALPHAS[times].view(-1, 1, 1, 1)
    prediction = model.predict(alpha.sqrt() * batch.latents + (1 - alpha).sqrt() * noise, times, batch.conditioning)
    torch.testing.assert_close(task.loss(RandomNumbers(0, 5)), (noise - prediction).square().mean())


def test_captions_are_dropped_by_their_share():
    model = Tiny(0)
    task = FineTune(model, source(64, batch_size=64), TrainSettings(batch_size=64, caption_dropout=0.25), EMPTY)
    for k in range(20):
        task.loss(RandomNumbers(0, k))
    seen = [p for prompts in model.prompts for p in prompts]
    assert 0.2 < sum(p == 0 for p in seen) / len(seen) < 0.3


def test_validation_is_the_same_each_time():
    model = Tiny(0)
    settings = TrainSettings(batch_size=3, validate_every=1)
    task = FineTune(model, source(), settings, EMPTY, validation=source(), validation_batches=2)
    assert task.validation_loss() == task.validation_loss()
    with pytest.raises(ValueError, match="no validation images"):
        FineTune(model, source(), settings)


def test_dreambooth_adds_the_class():
    model, settings = Tiny(0), TrainSettings(batch_size=3, caption_dropout=0)
    prior = LatentSource([torch.randn(4, 8, 8)], {"context": torch.full((1, 2, 3), 9.0)}, batch_size=3)
    both = DreamBooth(model, source(), settings, EMPTY, prior=prior, prior_weight=0.5)
    only = FineTune(model, source(), settings, EMPTY)
    assert both.loss(RandomNumbers(0, 0)) > only.loss(RandomNumbers(0, 0))
    assert model.prompts[1] == [9.0, 9.0, 9.0]
    assert both.plan()["prior"]["weight"] == 0.5


def test_distilling_a_model_into_itself_has_no_loss():
    task = Distil(Tiny(0), Tiny(0), source(), TrainSettings(batch_size=3), EMPTY)
    assert task.loss(RandomNumbers(0, 0)) == 0


def test_distillation_is_the_formula():
    student, teacher = Tiny(0), Tiny(1)
    out, features = (Distil(student, teacher, source(), TrainSettings(batch_size=3), EMPTY, output_weight=w, feature_weight=f)
                     for w, f in ((2.0, 0.0), (0.0, 3.0)))  # fmt: skip
    batch, rng = source().batch(0), RandomNumbers(0, 0)
    times = (rng.uniform(3) * 100).long()
    noisy = add_noise(student.schedule, batch.latents, rng.normal(batch.latents), times)
    prompts = where(rng.uniform(3) < 0.1, batch.conditioning, EMPTY)
    with block_features(student.blocks()) as f_s, block_features(teacher.blocks()) as f_t:
        s, t = student.predict(noisy, times, prompts), teacher.predict(noisy, times, prompts)
    assert sorted(f_s) == ["blocks.0", "blocks.1"]
    torch.testing.assert_close(out.loss(RandomNumbers(0, 0)), 2 * (s - t).square().mean())
    expected = 3 * sum((f_s[k] - f_t[k]).square().mean() for k in f_s)
    torch.testing.assert_close(features.loss(RandomNumbers(0, 0)), expected)


def test_a_teacher_that_predicts_something_else():
    """The same network output read as v by the teacher: compared in what the student predicts."""
    student, teacher = Tiny(0), Tiny(1, "v_prediction")
    task = Distil(student, teacher, source(), TrainSettings(batch_size=3, caption_dropout=0), feature_weight=0)
    batch, rng = source().batch(0), RandomNumbers(0, 0)
    times = (rng.uniform(3) * 100).long()
    noisy = add_noise(student.schedule, batch.latents, rng.normal(batch.latents), times)
    a, b = (c.view(-1, 1, 1, 1) for c in student.schedule.coefficients(times))
    eps = b * noisy + a * teacher.predict(noisy, times, batch.conditioning)
    wanted = (student.predict(noisy, times, batch.conditioning) - eps).square().mean()
    torch.testing.assert_close(task.loss(RandomNumbers(0, 0)), wanted)


def test_unshared_text_encoders_drop_the_same_captions():
    student, teacher = Tiny(0), Tiny(1)
    teacher_empty = {"context": torch.zeros(1, 2, 6)}
    task = Distil(student, teacher, source(teacher=True), TrainSettings(batch_size=3, caption_dropout=0.5), EMPTY,
                  teacher_empty, feature_weight=0)  # fmt: skip
    for k in range(10):
        task.loss(RandomNumbers(0, k))
    assert [[-p for p in prompts] for prompts in student.prompts] == teacher.prompts
    assert any(0 in prompts for prompts in student.prompts)


def test_what_distillation_refuses():
    student = Tiny(0)
    with pytest.raises(ValueError, match="teacher and student are the same model"):
        Distil(student, student, source(), TrainSettings())
    with pytest.raises(ValueError, match="min_snr_gamma"):
        Distil(student, Tiny(1), source(), TrainSettings(min_snr_gamma=5))
    flow = Tiny(1)
    flow.schedule = FlowSchedule()
    for pair in ((student, flow), (flow, student)):
        with pytest.raises(ValueError, match="a flow model's noisy images are not another one's"):
            Distil(*pair, source(), TrainSettings())
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"block b is in only one of teacher and student: set feature_weight to 0"):
        distil_loss(x, x, {"a": x}, {"a": x, "b": x})
    with pytest.raises(ValueError, match=r"block a: the teacher's features are \(1, 3\), the student's \(1, 2\)"):
        distil_loss(x, x, {"a": x}, {"a": torch.zeros(1, 3)})


def test_distilling_brings_the_student_to_the_teacher():
    student, teacher = Tiny(0), Tiny(0)
    with torch.no_grad():
        teacher.denoiser.blocks[0][0].weight.mul_(1.3)
    before = [p.clone() for p in (*teacher.denoiser.parameters(), *student.denoiser.parameters())]
    task = Distil(student, teacher, source(), TrainSettings(200, batch_size=3, learning_rate=1e-2), EMPTY)
    losses = train(student.adapter(), task, task.settings).losses
    assert sum(losses[-20:]) < 0.2 * sum(losses[:20])
    after = (*teacher.denoiser.parameters(), *student.denoiser.parameters())
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def saved_numbers(run):
    """How many numbers autograd keeps for the backward pass of a function."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        run()
    return sum(sizes)


def test_gradient_checkpointing_changes_nothing_but_memory():
    model, settings = Tiny(0), TrainSettings(5, batch_size=3, learning_rate=1e-2)
    plain, small = model.adapter(), model.adapter()
    saved = {}
    for adapter, checkpointing in ((plain, False), (small, True)):
        task = FineTune(model, source(), TrainSettings(**{**vars(settings), "gradient_checkpointing": checkpointing}), EMPTY)
        train(adapter, task, task.settings)
        with task.installed(adapter):
            saved[checkpointing] = saved_numbers(lambda: task.loss(RandomNumbers(0, 0)))  # noqa: B023 - called at once
    assert all(torch.equal(v, small.state_dict()[k]) for k, v in plain.state_dict().items())
    assert saved[True] < saved[False]
    assert all("forward" not in m.__dict__ for m in model.denoiser.modules())


def test_checkpointing_inside_of_an_attachment_sees_the_adapter():
    model, x = Tiny(0), torch.randn(2, 4, 8, 8)
    adapter = model.adapter()
    for layer in adapter.layers.values():
        nn.init.normal_(layer.B)
    prompt = {"context": torch.zeros(2, 2, 3)}
    gradients = []
    for use in (False, True):
        adapter.zero_grad()
        with attach(model.denoiser, adapter):
            if use:
                with checkpointed(model.blocks()):
                    model.predict(x, None, prompt).square().mean().backward()
            else:
                model.predict(x, None, prompt).square().mean().backward()
        gradients.append([p.grad.clone() for p in adapter.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


class Streams(nn.Module):
    """A block of text and image that works in place, by options that its caller changes, as some DiTs do."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(3, 3)

    def forward(self, text, image, options):
        image += self.to_q(options["block"] * image)
        return (text * 2 if options["block"] < 2 else None), image


class TwoStreams(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Streams(), Streams()])

    def forward(self, x):
        text, image, options = x[:, :1], x[:, 1:].clone(), {}
        for k, block in enumerate(self.blocks):
            options["block"] = k + 1
            text, image = block(text, image, options)
        return image


def test_blocks_of_several_streams_that_work_in_place():
    torch.manual_seed(0)
    network, x = TwoStreams().requires_grad_(False), torch.randn(2, 5, 3)
    adapter = Adapter.create(network, AdapterConfig(r=2, n_styles=2, target_modules=("to_q",)))
    for layer in adapter.layers.values():
        nn.init.normal_(layer.B)
    blocks = {f"blocks.{k}": block for k, block in enumerate(network.blocks)}
    gradients = []
    with attach(network, adapter):
        for checkpointing in (False, True):
            adapter.zero_grad()
            with checkpointed(blocks if checkpointing else {}, set(blocks)), block_features(blocks) as features:
                out = network(x)
                sum(feature.square().sum() for feature in features.values()).backward()
            assert sorted(features) == ["blocks.0.0", "blocks.0.1", "blocks.1.1"]
            torch.testing.assert_close(features["blocks.1.1"], out)
            assert not torch.equal(features["blocks.0.1"], out), "it is as it was after its own block"
            gradients.append([p.grad.clone() for p in adapter.parameters()])
    assert any(g.abs().sum() > 0 for g in gradients[0])
    for plain, small in zip(*gradients, strict=True):
        torch.testing.assert_close(small, plain)
    with (
        checkpointed(blocks),
        pytest.raises(ValueError, match=r"gradient_checkpointing: block blocks\.0 writes into its inputs"),
    ):
        network(x)


def test_a_model_without_known_blocks():
    model = Tiny(0)
    model.blocks = dict
    with pytest.raises(ValueError, match="gradient_checkpointing: this model has no blocks by a name that is known"):
        FineTune(model, source(), TrainSettings(gradient_checkpointing=True))
    with pytest.raises(ValueError, match="feature_weight: no blocks by a name that is known here to compare"):
        Distil(model, Tiny(1), source(), TrainSettings())
    Distil(model, Tiny(1), source(), TrainSettings(), feature_weight=0)


def test_a_teacher_with_another_schedule_of_noise():
    """It is asked at the time at which it expects as much noise as there is."""
    student, teacher = Tiny(0), Tiny(1)
    teacher.schedule = DiscreteSchedule(zero_terminal_snr(ALPHAS), "v_prediction")
    times = torch.tensor([3, 50, 99])
    at = matching_times(student.schedule, times, teacher.schedule)
    assert (at < times)[1:].all()
    a, theirs = (s.coefficients(t)[0] for s, t in ((student.schedule, times), (teacher.schedule, at)))
    torch.testing.assert_close(theirs, a, rtol=0.02, atol=0.02)
    assert torch.equal(matching_times(student.schedule, times, Tiny(1).schedule), times)
    assert torch.equal(matching_times(FlowSchedule(), times / 100, FlowSchedule(3.0)), times / 100)

    asked = []
    predict = teacher.predict
    teacher.predict = lambda noisy, times, prompts: asked.append(times) or predict(noisy, times, prompts)
    task = Distil(student, teacher, source(), TrainSettings(batch_size=3, caption_dropout=0), feature_weight=0)
    loss = task.loss(RandomNumbers(0, 0))
    batch, rng = source().batch(0), RandomNumbers(0, 0)
    times = (rng.uniform(3) * 100).long()
    assert torch.equal(asked[0], matching_times(student.schedule, times, teacher.schedule))
    noisy = add_noise(student.schedule, batch.latents, rng.normal(batch.latents), times)
    x0 = predicted_sample(teacher.schedule, predict(noisy, asked[0], batch.conditioning), noisy, asked[0])
    eps = prediction_of(student.schedule, x0, noisy, times)
    torch.testing.assert_close(loss, (student.predict(noisy, times, batch.conditioning) - eps).square().mean())


def test_a_student_that_starts_at_pure_noise():
    """Where it has no x0 in its input at all, its teacher is asked a little earlier."""
    student, teacher = Tiny(0), Tiny(1)
    student.schedule = DiscreteSchedule(zero_terminal_snr(ALPHAS), "v_prediction")
    task = Distil(student, teacher, source(), TrainSettings(batch_size=3, caption_dropout=0), feature_weight=0)
    losses = [float(task.loss(RandomNumbers(0, k))) for k in range(100)]
    last = torch.cat([(RandomNumbers(0, k).uniform(3) * 100).long() for k in range(100)]) == 99
    assert last.any() and max(losses) < 100 * sorted(losses)[50]


def test_prompts_of_other_lengths_are_repeated():
    short, long = {"context": torch.randn(1, 2, 3)}, {"context": torch.randn(2, 3, 3)}
    both = joined([short, long])["context"]
    assert both.shape == (3, 6, 3)
    assert torch.equal(both[0], short["context"].repeat(1, 3, 1)[0])
    assert torch.equal(rows(joined([short, long]), [2, 0])["context"], both[[2, 0]])
    with pytest.raises(ValueError, match="different kinds: one has context, one has y"):
        joined([short, {"y": torch.zeros(1, 2)}])
    with pytest.raises(ValueError, match="'context' has sizes"):
        joined([short, {"context": torch.zeros(1, 2, 4)}])


def test_counts_must_match():
    latents = [torch.zeros(4, 2, 2)] * 3
    assert len(LatentSource(latents, {"context": torch.zeros(1, 2, 3)}, batch_size=3).batch(0).conditioning["context"]) == 3
    with pytest.raises(ValueError, match="conditioning: 2 prompts for 3 latents"):
        LatentSource(latents, {"context": torch.zeros(2, 2, 3)})
    with pytest.raises(ValueError, match="teacher: 4 prompts for 3 latents"):
        LatentSource(latents, {"context": torch.zeros(3, 2, 3)}, {"context": torch.zeros(4, 2, 3)})
    with pytest.raises(ValueError, match="styles: 2 for 3 latents"):
        LatentSource(latents, {"context": torch.zeros(1, 2, 3)}, styles=[0, 1])
    with pytest.raises(ValueError, match="no training images"):
        LatentSource([], {"context": torch.zeros(1, 2, 3)})


def test_styles_are_given_by_labels_but_for_a_share():
    """s is the label's style, of rows that have one and are not dropped; the router's elsewhere. The run's plan says so."""
    model, heard = Tiny(0), []
    adapter = model.adapter()
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.router_weight.normal_()
            layer.B.normal_()

    class Heard(Listener):
        def record(self, layer, s):
            heard.append(s)

    labels = [0, 1, -1, 1, 0, -1]
    plain = FineTune(model, source(), TrainSettings(1), style_dropout=0.0)
    given = FineTune(model, source(styles=labels), TrainSettings(1), style_dropout=0.0)
    dropped = FineTune(model, source(styles=labels), TrainSettings(1), style_dropout=1.0)
    for task in (plain, given, dropped):
        with task.installed(adapter) as attachment, attachment.in_call(ModelCall(listeners=(Heard(),))):
            task.loss(RandomNumbers(0, 0))
    free, labeled, free_again = heard[0], heard[2], heard[4]
    members = given.source.order.batch(0)
    for row, k in enumerate(members):
        expected = free[row] if labels[k] < 0 else torch.eye(2)[labels[k]]
        assert torch.equal(labeled[row], expected)
    assert torch.equal(free, free_again)
    assert given.plan()["data"] != plain.plan()["data"]
    assert given.plan()["style_dropout"] == 0 and "style_dropout" not in plain.plan()


@pytest.mark.parametrize("by_token", [False, True])
def test_routers_learn_the_styles_that_are_given(by_token):
    """-log s of the given style, a mean over images and tokens, a sum over layers; of a batch that is divided it is the same."""
    s = {name: torch.rand(4, *([3] if by_token else []), 2, dtype=torch.float64).softmax(-1).requires_grad_() for name in "ab"}
    styles = torch.tensor([1, -1, 0, 1])
    whole, divided = GivenStyles(styles), GivenStyles(styles)
    for layer, values in s.items():
        steered = whole.steer(layer, values)
        rows = [divided.of(rows).steer(layer, values[rows]) for rows in ([0, 1, 3], [2])]
        assert torch.equal(torch.cat(rows)[[0, 1, 3, 2]], steered)
    expected = -sum(v[k, ..., style].log().mean() for v in s.values() for k, style in ((0, 1), (2, 0), (3, 1))) / 4
    for given in (whole, divided):
        torch.testing.assert_close(given.unlike().double(), expected, rtol=1e-6, atol=0)
    unheard = GivenStyles(styles)
    unheard.steer("a", s["a"].detach())
    assert unheard.unlike() == 0, "nothing is to be learned where there are no gradients, as in validation"


def test_what_routers_learn_is_no_part_of_the_validation_loss():
    model = Tiny(0)
    adapter = model.adapter()
    labels = [0, 1, 0, 1, 0, 1]
    settings = TrainSettings(1, caption_dropout=0.0)
    task = FineTune(model, source(styles=labels), settings, validation=source(styles=labels), style_dropout=0.0)
    with task.installed(adapter):
        loss = task.loss(RandomNumbers(0, 0))
        with torch.no_grad():
            measured = task.loss(RandomNumbers(0, 0))
        assert float(loss.detach()) - float(measured) == pytest.approx(
            FOLLOWING * math.log(2) * len(adapter.names), rel=1e-3
        ), "s is 1/2"
        loss.backward()
    assert all(layer.router_bias.grad.abs().max() > 0 for layer in adapter.layers.values())


def test_gradients_of_two_processes_average_to_those_of_one():
    model = Tiny(0)
    adapter = model.adapter()

    def gradients(batch_size, processes):
        task = FineTune(model, source(batch_size=batch_size, processes=processes), TrainSettings(caption_dropout=0.5), EMPTY)
        adapter.zero_grad()
        with task.installed(adapter):
            task.loss(RandomNumbers(0, 3, processes)).backward()
        return [p.grad.clone() for p in adapter.parameters()]

    whole = gradients(6, Processes())
    parts = [gradients(2, Processes(rank, 3)) for rank in range(3)]
    for one, several in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(sum(several) / 3, one)
