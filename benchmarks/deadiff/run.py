"""DEADiff's ablation on the embedded model: one JSON line per finished run, appended, resumable; the table as Markdown.

    python benchmarks/deadiff/run.py --work WORK --seeds 0 1 2 --out results.jsonl     # hours on one CPU core
    python benchmarks/deadiff/run.py --table results.jsonl
    python benchmarks/deadiff/run.py --quick --work WORK --out quick.jsonl             # only shows that it runs

The variants, each given the same number of steps that teach it style (of pairs, or of reconstruction where that is all it has):

    separate-reconstruction  like IP-Adapter: a softmax of its own, all layers, the target is its own reference
    coupled-reconstruction   one softmax over text and image, one stream in all layers, the target is its own reference
    coupled-pairs            the same, trained on pairs of one style
    split-pairs              the style stream in the style layers alone, pairs of one style
    whole                    both streams; pairs of one style and of one thing, and reconstruction
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "demo"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emoji"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from measure import features, kid
from torch import Tensor, nn
from torch.nn import functional as F
from train_deadiff import COUPLED, STYLE_STEPS, VARIANTS, trained

from styleinject_core.deadiff import Deadiff
from styleinject_core.demo import data
from styleinject_core.demo.classifier import load_classifier
from styleinject_core.demo.deadiff import five_style_training
from styleinject_core.demo.reference_scores import measure, measure_new_styles
from styleinject_core.train.objectives.reference import Shares
from styleinject_core.train.run.reference_folder import ReferenceFolder

SEPARATE = "separate-reconstruction"
ALL = {SEPARATE: (COUPLED, Shares(0, 0, 1)), **VARIANTS}
WORDS = "words"  # the model told the style in words: the ceiling
LABELS = {WORDS: "the style told in a word (ceiling)", SEPARATE: "separate softmax, reconstruction (like IP-Adapter)",
          "coupled-reconstruction": "one softmax, reconstruction", "coupled-pairs": "one softmax, pairs",
          "split-pairs": "and in the style layers alone", "whole": "both streams (DEADiff)"}  # fmt: skip
COLUMNS = {
    "concept": "concept",
    "style": "style",
    "both": "both",
    "distance": "KID",
    "color_leak": "color leak",
    "concept_leak": "concept leak",
    "content_concept": "content: concept",
    "content_style": "content: style",
    **{style: f"{style}: KID" for style in data.NEW_STYLES},
}
DISTANCES = ("distance", *data.NEW_STYLES)


class SeparateSoftmax:
    """A diffusers attention processor: keys and values beyond the prompt's get a softmax of their own, added (IP-Adapter)."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_args: Any, **_named: Any) -> Tensor:
        count = encoder_hidden_states.shape[1]
        q, k, v = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, encoder_hidden_states), (attn.to_v, encoder_hidden_states))
        )
        out = F.scaled_dot_product_attention(q, k[:, :, :count], v[:, :, :count])
        if k.shape[2] > count:
            out = out + F.scaled_dot_product_attention(q, k[:, :, count:], v[:, :, count:])
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@contextmanager
def separate(unet: nn.Module) -> Iterator[None]:
    """Every cross-attention of a U-Net with `SeparateSoftmax`."""
    layers: list[Any] = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    former = [layer.processor for layer in layers]
    for layer in layers:
        layer.processor = SeparateSoftmax()
    try:
        yield
    finally:
        for layer, processor in zip(layers, former, strict=True):
            layer.processor = processor


def run(variant: str, seed: int, steps: int, work: Path) -> dict[str, float]:
    """Train a variant, going on where it was stopped, and measure it."""
    model, classifier = five_style_training(), load_classifier()
    seen = partial(features, classifier)
    distance = lambda a, b: kid(seen(a), seen(b))  # noqa: E731

    def measured(deadiff: Deadiff | None) -> dict[str, float]:
        return {**measure(model, deadiff, seed, distance), **measure_new_styles(model, deadiff, distance, seed)}

    if variant == WORDS:
        return measured(None)
    config, shares = ALL[variant]
    folder = ReferenceFolder(work / f"{variant}-{seed}-{steps}")
    with separate(model.denoiser) if variant == SEPARATE else nullcontext():
        return measured(trained(model, folder, config, shares, steps, seed))


def table(lines: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation over the seeds, per cent; KID times 1,000; color leak as it is."""
    rows = [["", "seeds", *COLUMNS.values()], ["---", *["---:"] * (len(COLUMNS) + 1)]]
    for variant, label in LABELS.items():
        of = [line for line in lines if line["variant"] == variant]
        if of:
            rows.append(
                [label, str(len(of)), *(_spread(column, [line[column] for line in of if column in line]) for column in COLUMNS)]
            )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _spread(column: str, values: list[float]) -> str:
    if not values or (column.startswith("content") and not any(values)):
        return ""
    factor, digits = (1000, 0) if column in DISTANCES else (1, 2) if column == "color_leak" else (100, 0)
    mean = f"{factor * statistics.mean(values):.{digits}f}"
    return f"{mean} ± {factor * statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STYLE_STEPS, help="steps that teach style, of every variant")
    parser.add_argument("--work", type=Path, help="a folder for the runs, from which they go on")
    parser.add_argument("--out", type=Path, help="the results, one JSON object per line")
    parser.add_argument("--quick", action="store_true", help="two steps: only shows that it runs")
    parser.add_argument("--table", type=Path, metavar="RESULTS", help="print the table of a results file, and nothing else")
    args = parser.parse_args()
    if args.table:
        print(table(read(args.table)))
        return
    if not (args.work and args.out):
        parser.error("--work and --out are needed")
    args.work.mkdir(exist_ok=True)
    steps = 2 if args.quick else args.steps
    done = {(line["variant"], line["seed"], line["steps"]) for line in read(args.out)}
    for seed in args.seeds:
        for variant in args.variants:
            if (variant, seed, steps) in done:
                continue
            began = time.perf_counter()
            torch.manual_seed(seed)
            scores = {key: round(value, 4) for key, value in run(variant, seed, steps, args.work).items()}
            line = {"variant": variant, "seed": seed, "steps": steps, **scores, "seconds": round(time.perf_counter() - began)}
            with args.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()
