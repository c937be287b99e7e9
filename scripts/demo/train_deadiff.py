"""Train the demo's DEADiff on the five-style base, and measure it: what it draws, and what leaks from its references.

    python scripts/demo/train_deadiff_base.py WORK [--export]       # the base first
    python scripts/demo/train_deadiff.py WORK --name whole          # resumes where it was stopped, bit for bit
    python scripts/demo/train_deadiff.py WORK --name coupled-pairs --variant coupled-pairs --seed 1
    python scripts/demo/train_deadiff.py WORK --name whole --measure
    python scripts/demo/train_deadiff.py WORK --name whole --export # -> assets/deadiff/emoji-deadiff.safetensors

The variants follow the paper's ideas. --steps counts those that teach style (of pairs, or of reconstruction where there is
nothing else), so that it is the same for all:

    coupled-reconstruction   one stream in all layers, the target is its own reference (like IP-Adapter)
    coupled-pairs            one stream in all layers, same-style pairs
    split-pairs              one stream in the style layers, same-style pairs, empty tokens in the others
    whole                    both streams, content aligned with the text first; style and content pairs, and reconstruction

The shipped file is what the second command makes with its defaults, exported: 833 steps, 500 of them of style, after 700 of
alignment. About .4 CPU s a step: 7 minutes on a quiet core. benchmarks/deadiff/run.py trains and measures all of them.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from styleinject_core.deadiff import Deadiff, DeadiffConfig, load_deadiff, save_deadiff
from styleinject_core.demo.deadiff import (
    BASE_FILE,
    DEADIFF_FILE,
    DEMO_CONFIG,
    five_style_training,
    new_deadiff,
    paired_images,
    style_words,
)
from styleinject_core.demo.reference_scores import measure
from styleinject_core.demo.training import DemoTrainingModel
from styleinject_core.train.objectives.reference import ReferenceTask, Shares, align, start_from_host
from styleinject_core.train.run.loop import Observer, Progress, train
from styleinject_core.train.run.reference_folder import ReferenceFolder
from styleinject_core.train.settings import TrainSettings

COUPLED = replace(DEMO_CONFIG, content_layers=())
VARIANTS: dict[str, tuple[DeadiffConfig, Shares]] = {
    "coupled-reconstruction": (COUPLED, Shares(0, 0, 1)),
    "coupled-pairs": (COUPLED, Shares(1, 0, 0)),
    "split-pairs": (DEMO_CONFIG, Shares(1, 0, 0)),
    "whole": (DEMO_CONFIG, Shares(0.6, 0.3, 0.1)),
}
ALIGNMENT = 700  # steps
STYLE_STEPS, BATCH = 500, 16


class Lines(Observer):
    """A line every hundred steps."""

    def __init__(self) -> None:
        self.recent: list[float] = []

    def progress(self, progress: Progress) -> None:
        self.recent = [*self.recent[-99:], progress.loss]
        if progress.step % 100 == 0:
            mean = sum(self.recent) / len(self.recent)
            print(f"step {progress.step}: loss {mean:.4f}, {progress.seconds_per_step:.2f} s a step", flush=True)


def prepared(model: DemoTrainingModel, folder: Path, config: DeadiffConfig, seed: int, aligned: bool) -> Deadiff:
    """The DEADiff that training starts from: i_to from to_k and to_v, the content stream aligned with the text."""
    path = folder / "start.safetensors"
    if path.exists():
        return load_deadiff(path).requires_grad_(True).train()
    deadiff = new_deadiff(config, seed)
    start_from_host(deadiff, model.denoiser)
    if aligned:
        images = paired_images(model, held_out=False)
        error = align(deadiff, images.features, images.subject_prompts["context"], steps=ALIGNMENT, seed=seed)
        print(f"content tokens aligned with the text: {error:.4f} of {images.subject_prompts['context'].var():.4f}", flush=True)
    save_deadiff(deadiff, path, dtype=torch.float32)
    return deadiff.train()


def trained(
    model: DemoTrainingModel, folder: ReferenceFolder, config: DeadiffConfig, shares: Shares, style_steps: int, seed: int
) -> Deadiff:
    """A DEADiff trained on the 186 things that are not held out, going on where the folder's run was stopped.

    Args:
        style_steps: how many steps teach style; others come on top, by their share.
    """
    total = round(style_steps / (shares.style or shares.reconstruction))
    settings = TrainSettings(
        total, BATCH, learning_rate=1e-3, schedule="cosine", warmup=min(50, total - 1), seed=seed, checkpoint_every=100,
        caption_dropout=0.0, weight_decay=1e-2,
    )  # fmt: skip
    deadiff = prepared(model, folder.path, config, seed, aligned=shares.content > 0)
    task = ReferenceTask(model, paired_images(model, held_out=False, words=style_words()), settings, shares)
    train(deadiff, task, settings, run=folder, observer=Lines())  # type: ignore[arg-type]
    return deadiff.eval()


def run(args: argparse.Namespace) -> None:
    config, shares = VARIANTS[args.variant]
    folder = ReferenceFolder(args.work / args.name, {"deadiff_variant": args.variant, "license": "CC-BY-SA-4.0"})
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either way out leaves a checkpoint
    deadiff = trained(five_style_training(args.base), folder, config, shares, args.steps, args.seed)
    save_deadiff(deadiff, folder.path / "last.safetensors", folder.metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--name", default="whole", help="WORK/NAME is the run's folder")
    parser.add_argument("--variant", choices=VARIANTS, default="whole")
    parser.add_argument("--steps", type=int, default=STYLE_STEPS, help=f"steps that teach style (default {STYLE_STEPS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", type=Path, default=BASE_FILE)
    parser.add_argument(
        "--measure", action="store_true", help="print what a run has learned; --name base for the base told in words"
    )
    parser.add_argument("--export", action="store_true")
    args = parser.parse_args()
    if args.export:
        DEADIFF_FILE.parent.mkdir(exist_ok=True)
        deadiff = load_deadiff(args.work / args.name / "last.safetensors")
        deadiff.metadata["modelspec.description"] = (
            "The demo's DEADiff: style and content of a drawing, for the five-style model"
        )
        save_deadiff(deadiff, DEADIFF_FILE)
        print(f"{DEADIFF_FILE}: {DEADIFF_FILE.stat().st_size / 1e6:.1f} MB")
    elif args.measure:
        model = five_style_training(args.base)
        deadiff = None if args.name == "base" else load_deadiff(args.work / args.name / "last.safetensors")
        scores = {k: round(v, 3) for k, v in measure(model, deadiff, args.seed).items()}
        print(json.dumps({"name": args.name, "seed": args.seed, **scores}))
    else:
        args.work.mkdir(exist_ok=True)
        run(args)


if __name__ == "__main__":
    main()
