"""What recording the style router costs: SD 1.5's U-Net with random weights, steps with and without a recorder in turns.

    python benchmarks/router_recording.py           # about five minutes on 2 CPU cores, 8 GB of memory
    python benchmarks/router_recording.py --quick   # a tiny U-Net: only shows that it runs

Two ratios to a step of the adapted model without recording: the whole step (lower quartiles; noisy on a busy machine), and
the time spent in the recorder's own calls, added up within each recorded step (on a CPU exact; on a GPU this is the time
to start the work, which is what may hold up a step).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from step_overhead import ALL, STYLEINJECT, Clock, build_adapter, build_inputs, build_unet, progress

from styleinject_core import attach
from styleinject_core.router.recorder import Call, Recorder


class OwnTime:
    """Adds up the time spent in some methods while it is active."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="side of the latents (default 64)")
    parser.add_argument("--runs", type=int, default=5, help="steps of each kind (default 5)")
    parser.add_argument("--every", type=int, default=1, help="measure a layer's increments in every n-th step (default 1)")
    parser.add_argument("--convolutions", action="store_true", help="adapt all convolutions too, not only to_q and to_v")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny U-Net, for a smoke test")
    options = parser.parse_args()
    size = 16 if options.quick else options.size
    unet, inputs = build_unet(options.quick, options.device), build_inputs(size, options.device)
    adapter = build_adapter(unet, ALL if options.convolutions else STYLEINJECT, options.device)
    own, clock = OwnTime(), Clock(options.device)
    Call.hear, Call.look, Recorder.begin, Recorder.end = map(own.wrap, (Call.hear, Call.look, Recorder.begin, Recorder.end))
    recorder = Recorder(adapter, adapter.style_names, every=options.every)
    with torch.inference_mode(), attach(unet, adapter) as attachment:
        unet(*inputs)
        for run in range(options.runs):
            clock.time(("plain",), lambda: unet(*inputs))
            with recorder.call(attachment.sites[0], ("positive", "negative"), 1.0):
                clock.time(("recorded",), lambda: unet(*inputs))
            progress("steps", run + 1, options.runs)
        start = time.perf_counter()
        recorder.trace()
        finishing = time.perf_counter() - start
    plain, recorded = clock.quartile("plain"), clock.quartile("recorded")
    threads = torch.get_num_threads()
    print(f"{len(adapter.names)} layers, {options.device}, {threads} threads, torch {torch.__version__}, 2 images")
    print(f"step without recording {plain:.2f} s, with {recorded / plain:.3f} of it")
    print(f"the recorder's own time {own.seconds / options.runs / plain:.2%} of a step")
    print(f"bringing {options.runs} steps together afterwards: {finishing / options.runs / plain:.2%} of a step each")


if __name__ == "__main__":
    main()
