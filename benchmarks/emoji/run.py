"""The shape of the paper's tables on models that train here: one JSON line per finished run, appended, resumable.

    python benchmarks/emoji/run.py --task all --seeds 0 1 2 --out results.jsonl      # hours on one CPU core
    python benchmarks/emoji/run.py --task style --rows base lora n16 --seeds 0 --out results.jsonl
    python benchmarks/emoji/run.py --task style --quick --out quick.jsonl            # only shows that it runs
    python benchmarks/emoji/table.py results.jsonl                                   # the tables, as Markdown

Before a row is run for the table, its learning rate is chosen: rates are tried with a seed of its own and measured on concepts
that are trained on, until one is better than the next lower and the next higher one. What was tried is in the file as well.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from methods import METHODS, RATES, trained_parameters, trainee
from problems import QUICK, Distillation, Problem, Size, Styles, Subject
from tqdm import tqdm

from styleinject_core import save_adapter
from styleinject_core.train.run.loop import Observer, Progress, TrainingError, train

PROBLEMS: dict[str, Callable[[Size], Problem]] = {
    "style": partial(Problem, "openmoji-line"),
    "dreambooth": partial(Subject, "noto"),
    "artist": partial(Problem, "noto"),
    "distil": partial(Distillation, "openmoji-line"),
    "chinese": partial(Distillation, "openmoji-line", chinese=True),
    "styles": Styles,
}
SEVERAL_STYLES = {"styles"}  # the tasks of which an example has a style of its own, which can be given
TUNED_ON = {"dreambooth": "style"}  # whose learning rates it takes; the others have their own
TUNING_SEED = 100
IDEAL = "ideal"  # the row of what is learned from


@dataclasses.dataclass(frozen=True)
class Run:
    """What identifies a line of the results. A rate of 0 trains nothing."""

    task: str
    row: str
    seed: int
    rate: float
    steps: int
    tuning: bool = False

    def of(self, line: dict[str, Any]) -> bool:
        return all(line[name] == value for name, value in dataclasses.asdict(self).items())


class Bar(Observer):
    """A progress bar that goes away; of a long training, what is measured on the way."""

    def __init__(self, run: Run, measure: Callable[[], dict[str, Any]]):
        self.curve: list[dict[str, Any]] = []  # of what is measured on the way
        self.measure = measure
        what = f"{run.task} {run.row} seed {run.seed} rate {run.rate:g}"
        self.bar = tqdm(total=run.steps, desc=what, leave=False, mininterval=5)

    def progress(self, progress: Progress) -> None:
        self.bar.set_postfix(loss=f"{progress.loss:.4f}", refresh=False)
        self.bar.update()

    def sample(self, step: int) -> None:
        self.curve.append({"step": step, **self.measure()})


class Bench:
    """The runs of one results file."""

    def __init__(self, out: Path, size: Size, keep: Path | None = None, long: int = 1):
        self.out, self.size, self.keep, self.long = out, size, keep, long
        self.lines = read(out)
        if out.exists() and not out.read_bytes().endswith(b"\n"):  # stopped while it wrote: the next line is one of its own
            with out.open("a") as file:
                file.write("\n")
        self.problem = cache(lambda task: PROBLEMS[task](size))

    def table_row(self, task: str, row: str, seed: int) -> None:
        rate = self.rate(TUNED_ON.get(task, task), row) if METHODS[row].rate else 0.0
        self.line(Run(task, row, seed, rate, self.long * self.problem(task).usual))

    def rate(self, task: str, row: str) -> float:
        """The best learning rate, better than the next lower and higher one.

        On concepts that are trained on, more are recognized as the thing and in the style; where as many, the KID is smaller.
        The KID alone is smallest where nothing can be recognized any more, in the right colors.
        """

        @cache
        def badness(k: int) -> tuple[float, float]:
            metrics = self.line(Run(task, row, TUNING_SEED, RATES[k], self.problem(task).usual, True))["metrics"]
            return -round(metrics.get("seen_both", 0.0), 4), metrics.get("seen_kid", math.inf)  # as many up to rounding

        best, steps = RATES.index(METHODS[row].rate), (0, 1, -1) if self.size.search else (0,)
        while (better := min((best + step for step in steps if 0 <= best + step < len(RATES)), key=badness)) != best:
            best = better
        return RATES[best]

    def line(self, run: Run) -> dict[str, Any]:
        """The line of a run: read, or made and appended."""
        for line in self.lines:
            if run.of(line):
                return line
        began = time.perf_counter()
        line = {**dataclasses.asdict(run), **self.execute(run), "seconds": round(time.perf_counter() - began, 1)}
        self.append(line)
        numbers = {name: round(value, 4) for name, value in line["metrics"].items() if isinstance(value, float)}
        tqdm.write(f"{run}: {numbers or line['error']}")
        return line

    def execute(self, run: Run) -> dict[str, Any]:
        problem = self.problem(run.task)
        model, trained = trainee(run.row, problem.base, problem.rank, problem.targets, run.seed)
        result: dict[str, Any] = {"parameters": trained_parameters(trained), "metrics": {}}
        given, taught = METHODS[run.row].given, METHODS[run.row].taught
        measured = problem.task(model, problem.settings(1.0, 0), given)  # the same noise for the validation of all seeds

        def on_the_way() -> dict[str, Any]:  # while the adapter is on the model
            columns = problem.columns(model, problem.new, run.seed, None, given)
            return columns if measured.validation is None else {**columns, "val": measured.validation_loss()}

        if run.rate:
            settings, bar = problem.settings(run.rate, run.seed, run.steps), Bar(run, on_the_way)
            try:
                losses = train(trained, problem.task(model, settings, given or taught), settings, observer=bar).losses
            except TrainingError as error:  # diverged: that is a result too
                return {**result, "error": str(error)}
            finally:
                bar.bar.close()
            last = losses[-max(1, len(losses) // 5) :]
            result["loss"] = sum(last) / len(last)
            if bar.curve:
                result["curve"] = bar.curve
        with torch.no_grad(), measured.installed(trained) as attachment:
            result["metrics"] = problem.measure(model, run.seed, run.tuning, attachment, given)
            if measured.validation is not None:
                result["metrics"]["val"] = measured.validation_loss()
        if self.keep is not None and METHODS[run.row].adapts and not run.tuning:
            self.keep.mkdir(parents=True, exist_ok=True)
            save_adapter(trained, self.keep / f"{run.task}-{run.row}-{run.steps}-{run.seed}.safetensors")
        return result

    def ideal(self, task: str) -> None:
        """The line of what is learned from, for the table."""
        run = Run(task, IDEAL, 0, 0.0, self.problem(task).usual)
        if not any(run.of(line) for line in self.lines):
            self.append({**dataclasses.asdict(run), "parameters": 0, "metrics": self.problem(task).ideal(), "seconds": 0.0})

    def append(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; one that was cut off does not count."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def main(options: list[str] | None = None) -> None:
    """Run what is missing in the results file; `options` are sys.argv's where not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=[*PROBLEMS, "all"], default="all")
    parser.add_argument("--rows", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="training steps of every run (default: the task's own)")
    parser.add_argument("--long", action="store_true", help="10 times the steps at a constant rate, measured on the way")
    parser.add_argument("--out", type=Path, required=True, help="the results, one JSON object per line")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="save the adapters of the tables' rows there")
    parser.add_argument("--quick", action="store_true", help="few steps, few concepts: only shows that it runs")
    arguments = parser.parse_args(options)
    size = QUICK if arguments.quick else Size()
    size = dataclasses.replace(size, steps=arguments.steps or size.steps)
    bench = Bench(arguments.out, size, arguments.keep, 10 if arguments.long else 1)
    for task in PROBLEMS if arguments.task == "all" else [arguments.task]:
        bench.ideal(task)
        for seed in arguments.seeds:
            for row in arguments.rows:
                labeled = METHODS[row].given or METHODS[row].taught
                if (task in SEVERAL_STYLES or not labeled) and not (arguments.long and METHODS[row].given):
                    bench.table_row(task, row, seed)


if __name__ == "__main__":
    main()
