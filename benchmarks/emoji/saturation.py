"""What a sum of logits over positions does to a router's softmax while it learns, beside their mean: convolutions of `style`.

python benchmarks/emoji/saturation.py    # about a minute
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from problems import Problem, Size
from table import markdown

from styleinject_core import Adapter, AdapterConfig
from styleinject_core.attach import Attachment
from styleinject_core.call import Listener, ModelCall
from styleinject_core.demo.training import DemoTrainingModel
from styleinject_core.hosts.architectures import ARCHITECTURES
from styleinject_core.router.analysis import entropy
from styleinject_core.train.run.loop import Observer, Progress, train

STEPS = (1, 2, 5, 10, 20, 40)
RATES = (1e-2, 1e-3, 1e-4)


class Heard(DemoTrainingModel):
    """The embedded model, with somebody who listens to the routers of whatever is attached to it."""

    listener: Listener

    @contextmanager
    def attachment(self, adapter: Adapter) -> Iterator[Attachment]:
        with super().attachment(adapter) as attachment, attachment.in_call(ModelCall(listeners=(self.listener,))):
            yield attachment


class Decided(Listener, Observer):
    """How far from uniform the layers' s are at each step: 0 all styles alike, 1 one style."""

    def __init__(self) -> None:
        self.now: list[float] = []
        self.by_step: list[float] = []

    def record(self, layer: str, s: torch.Tensor) -> None:
        self.now.append(1 - float(entropy(s).mean()))

    def progress(self, progress: Progress) -> None:
        self.by_step.append(sum(self.now) / len(self.now))
        self.now.clear()


def decided(problem: Problem, pool: str, rate: float) -> list[float]:
    """How decided the convolutions' routers are in each step of a training."""
    torch.manual_seed(0)
    config = AdapterConfig(r=4, n_styles=4, router_pool=pool, target_modules=("conv",))
    adapter = Adapter.create(ARCHITECTURES["demo"].shapes(), config, pool)
    settings, model, heard = problem.settings(rate, 0), Heard.load(), Decided()
    model.listener = heard
    train(adapter, problem.task(model, settings), settings, observer=heard)
    return heard.by_step


def main() -> None:
    problem = Problem("openmoji-line", Size(steps=max(STEPS)))
    rows = [["router_pool, learning rate", *(f"step {step}" for step in STEPS)], ["---", *["---:"] * len(STEPS)]]
    for pool in ("sum", "mean"):
        for rate in RATES:
            found = decided(problem, pool, rate)
            rows.append([f"{pool}, {rate:g}", *(f"{found[step - 1]:.2f}" for step in STEPS)])
    print(markdown(rows))


if __name__ == "__main__":
    main()
