"""What a reference image (DEADiff) costs per sampling step: an SD 1.5 U-Net with random weights, bare and with tokens.

    python benchmarks/reference_step.py            # the table of benchmarks/README.md, 10 minutes on 2 CPU cores
    python benchmarks/reference_step.py --quick    # a tiny U-Net and tiny latents: only shows that it runs

Variants take turns within a run; a time is the lower quartile of its runs, and only ratios to the bare model are reported.
On a CPU it is CPU time, which other programs disturb less than the clock on the wall.
The constants are what stays in memory while sampling; Q-Formers and vision encoder are not needed then.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from step_overhead import Clock, build_inputs, build_unet, progress, rotated
from torch import nn

from styleinject_core.deadiff import SD15, Deadiff, DeadiffConfig, Reference, Tokens, referenced, side_by_side

NARROW = tuple((name, 32 if width == 320 else 64) for name, width in SD15.layers)


class WorkClock(Clock):
    """A Clock that measures the processor's time where the device is the CPU."""

    def __init__(self, device: str):
        super().__init__(device)
        self._now = time.process_time if device == "cpu" else time.perf_counter

    def time(self, key: tuple[str, ...], call: Callable[[], object]) -> None:
        self._wait()
        start = self._now()
        call()
        self._wait()
        self.times[key].append(self._now() - start)


def random_deadiff(config: DeadiffConfig) -> Deadiff:
    """Only i_to_k and i_to_v have values: nothing else takes part in a step. The Q-Formers stay on the meta device."""
    model = Deadiff(config, device="meta")
    model.to_kv = nn.ModuleList(
        nn.ParameterDict({p: nn.Parameter(torch.randn(width, config.width) * 0.02) for p in ("i_to_k", "i_to_v")})
        for _, width in config.layers
    )
    return model.requires_grad_(False)


def variants(model: Deadiff) -> dict[str, Reference | None]:
    """What is measured, by its label."""

    def tokens(stream: str, seed: int) -> Tokens:
        generator = torch.Generator().manual_seed(seed)
        return Tokens(torch.randn(1, model.config.queries, model.config.width, generator=generator), stream)

    two = side_by_side([tokens("style", 0), tokens("style", 1)])
    return {
        "bare model": None,
        "**style** from one image": Reference(model, tokens("style", 0)),
        "**style and content**": Reference(model, tokens("style", 0), tokens("content", 1)),
        "two style references side by side": Reference(model, two),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, help="side of the latents (default 64; 16 with --quick)")
    parser.add_argument("--runs", type=int, help="interleaved runs (default 9; 2 with --quick)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny U-Net, for a smoke test")
    arguments = parser.parse_args()
    size, runs = arguments.size or (16 if arguments.quick else 64), arguments.runs or (2 if arguments.quick else 9)
    unet, inputs = build_unet(arguments.quick, arguments.device), build_inputs(size, arguments.device)
    model = random_deadiff(replace(SD15, layers=NARROW) if arguments.quick else SD15)
    rows = variants(model)
    clock, warm_up = WorkClock(arguments.device), WorkClock(arguments.device)
    with torch.inference_mode():
        for run in range(-1, runs):
            for label in rotated(list(rows), run):
                reference = rows[label]
                held: AbstractContextManager = nullcontext() if reference is None else referenced(unet, reference)
                with held:
                    (warm_up if run < 0 else clock).time((label,), partial(unet, *inputs))
            progress("steps", run + 1, runs)
    bare = clock.quartile("bare model")
    where = arguments.device if arguments.device != "cpu" else f"{torch.get_num_threads()} CPU threads"
    print(f"\n{where}, {platform.machine()}, torch {torch.__version__}, float32, 2 images, latents {size}x{size}, {runs} runs")
    print(f"bare step {bare:.2f} s\n\n| | whole step | constants |\n| --- | ---: | ---: |")
    for label, reference in rows.items():
        kept = 0 if reference is None else sum(r.nbytes() for r in reference.rows().values()) / 2**20
        print(f"| {label} | {clock.quartile(label) / bare:.3f} | {kept:.1f} MiB |")


if __name__ == "__main__":
    main()
