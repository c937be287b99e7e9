"""Tables of benchmarks/emoji/run.py's results, as Markdown: mean and standard deviation over the seeds.

python benchmarks/emoji/table.py results.jsonl
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from run import IDEAL, METHODS, PROBLEMS, read

TITLES = {
    "style": "Fine-tuning, openmoji to openmoji-line",
    "artist": "Fine-tuning, openmoji to noto",
    "distil": "Distillation, shared text encoder",
    "chinese": "Distillation, English teacher, Chinese student",
    "dreambooth": "DreamBooth, one subject",
    "styles": "Fine-tuning, four styles in one adapter, named in the prompt",
}
COLUMNS = {
    "concept": "concept, new",
    "style": "style, new",
    "both": "both, new",
    "kid": "KID, new",
    "val": "val",
    "both_area": "both, mean over strengths 0.6 to 1.5",
    "information": "I(style; s), nats",
    "seen_both": "both, seen",
    "seen_kid": "KID, seen",
    "likeness": "likeness",
    "subject_style": "subject in its style",
    "class_kept": "class kept",
    "others_kept": "others kept",
    "others_kid": "KID, others",
    "subject_and_others_area": "subject in its style times others kept, mean over strengths 0.6 to 1.5",
}
_AS_THEY_ARE = {"likeness": (1, 3), "information": (1, 2), "val": (1, 4)}  # factor, digits
LABELS = {**{key: method.label for key, method in METHODS.items()}, IDEAL: "what is learned from"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    print(tables(read(parser.parse_args().results)))


def tables(lines: Iterable[dict[str, Any]]) -> str:
    """Every task that has results, then the learning rates that were tried."""
    lines = list(lines)
    parts = []
    for task, steps in kinds(lines):
        chosen = [line for line in lines if (line["task"], line["steps"]) == (task, steps) and not line["tuning"]]
        if chosen:
            parts.append(f"**{TITLES[task]}** ({task}, {steps} steps)\n\n{results(chosen)}")
    if tuning := [line for line in lines if line["tuning"]]:
        title = "**Learning rates tried** (on concepts trained on: per cent recognized as thing and style, and KID)"
        parts.append(f"{title}\n\n{rates(tuning)}")
    return "\n\n".join(parts)


def results(lines: list[dict[str, Any]]) -> str:
    """One task's table."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        rows[line["row"]].append(line)
    columns = [c for c in COLUMNS if any(c in line["metrics"] for line in lines)]
    head = ["", "parameters", "rate", "seeds", *(COLUMNS[c] for c in columns)]
    table = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in (row for row in LABELS if row in rows):
        of = rows[row]
        rate = " / ".join(sorted({f"{line['rate']:g}" for line in of if line["rate"]}))
        diverged = sum("error" in line for line in of)
        seeds = "" if row == IDEAL else f"{len(of)}" + (f", {diverged} diverged" if diverged else "")
        cells = [spread(c, [line["metrics"][c] for line in of if c in line["metrics"]]) for c in columns]
        count = of[0]["parameters"]
        table.append([LABELS[row], f"{count:,}" if count else "", rate, seeds, *cells])
    return markdown(table)


def rates(lines: list[dict[str, Any]]) -> str:
    """What was tried per row, a column for every task that has rates of its own."""
    columns = kinds(lines)
    table = [["", *(f"{task}, {steps} steps" for task, steps in columns)], ["---"] * (len(columns) + 1)]
    for row, label in LABELS.items():
        cells = []
        for column in columns:
            of = [line for line in lines if (line["task"], line["steps"]) == column and line["row"] == row]
            tried = sorted(of, key=lambda line: line["rate"])
            measured = (f"{line['rate']:g}: {measured_at(line['metrics'])}" for line in tried if line["metrics"])
            cells.append(", ".join([*measured, *(f"{line['rate']:g}: diverged" for line in tried if "error" in line)]))
        if any(cells):
            table.append([label, *cells])
    return markdown(table)


def measured_at(metrics: dict[str, float]) -> str:
    return f"{spread('both', [metrics['seen_both']])} / {spread('kid', [metrics['seen_kid']])}"


def kinds(lines: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """The tasks in a list of lines, each with its number of training steps: runs of another length are another table."""
    found = {(line["task"], line["steps"]) for line in lines}
    return [(task, steps) for task in PROBLEMS for of, steps in sorted(found) if of == task]


def spread(column: str, values: list[float]) -> str:
    """Mean ± standard deviation: shares in per cent, KID times 1,000, others as they are."""
    if not values:
        return ""
    factor, digits = (1000, 0) if column.endswith("kid") else _AS_THEY_ARE.get(column, (100, 0))
    mean = f"{factor * statistics.mean(values):.{digits}f}"
    return f"{mean} ± {factor * statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main()
