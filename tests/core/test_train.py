"""The training loop and the fine-tuning objective, on a host where the answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from styleinject_core import Adapter, AdapterConfig, attach
from styleinject_core.train.loop import TrainingError, TrainSettings, train
from styleinject_core.train.objectives import fine_tune_loss

ALPHAS = torch.linspace(0.99, 0.01, 100)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_prediction_has_no_loss(prediction_type):
    z0, noise, t = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5), torch.tensor([0, 10, 50, 99])
    alpha = ALPHAS[t].view(-1, 1, 1, 1)

    def perfect(z_t, timesteps, conditioning):
        assert torch.equal(timesteps, t)
        assert conditioning == "prompt"
        eps = (z_t - alpha.sqrt() * z0) / (1 - alpha).sqrt()
        return {"epsilon": eps, "v_prediction": alpha.sqrt() * eps - (1 - alpha).sqrt() * z0, "sample": z0}[prediction_type]

    assert fine_tune_loss(perfect, z0, "prompt", noise, t, ALPHAS, prediction_type) < 1e-9
    assert fine_tune_loss(lambda *a: perfect(*a) + 2, z0, "prompt", noise, t, ALPHAS, prediction_type) == pytest.approx(4)


def test_unknown_prediction_type():
    z = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="found 'flow'"):
        fine_tune_loss(lambda *a: z, z, None, z, torch.zeros(1, dtype=torch.long), ALPHAS, "flow")


@pytest.fixture
def problem():
    """A frozen layer, and outputs in another style: channels rescaled, and a low-rank change of what they show."""
    torch.manual_seed(0)
    host = nn.ModuleDict({"to_q": nn.Linear(8, 6)}).requires_grad_(False)
    x = torch.randn(16, 12, 8)
    h = host["to_q"](x)
    mean = h.mean(1, keepdim=True)
    target = (h - mean) * torch.tensor([0.5, 2, 1, 1.5, 0.2, 1]) + mean + x @ (torch.randn(8, 1) @ torch.randn(1, 6)) * 0.5
    adapter = Adapter.create(host, AdapterConfig(r=2, n_styles=2, target_modules=("to_q",)))
    return host, x, target, adapter


def test_training_finds_the_style_and_leaves_the_host(problem):
    host, x, target, adapter = problem
    before = host["to_q"].weight.clone()
    seen = []
    with attach(host, adapter):
        losses = train(
            adapter,
            lambda _: (host["to_q"](x) - target).square().mean(),
            TrainSettings(300, 2e-2, warmup=5, decay=True, weight_decay=0),
            lambda step, loss: seen.append(step),
        )
    assert losses[-1] < 0.02 * losses[0]
    assert seen == list(range(1, 301))
    assert torch.equal(host["to_q"].weight, before)
    assert "forward" not in host["to_q"].__dict__


def test_nan_stops_at_the_last_good_step(problem):
    host, x, target, adapter = problem
    states = []

    def loss(step):
        states.append({k: v.clone() for k, v in adapter.state_dict().items()})
        return (host["to_q"](x) - target).square().mean() * (float("nan") if step == 3 else 1)

    with attach(host, adapter), pytest.raises(TrainingError, match="became nan at step 4 of 10"):
        train(adapter, loss, TrainSettings(10, 1e-2))
    assert all(torch.equal(v, states[3][k]) for k, v in adapter.state_dict().items())


def test_settings_are_checked():
    with pytest.raises(ValueError, match="steps: expected at least 1, found 0"):
        TrainSettings(0)
    with pytest.raises(ValueError, match="learning_rate: expected a positive number, found nan"):
        TrainSettings(1, float("nan"))
    rates = [TrainSettings(100, warmup=10, decay=True).rate(k) for k in (0, 9, 50, 99)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[2] == pytest.approx(0.5)
    assert rates[1] > 0.95 > 0.01 > rates[3]
