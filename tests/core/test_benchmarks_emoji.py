"""The emoji benchmark: its distance of distributions, its rows, and a run of every task in a few steps."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("tqdm")
MODULES = ("measure", "methods", "chinese", "problems", "run", "table", "pictures", "saturation")


@pytest.fixture(scope="module")
def bench():
    """The benchmark's modules by name; they are no package, and gone from sys.modules afterwards."""
    folder = str(Path(__file__).parents[2] / "benchmarks" / "emoji")
    path = sys.path.copy()  # run.py puts the repository first, whose folder nodes would hide ComfyUI's nodes.py
    sys.path.insert(0, folder)
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path[:] = path
        for name in MODULES:
            sys.modules.pop(name, None)


def test_kid_of_one_distribution_is_zero_on_average_and_of_a_shifted_one_is_not(bench):
    kid = bench["measure"].kid
    torch.manual_seed(0)
    same = torch.tensor([kid(torch.randn(40, 16), torch.randn(40, 16)) for _ in range(200)])
    assert abs(same.mean()) < 3 * same.std() / 200**0.5, "unbiased"
    assert same.min() < 0, "and so it can be negative"
    shifted = [kid(torch.randn(40, 16), torch.randn(40, 16) + shift) for shift in (0.5, 1.0)]
    assert same.max() < shifted[0] < shifted[1]


def test_kid_is_scikit_learns_polynomial_kernel(bench):
    polynomial_kernel = pytest.importorskip("sklearn.metrics.pairwise").polynomial_kernel
    x, y = torch.randn(12, 16, dtype=torch.float64), 0.3 + torch.randn(9, 16, dtype=torch.float64)
    (xx, yy, xy) = (polynomial_kernel(a, b, degree=3, gamma=1 / 16, coef0=1) for a, b in ((x, x), (y, y), (x, y)))
    expected = (xx.sum() - xx.trace()) / (12 * 11) + (yy.sum() - yy.trace()) / (9 * 8) - 2 * xy.mean()
    assert bench["measure"].kid(x, y) == pytest.approx(expected, rel=1e-9)


def test_rows_of_equal_size_are(bench):
    problems, size = bench["problems"], bench["methods"]._size
    for problem in (problems.Problem, problems.Distillation):
        counts = [size(bench["methods"].config(key, problem.rank, problem.targets)) for key in ("n16", "lora_equal", "lora")]
        assert counts[1] == pytest.approx(counts[0], rel=0.02) and counts[2] < counts[0] / 10
    small = [size(bench["methods"].config(key, 8, ("to_q", "to_v"))) for key in ("n4", "lora_small")]
    assert small[1] == pytest.approx(small[0], rel=0.03)
    problem, rows = problems.Problem, ("lora", "krona", "krona_small", "lora_four", "krona_four")
    lora, *others = (size(bench["methods"].config(key, problem.rank, problem.targets)) for key in rows)
    assert [count / lora for count in others] == pytest.approx([0.92, 0.63, 1.0, 0.93], abs=0.005)


def test_the_rows_that_help_a_lora_and_that_read_the_paper_otherwise(bench):
    methods, targets = bench["methods"], ("to_q", "to_v")
    config = methods.config("lora_root", 8, targets)
    assert config.scale == pytest.approx(config.r**0.5)  # alpha / sqrt(r), alpha = r
    plain, wide = (methods.trainee(row, None, 8, targets, seed=0)[1].layers for row in ("lora_equal", "lora_wide"))
    name = next(iter(plain))
    assert torch.equal(4 * plain[name].A, wide[name].A) and not wide[name].B.any()
    layers = methods.trainee("n16_plain_values", None, 8, targets, seed=0)[1].layers
    values = {name: layer.config.method for name, layer in layers.items()}
    assert {key for key, method in values.items() if method == "lora"} == {key for key in values if key.endswith("attn2.to_v")}


def test_dreambooth_is_measured_against_the_base_without_the_rows_adapter(bench):
    """Also where the base is drawn first while the adapter is on it: a bent U-Net is not its own measure."""
    subject = bench["problems"].Subject("noto", bench["problems"].QUICK)
    untouched = subject._before(7)
    subject.drift.clear()
    bent, adapter = bench["methods"].trainee("lora", subject.base, 8, ("to_q", "to_v"), seed=0)
    for parameter in adapter.parameters():
        parameter.data.normal_()
    with bent.attachment(adapter):
        assert torch.equal(subject._before(7), untouched)


def test_chinese_names_are_complete_and_the_encoder_tells_them_apart(bench):
    names = bench["chinese"].chinese_names()
    assert len(set(names)) == len(names) == 223
    from styleinject_core.demo.model import load_text_encoder

    encoder = bench["chinese"].train_chinese_encoder(load_text_encoder(), steps=2)
    assert encoder(names).flatten(1).unique(dim=0).shape == (223, 8 * 128)


@pytest.mark.parametrize(
    ("task", "row", "column"),
    [("style", "full", "kid"), ("chinese", "n4", "kid"), ("styles", "n4_given", "val"), ("dreambooth", "lora", "likeness")],
)
def test_quick_run_is_complete_and_resumable(bench, tmp_path, task, row, column):
    out = tmp_path / "results.jsonl"
    options = ["--task", task, "--rows", row, "--seeds", "0", "--quick", "--out", str(out)]
    bench["run"].main(options)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    tuning, (measured,) = [[x for x in lines if x["row"] == row and x["tuning"] == flag] for flag in (True, False)]
    assert [line["rate"] for line in tuning] == [bench["methods"].METHODS[row].rate] == [measured["rate"]]
    assert column in measured["metrics"] and measured["parameters"] > 0
    if task == "dreambooth":
        curve = [measured["metrics"][f"subject_and_others@{strength}"] for strength in ("0.6", "0.8", "1.25", "1.5")]
        mean = (sum(curve) + measured["metrics"]["subject_and_others"]) / 5
        assert measured["metrics"]["subject_and_others_area"] == pytest.approx(mean) and measured["metrics"]["val"] > 0
    before = out.read_text()
    bench["run"].main(options)
    assert out.read_text() == before, "what is finished is not run again"
    assert bench["methods"].METHODS[row].label in bench["table"].tables(bench["run"].read(out))


@pytest.mark.parametrize(("best", "tried"), [(1e-2, [3e-3, 1e-2, 3e-2]), (1e-1, [3e-3, 1e-2, 3e-2, 1e-1, 3e-1])])
def test_learning_rates_are_tried_until_the_best_has_worse_neighbors(bench, tmp_path, monkeypatch, best, tried):
    def execute(_, run):  # 3e-1 diverges
        return {"metrics": {"seen_kid": abs(math.log(run.rate / best))} if run.rate < 0.3 else {}, "error": "diverged"}

    monkeypatch.setattr(bench["run"].Bench, "execute", execute)
    runs = bench["run"].Bench(tmp_path / "results.jsonl", bench["problems"].Size(steps=1))
    for _ in range(2):  # and nothing is run twice
        assert runs.rate("style", "lora") == best
        assert sorted(line["rate"] for line in runs.lines) == tried


def test_what_can_be_recognized_goes_before_the_colors(bench, tmp_path, monkeypatch):
    """At a rate where nothing is recognized any more, the KID can be smallest."""
    both = {3e-3: 0.2, 1e-2: 0.3, 3e-2: 0.3, 1e-1: 0.0}
    kid = {3e-3: 0.15, 1e-2: 0.12, 3e-2: 0.11, 1e-1: 0.07}

    def execute(_, run):
        return {"metrics": {"seen_both": both[run.rate], "seen_kid": kid[run.rate]}}

    monkeypatch.setattr(bench["run"].Bench, "execute", execute)
    assert bench["run"].Bench(tmp_path / "results.jsonl", bench["problems"].Size(steps=1)).rate("style", "lora") == 3e-2


def test_a_line_that_was_cut_off_spoils_no_other(bench, tmp_path):
    out = tmp_path / "results.jsonl"
    out.write_text('{"task": "style", "row": "ba')
    runs = bench["run"].Bench(out, bench["problems"].QUICK)
    assert runs.lines == []
    runs.append({"task": "style"})
    assert bench["run"].read(out) == [{"task": "style"}]


def test_information_is_what_a_choice_says_of_the_style_that_is_asked_for(bench):
    choices = bench["problems"].Choices()
    says = {"all": torch.eye(2), "nothing": torch.full((2, 2), 0.5)}
    for style in (0, 1, 1):  # a style may be drawn more often
        choices.style = style
        for layer, s in says.items():
            choices.record(layer, torch.stack([s[style]] * 3 + [torch.tensor([1.0, 0.0])] * 3))  # the other half is unasked
    found = choices.information()
    assert found["all"] == pytest.approx(math.log(2)) and found["nothing"] == pytest.approx(0.0, abs=1e-12)


def test_long_trainings_are_measured_on_the_way_and_drawn(bench, tmp_path):
    out, kept = tmp_path / "results.jsonl", tmp_path / "kept"
    options = ["--task", "styles", "--rows", "n4_prompt_taught", "--seeds", "0", "--quick", "--steps", "1", "--long"]
    bench["run"].main([*options, "--out", str(out), "--keep", str(kept)])
    lines = bench["run"].read(out)
    tuning, long = (line for line in lines if line["row"] == "n4_prompt_taught")
    assert (tuning["steps"], long["steps"]) == (1, 10) and "curve" not in tuning and long["rate"] == tuning["rate"]
    assert [point["step"] for point in long["curve"]] == list(range(1, 11)) and {"both", "val"} <= long["curve"][0].keys()
    assert long["metrics"]["information"] >= 0 and len(long["metrics"]["confusion"]) == 4
    assert [path.name for path in kept.iterdir()] == ["styles-n4_prompt_taught-10-0.safetensors"]
    usual = {name: value for name, value in long.items() if name != "curve"}
    bench["pictures"].several([usual], tmp_path / "styles.png")
    bench["pictures"].long("styles", lines, tmp_path / "long.png")
    assert (tmp_path / "styles.png").stat().st_size > 5000 and (tmp_path / "long.png").stat().st_size > 5000


def test_a_sum_of_logits_decides_earlier_than_their_mean(bench):
    problem = bench["problems"].Problem("openmoji-line", bench["problems"].Size(steps=4, batch=2, concepts=3))
    both = {pool: bench["saturation"].decided(problem, pool, 1e-2) for pool in ("sum", "mean")}
    assert both["sum"][0] == both["mean"][0] == pytest.approx(0, abs=1e-6), "all styles alike before training"
    assert both["sum"][3] > 5 * both["mean"][3]


def test_table_has_means_spreads_and_what_was_tried(bench):
    def line(row, seed, kid, tuning=False, **more):
        metrics = {"seen_both": 0.25, "seen_kid": kid} if tuning else {"concept": 0.9, "kid": kid}
        rate = 0.003 if row == "lora" else 0.0
        line = {"task": "style", "row": row, "seed": seed, "rate": rate, "steps": 2, "parameters": 1234 if rate else 0}
        return {**line, "tuning": tuning, "metrics": metrics, **more}

    runs = [line("base", 0, 0.5), line("lora", 0, 0.1), line("lora", 1, 0.2), line("lora", 2, 0, metrics={}, error="nan")]
    lines = bench["table"].tables([*runs, line("lora", 100, 0.3, tuning=True)]).splitlines()
    assert lines[2:] == [
        "|  | parameters | rate | seeds | concept, new | KID, new |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| base model |  |  | 1 | 90 | 500 |",
        "| LoRA, rank r | 1,234 | 0.003 | 3, 1 diverged | 90 ± 0 | 150 ± 71 |",
        "",
        "**Learning rates tried** (on concepts trained on: per cent recognized as thing and style, and KID)",
        "",
        "|  | style, 2 steps |",
        "| --- | --- |",
        "| LoRA, rank r | 0.003: 25 / 300 |",
    ]
