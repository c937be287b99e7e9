"""The training benchmark on a tiny U-Net: its methods train the same layers, and the fast form keeps the least."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def bench():
    folder = str(Path(__file__).parents[2] / "benchmarks")
    path = sys.path.copy()  # step_overhead.py puts the repository first, whose folder nodes would hide ComfyUI's nodes.py
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("train_step")
    finally:
        sys.path[:] = path


@pytest.fixture(scope="module")
def problem(bench):
    setting = bench.Setting(quick=True, device="cpu", dtype=torch.float32, size=16, batch=2)
    base = setting.base()
    return base, {key: bench.Trainee(key, base, setting) for key in bench.METHODS}, setting.inputs()


def test_trainees_share_what_is_frozen(problem):
    base, trainees, _ = problem
    shared = {id(parameter) for parameter in base.parameters()}
    for trainee in trainees.values():
        trained = {id(parameter) for parameter in trainee.parameters}
        assert {id(p) for p in trainee.unet.parameters()} - trained == shared
        assert all(p.dtype == torch.float32 for p in trainee.parameters)


def test_naive_and_fast_are_the_same_training(problem):
    """Loss and gradients through the whole U-Net."""
    _, trainees, inputs = problem
    naive, fast = trainees["naive"], trainees["styleinject"]
    losses = [trainee.loss(inputs) for trainee in (naive, fast)]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, t.parameters) for loss, t in zip(losses, (naive, fast), strict=True)]
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)


def test_measurements_and_table(bench, problem):
    base, trainees, inputs = problem
    kept = bench.measure_kept(base, trainees, inputs)
    assert 0 < kept["styleinject"] < kept["lora_equal"] < kept["lora"] < kept["naive"]
    assert 0 < kept["kronecker"] < kept["lora_four"]
    steps = bench.time_steps(trainees, inputs, 1, "cpu")
    layers = bench.time_layers(trainees, inputs, 1, "cpu")
    assert len(layers.times) == 5 * 64 + 2 * 128, "every to_q and to_v, and every projection, by every method that adapts it"
    rows = bench.table(steps, layers, trainees, kept, dict.fromkeys(trainees, math.nan)).splitlines()
    assert len(rows) == 2 + 7 and rows[2].startswith("| PEFT LoRA, r = 512 | 9,388,032 | 1.00 | 1.00 |")
