"""What an adapter costs per sampling step: a random-weight SD 1.5 U-Net with and without it, as ratios in one run.

    python benchmarks/step_overhead.py            # the table of benchmarks/README.md, about 25 minutes on 2 CPU cores
    python benchmarks/step_overhead.py --quick    # a tiny U-Net: only shows that it runs

Two times, because attention dominates a whole step and hides what the adapted layers do: the whole step, and the
adapted layers' own time, every layer replayed on the input it had in a frozen step. All variants take turns within a run;
a variant's time is its lower quartile. Peak memory comes from a fresh process per variant.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from styleinject_core import Adapter, AdapterConfig, attach
from styleinject_core.config import LayerConfig
from styleinject_core.functional import reference
from styleinject_core.functional.host import HostLayer
from styleinject_core.layers import LayerShape
from styleinject_core.methods import AdapterLayer
from styleinject_core.methods.kronecker import KroneckerConfig

QUERY_VALUE, WITH_CONVOLUTIONS = ("to_q", "to_v"), ("to_q", "to_v", "conv")
STYLEINJECT = AdapterConfig(r=32, n_styles=16, target_modules=QUERY_VALUE)
BY_TOKEN = AdapterConfig(r=32, n_styles=16, router_pool="paper", target_modules=QUERY_VALUE)
LORA = AdapterConfig(r=512, n_styles=1, sta="none", target_modules=QUERY_VALUE)
ALL = AdapterConfig(r=32, n_styles=16, target_modules=WITH_CONVOLUTIONS)
KRONECKER = KroneckerConfig((64, 4))  # the paper's layers: to_q, to_k, to_v, to_out.0


@dataclass(frozen=True)
class Variant:
    """A way to run the U-Net: `forward` makes one layer's forward by hand, None means `attach`; no config, no adapter."""

    label: str
    config: LayerConfig | None = None
    forward: Callable[[Any, AdapterLayer, Tensor], Tensor] | None = None


def naive(module: nn.Linear, layer: AdapterLayer, x: Tensor) -> Tensor:
    """The paper's equations as written."""
    host = HostLayer(layer.shape, partial(type(module).forward, module), module.weight, module.bias, module)
    return reference.forward(x, host, [layer.weights(lambda parameter: parameter, dma=1.0, sta=1.0)])


def lora(module: nn.Linear, layer: AdapterLayer, x: Tensor) -> Tensor:
    """LoRA beside the frozen layer, as trainers and unmerged inference run it."""
    low = nn.functional.linear(x, layer.A[0])
    return type(module).forward(module, x) + nn.functional.linear(low, layer.B)


VARIANTS = {
    "frozen": Variant("frozen model"),
    "naive": Variant("StyleInject, equations as written: to_q, to_v, r = 32, n = 16", STYLEINJECT, naive),
    "lora": Variant("LoRA, unmerged: to_q, to_v, r = 512", LORA, lora),
    "styleinject": Variant("**StyleInject**: to_q, to_v, r = 32, n = 16", STYLEINJECT),
    "by_token": Variant("**StyleInject**, routed by token: the same layers", BY_TOKEN),
    "kronecker": Variant("**DiffuseKronA**: to_q, to_k, to_v, to_out.0, factors 64, 4", KRONECKER),
    "all": Variant("**StyleInject**: the same and all convolutions", ALL),
}


def build_unet(quick: bool, device: str) -> UNet2DConditionModel:
    """SD 1.5's U-Net with random weights, frozen; --quick has the same blocks with few channels."""
    torch.manual_seed(0)
    channels = (32, 64, 64, 64) if quick else (320, 640, 1280, 1280)
    unet = UNet2DConditionModel(
        block_out_channels=channels, layers_per_block=2, attention_head_dim=8, cross_attention_dim=768, norm_num_groups=32
    )
    return unet.eval().requires_grad_(False).to(device)


def build_adapter(unet: nn.Module, config: LayerConfig, device: str) -> Adapter:
    """An adapter whose every parameter is away from its initial value, so that no work can be left out."""
    adapter = Adapter.create(unet, config).requires_grad_(False)
    for layer in adapter.layers.values():
        for part, parameter in layer.tensors().items():
            if part != "A":
                parameter.normal_(0, 0.02)
    return adapter.to(device)


def build_inputs(size: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of two images, the timestep, 77 tokens for each."""
    return (
        torch.randn(2, 4, size, size, device=device),
        torch.tensor(500, device=device),
        torch.randn(2, 77, 768, device=device),
    )


@contextmanager
def applied(variant: Variant, unet: nn.Module, adapter: Adapter | None) -> Iterator[None]:
    """The U-Net as the variant runs it."""
    if adapter is None:
        yield
    elif variant.forward is None:
        with attach(unet, adapter):
            yield
    else:
        modules = {unet.get_submodule(name): layer for name, layer in adapter.layers.items()}
        for module, layer in modules.items():
            module.forward = partial(variant.forward, module, layer)
        try:
            yield
        finally:
            for module in modules:
                del module.forward


class Clock:
    """Collects times by key, and tells their lower quartiles."""

    def __init__(self, device: str):
        self.times: dict[tuple[str, ...], list[float]] = defaultdict(list)
        self._wait = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)

    def time(self, key: tuple[str, ...], call: Callable[[], object]) -> None:
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        self.times[key].append(time.perf_counter() - start)

    def quartile(self, *key: str) -> float:
        times = sorted(self.times[key])
        return times[(len(times) - 1) // 4]


def rotated(items: list[str], by: int) -> list[str]:
    """The same items, beginning further on: over the runs every variant has every place in the order."""
    by %= len(items)
    return items[by:] + items[:by]


def time_steps(unet: nn.Module, inputs: tuple[Tensor, ...], adapters: dict[str, Adapter], runs: int, device: str) -> Clock:
    """Whole steps, under (variant,). One untimed run first."""
    clock, warm_up = Clock(device), Clock(device)
    for run in range(-1, runs):
        for key in rotated(["frozen", *adapters], run):
            with applied(VARIANTS[key], unet, adapters.get(key)):
                (warm_up if run < 0 else clock).time((key,), partial(unet, *inputs))
        progress("whole steps", run + 1, runs)
    return clock


def record(unet: nn.Module, inputs: tuple[Tensor, ...], names: list[str]) -> dict[str, Tensor]:
    """The input of every named layer in one frozen step."""
    seen: dict[str, Tensor] = {}
    hooks = [
        unet.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name in names
    ]
    unet(*inputs)
    for hook in hooks:
        hook.remove()
    return seen


def time_layers(unet: nn.Module, inputs: tuple[Tensor, ...], adapters: dict[str, Adapter], runs: int, device: str) -> Clock:
    """Every adapted layer's call, under (variant, layer): sweeps over the U-Net in which the variants take turns at each
    layer, so that weights are as cold as in a step and a disturbance hits all of them alike. One untimed sweep first."""
    clock, warm_up = Clock(device), Clock(device)
    recorded = record(unet, inputs, list(dict.fromkeys(name for adapter in adapters.values() for name in adapter.layers)))
    for run in range(-1, runs):
        for index, (name, x) in enumerate(recorded.items()):
            module = unet.get_submodule(name)
            present = ["frozen", *(key for key, adapter in adapters.items() if name in adapter.layers)]
            for key in rotated(present, run + index):
                only = Adapter({"": adapters[key].layers[name]}, adapters[key].config) if key in adapters else None
                with applied(VARIANTS[key], module, only):
                    (warm_up if run < 0 else clock).time((key, name), partial(module, x))
        progress("layers", run + 1, runs)
    return clock


def measure_memory(key: str, size: int, quick: bool, device: str) -> dict[str, float]:
    """MiB of the adapter, and the peak of a process that has done one step with nothing else."""
    unet, inputs = build_unet(quick, device), build_inputs(size, device)
    config = VARIANTS[key].config
    adapter = None if config is None else build_adapter(unet, config, device)
    with torch.inference_mode(), applied(VARIANTS[key], unet, adapter):
        unet(*inputs)
    if device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {"peak": peak, "weights": 0 if adapter is None else adapter.parameter_count() * 4 / 2**20}


def memory_in_fresh_process(key: str, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--memory-of", key, "--size", str(arguments.size), "--device", arguments.device]
    result = subprocess.run(command + ["--quick"] * arguments.quick, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def progress(what: str, done: int, of: int) -> None:
    print(f"{what}: {done} of {of}", file=sys.stderr, flush=True)


def table(steps: Clock, layers: Clock, adapters: dict[str, Adapter], memory: dict[str, dict[str, float]]) -> str:
    """The results in Markdown. A variant's own time is relative to the same layers frozen."""
    lines = [
        "| | whole step | adapted layers | peak memory | of it weights |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for key in ("frozen", *adapters):
        variant = VARIANTS[key]
        whole = steps.quartile(key) / steps.quartile("frozen")
        own = 1.0
        if key in adapters:
            names = list(adapters[key].layers)
            own = sum(layers.quartile(key, n) for n in names) / sum(layers.quartile("frozen", n) for n in names)
        extra = memory[key]["peak"] - memory["frozen"]["peak"]
        cells = [variant.label, f"{whole:.2f}", f"{own:.2f}", f"{extra:+,.0f} MiB", f"{memory[key]['weights']:,.0f} MiB"]
        if key == "frozen":
            cells[3] = f"{memory[key]['peak']:,.0f} MiB"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_kind(layers: Clock, adapters: dict[str, Adapter]) -> str:
    """The last variant by layer shape, dearest first: the frozen layers in milliseconds, and the ratio to them."""
    groups: dict[LayerShape, list[str]] = defaultdict(list)
    last = list(adapters)[-1]
    for name, layer in adapters[last].layers.items():
        groups[layer.shape].append(name)
    rows = []
    for shape, names in groups.items():
        frozen, adapted = (1e3 * sum(layers.quartile(key, n) for n in names) for key in ("frozen", last))
        rows.append((frozen, f"{shape!s:24} x{len(names):<3} {frozen:9.1f} ms  {adapted / frozen:6.2f}"))
    return "\n".join(line for _, line in sorted(rows, reverse=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, help="side of the latents (default 64; 16 with --quick)")
    parser.add_argument("--runs", type=int, help="interleaved runs over the layers (default 15; 2 with --quick)")
    parser.add_argument("--step-runs", type=int, help="interleaved runs of whole steps (default 7; 2 with --quick)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny U-Net, for a smoke test")
    parser.add_argument("--rows", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="and the frozen model")
    parser.add_argument("--by-kind", action="store_true", help="also print each layer shape's share of the last row")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for option, default, quick in (("size", 64, 16), ("runs", 15, 2), ("step_runs", 7, 2)):
        if getattr(arguments, option) is None:
            setattr(arguments, option, quick if arguments.quick else default)
    size, device = arguments.size, arguments.device
    if arguments.memory_of:
        print(json.dumps(measure_memory(arguments.memory_of, size, arguments.quick, device)))
        return

    rows = [key for key in VARIANTS if key == "frozen" or key in arguments.rows]
    memory = {}
    for done, key in enumerate(rows, 1):
        memory[key] = memory_in_fresh_process(key, arguments)
        progress("memory", done, len(rows))
    unet, inputs = build_unet(arguments.quick, device), build_inputs(size, device)
    adapters = {key: build_adapter(unet, config, device) for key in rows if (config := VARIANTS[key].config) is not None}
    with torch.inference_mode():
        layers = time_layers(unet, inputs, adapters, arguments.runs, device)
        steps = time_steps(unet, inputs, adapters, arguments.step_runs, device)
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    print(f"\n{where}, {platform.machine()}, torch {torch.__version__}, float32, 2 images, latents {size}x{size}")
    print(f"frozen step {steps.quartile('frozen'):.2f} s; runs: {arguments.runs} of layers, {arguments.step_runs} of steps\n")
    print(table(steps, layers, adapters, memory))
    if arguments.by_kind:
        print("\n" + by_kind(layers, adapters))


if __name__ == "__main__":
    main()
