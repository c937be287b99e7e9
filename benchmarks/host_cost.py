"""What an adapted layer costs the host: kernels launched, and the time Python takes to launch them, as ratios in one run.

    python benchmarks/host_cost.py              # the table of benchmarks/README.md; about two minutes on two cores
    python benchmarks/host_cost.py --quick      # only shows that it runs
    COMFYUI_PATH=~/ComfyUI python benchmarks/host_cost.py   # inside ComfyUI as well: a narrow, full-depth SD 1.5

A GPU that waits for the host feels only these two. They are measured on layers and on a U-Net so small that arithmetic
costs little, in CPU time of one thread; the adapted and the bare take turns within a run, and a time is its lower quartile.
Launches are counted in float16 by a dispatch mode below autograd: every operation but views and allocations.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from styleinject_core import Adapter, AdapterConfig, attach

_NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "lift_fresh", "_reshape_alias")


class Launches(TorchDispatchMode):
    """Counts operations that launch a kernel: all but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _NO_KERNEL:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def launches(call: Callable[[], Any]) -> list[str]:
    """The kernels that a call launches, in order."""
    with torch.no_grad():
        call()  # what is prepared once is prepared
        with Launches() as counted:
            call()
    return counted.names


def random_adapter(host: nn.Module, seed: int = 0, **config: Any) -> Adapter:
    """An adapter every parameter of which is away from its initial value, so that no work can be left out."""
    torch.manual_seed(seed)
    adapter = Adapter.create(host, AdapterConfig(**{"r": 4, "n_styles": 16, "target_modules": ("all",), **config}), f"a{seed}")
    for parameter in adapter.parameters():
        parameter.data.copy_(torch.randn_like(parameter) * 0.02)
    return adapter.requires_grad_(False)


FOLDED = "Linear, fold"
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    FOLDED: (nn.Linear(32, 32), (2, 64, 32)),
    "Linear, stack": (nn.Linear(32, 32), (2, 8, 32)),
    "3x3 convolution, fold": (nn.Conv2d(8, 8, 3, padding=1), (2, 8, 8, 8)),
}


def count(layer: str, adapters: int) -> list[str]:
    """The kernels of one adapted layer in float16."""
    module, shape = LAYERS[layer]
    host = nn.ModuleDict({"layer": module.__class__(*_sizes(module))}).half()
    x = torch.randn(shape).half()
    stack = [random_adapter(host, seed).half() for seed in range(adapters)]
    with attach(host, stack):
        return launches(lambda: host["layer"](x))


def _sizes(module: nn.Module) -> tuple[Any, ...]:
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding
    return module.in_features, module.out_features


def interleaved(calls: dict[str, Callable[[], Any]], runs: int, repeats: int) -> dict[str, float]:
    """CPU seconds a call takes, lower quartile of `runs` turns of `repeats` calls; each turn begins with the next one."""
    times: dict[str, list[float]] = {key: [] for key in calls}
    order = list(calls.items())
    for run in range(runs):
        first = run % len(order)
        for key, call in order[first:] + order[:first]:
            start = time.process_time()
            for _ in range(repeats):
                call()
            times[key].append((time.process_time() - start) / repeats)
    return {key: sorted(values)[len(values) // 4] for key, values in times.items()}


def straight_line(linear: nn.Linear, adapters: int = 1, n: int = 16, r: int = 4) -> Callable[[torch.Tensor], torch.Tensor]:
    """The fewest torch calls that make adapters' folded Linear, one after the other, and nothing that chooses or checks."""
    W, b, (d, k) = linear.weight.detach(), linear.bias, linear.weight.shape
    b, styles = W.new_zeros(d) if b is None else b.detach(), adapters * n
    router, router_bias, hyper, hyper_bias = (torch.randn(shape) * 0.02 for shape in ((k, styles), styles, (styles, d), d))
    A, B = torch.randn(adapters, n, r * k) * 0.02, torch.randn(d, adapters * r) * 0.02

    def forward(x: torch.Tensor) -> torch.Tensor:
        batch, share, total = x.shape[0], 1 / x.shape[1], x.sum(1)
        logits = torch.addmm(router_bias, total, router, alpha=share)
        s = torch.softmax(logits.view(batch, adapters, n), -1)
        gain = torch.addmm(hyper_bias, s.view(batch, styles), hyper)
        if adapters == 1:
            down = torch.mm(s.view(batch, n), A[0])
        else:
            down = s.new_empty(batch, adapters, r * k)
            torch.bmm(s.transpose(0, 1), A, out=down.transpose(0, 1))
        bias = torch.addcmul(b, gain, torch.mm(total, W.mT), value=-share)
        weight = torch.addcmul(W, W, gain.unsqueeze(2)).baddbmm_(B.expand(batch, -1, -1), down.view(batch, adapters * r, k))
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)

    return forward


def straight_convolution(conv: nn.Conv2d, n: int = 16, r: int = 4) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same for one adapter beside a convolution, as few positions have it."""
    d, k = conv.weight.shape[:2]
    kernel, stride, padding = conv.weight.shape[2:], conv.stride, conv.padding
    router, router_bias, hyper, hyper_bias = (torch.randn(shape) * 0.02 for shape in ((k, n), n, (n, d), d))
    A, B = torch.randn(n, r * k * kernel[0] * kernel[1]) * 0.02, torch.randn(d, r) * 0.02
    frozen, pointwise = type(conv).forward.__get__(conv), tuple(kernel) == (1, 1)

    def forward(x: torch.Tensor) -> torch.Tensor:
        batch = x.shape[0]
        s = torch.softmax(torch.addmm(router_bias, x.sum((2, 3)), router, alpha=1 / (x.shape[2] * x.shape[3])), 1)
        gain, down = torch.addmm(hyper_bias, s, hyper)[:, :, None, None], torch.mm(s, A)
        h = frozen(x)
        out = torch.addcmul(h, gain, torch.sub(h, h.sum((2, 3), keepdim=True), alpha=1 / (h.shape[2] * h.shape[3])))
        if pointwise:
            low = torch.bmm(down.view(batch, r, k), x.flatten(2))
        else:
            images, kernels = x.reshape(1, -1, *x.shape[2:]), down.view(batch * r, k, *kernel)
            low = torch.conv2d(images, kernels, None, stride, padding, 1, batch).view(batch, r, -1)
        return out.flatten(2).baddbmm_(B.expand(batch, -1, -1), low).view_as(out)

    return forward


COUNTS = (0, 1, 4)


def layer_calls() -> dict[str, Callable[[], Any]]:
    """Each tiny layer bare, with one adapter and with four, and the torch calls alone of a folded Linear."""
    calls: dict[str, Callable[[], Any]] = {}
    for layer, (module, shape) in LAYERS.items():
        for adapters in COUNTS:
            torch.manual_seed(0)
            host = nn.ModuleDict({"layer": module.__class__(*_sizes(module))}).requires_grad_(False)
            if adapters:
                attach(host, [random_adapter(host, seed) for seed in range(adapters)])
            x = torch.randn(shape)
            calls[f"{layer}: {adapters}"] = lambda module=host["layer"], x=x: module(x)
    linear, shape = LAYERS[FOLDED]
    x = torch.randn(shape)
    for adapters in COUNTS[1:]:
        line = straight_line(linear, adapters)
        calls[f"alone: {adapters}"] = lambda line=line, x=x: line(x)
    return calls


def comfyui_calls(root: Path, runs: int) -> dict[str, Callable[[], Any]]:
    """A sampling run of two steps in ComfyUI at `root`: SD 1.5's U-Net at full depth, 32 channels wide, on 8x8 latents."""
    here = Path(__file__).parents[1]
    sys.path[:0] = [str(root), str(here / "tests")]
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import random_adapters
    import tiny_model
    from pack_loader import load_pack

    pack = load_pack(here)
    depth = {"transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1] * 9 + [0] * 3}
    model = tiny_model.build_tiny_model(num_res_blocks=[2] * 4, channel_mult=[1, 2, 4, 4], **depth)
    apply = pack.submodule("integration.patcher").apply_adapter

    def patched(count: int, *targets: str) -> Any:
        out = model
        for seed in range(count):
            adapter = random_adapters.random_adapter(pack, model, *targets, name=f"a{seed}", seed=seed, n_styles=16)
            out = apply(out, adapter, strength=0.5)[0]
        return out

    models = {
        "bare": model,
        "1 adapter": patched(1),
        "4 adapters": patched(4),
        "1 adapter, with all convolutions": patched(1, "to_q", "to_v", "conv"),
        "a reference image (DEADiff)": with_reference(pack, model),
    }
    layers = {name: module for name, module in model.model.diffusion_model.named_modules() if name.endswith(("to_q", "to_v"))}
    convolutions = [module for module in model.model.diffusion_model.modules() if isinstance(module, nn.Conv2d)]

    def alone(adapters: int, *others: Any) -> Callable[[], None]:
        modules = [*layers.values(), *others]
        lines = [*(straight_line(m, adapters) for m in layers.values()), *(straight_convolution(m) for m in others)]

        def run() -> None:
            try:
                for module, forward in zip(modules, lines, strict=True):
                    module.forward = forward
                tiny_model.sample(model, steps=runs)
            finally:
                for module in modules:
                    del module.forward

        return run

    calls: dict[str, Callable[[], Any]] = {key: lambda m=m: tiny_model.sample(m, steps=runs) for key, m in models.items()}
    return {
        **calls,
        "torch calls alone, 1 adapter": alone(1),
        "torch calls alone, 4 adapters": alone(4),
        "torch calls alone, 1 adapter, with all convolutions": alone(1, *convolutions),
    }


def with_reference(pack: Any, model: Any) -> Any:
    """The narrow MODEL with style and content tokens of a reference in its 16 cross-attentions."""
    import deadiff_models

    core, widths = pack.submodule("styleinject_core.deadiff"), {320: 32, 640: 64, 1280: 128}
    layers = tuple((name, widths[width]) for name, width in core.SD15.layers)
    content = core.SD15.content_layers
    deadiff = deadiff_models.random_model(
        core, deadiff_models.tiny_config(core, layers=layers, content_layers=content, queries=16)
    )
    tokens = [core.Tokens(torch.randn(1, 16, 24), stream, deadiff.stream_id(stream)) for stream in core.STREAMS]
    applied = pack.submodule("integration.reference").AppliedReference(core.Reference(deadiff, *tokens))
    return pack.submodule("integration.patcher").apply_reference(model, applied)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few runs: only shows that it works")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("| launches per adapted layer, float16 | bare | 1 adapter | 4 adapters |\n| --- | ---: | ---: | ---: |")
    for layer in LAYERS:
        print(f"| {layer} | 1 | {len(count(layer, 1))} | {len(count(layer, 4))} |")
    for label, mode in (("no_grad", torch.no_grad()), ("inference_mode, as in ComfyUI", torch.inference_mode())):
        with mode:
            times = interleaved(layer_calls(), *((3, 20) if options.quick else (40, 150)))
        print(f"\n| core, {label} | bare, µs | 1 adapter | 4 adapters |\n| --- | ---: | ---: | ---: |")
        for row in (*LAYERS, "alone"):
            bare = times[f"{FOLDED if row == 'alone' else row}: 0"]
            one, four = (f"{times[f'{row}: {adapters}'] / bare:.2f}" for adapters in COUNTS[1:])
            print(f"| {f'{FOLDED}, torch calls alone' if row == 'alone' else row} | {bare * 1e6:.1f} | {one} | {four} |")
    root = Path(os.environ.get("COMFYUI_PATH", "~/ComfyUI")).expanduser()
    if not (root / "main.py").is_file():
        print(f"\nno ComfyUI at {root}: the steps inside ComfyUI were not measured")
        return
    with torch.inference_mode():
        times = interleaved(comfyui_calls(root, 2), *((2, 1) if options.quick else (25, 1)))
    print("\n| ComfyUI, a step of the narrow U-Net | ms | ratio |\n| --- | ---: | ---: |")
    for key, seconds in times.items():
        print(f"| {key} | {seconds / 2 * 1e3:.0f} | {seconds / times['bare']:.2f} |")


if __name__ == "__main__":
    main()
