"""What a training step costs: StyleInject and DiffuseKronA beside PEFT's LoRA, and StyleInject beside its own equations as
written, as ratios in one run.

    python benchmarks/train_step.py                      # the table of benchmarks/README.md; needs diffusers and peft
    python benchmarks/train_step.py --device cuda --dtype bfloat16 --size 64 --batch 8
    python benchmarks/train_step.py --rows lora_four kronecker
    python benchmarks/train_step.py --quick              # a tiny U-Net: only shows that it runs

A step is forward, backward and AdamW on the adapter's parameters, on SD 1.5's U-Net with random weights; every method
has its own module tree over the same frozen tensors. Two times: the whole step, and forward and backward of the adapted
layers alone, each replayed on the input it had in a step. The methods take turns within a run; a method's time is its lower
quartile. Two memories: what autograd keeps for the backward pass beyond what the frozen U-Net makes it keep, counted
tensor by tensor, and the peak of a fresh process per method (its resident set on a CPU, the allocator's count on a GPU).
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import peft
import torch
from diffusers import UNet2DConditionModel
from step_overhead import BY_TOKEN, KRONECKER, STYLEINJECT, Clock, build_adapter, build_unet, naive, progress, rotated
from torch import Tensor, nn

from styleinject_core import attach
from styleinject_core.config import LayerConfig


@dataclass(frozen=True)
class Method:
    """A way to adapt the U-Net: PEFT's LoRA where `rank` is given, else an adapter; `naive` as the paper writes it.

    `beside` is the row that it is measured against: a LoRA on the same layers.
    """

    label: str
    rank: int | None = None
    config: LayerConfig = STYLEINJECT
    naive: bool = False
    beside: str = "lora"

    @property
    def targets(self) -> tuple[str, ...]:
        return self.config.target_modules


METHODS = {
    "lora": Method("PEFT LoRA, r = 512", rank=512),
    "lora_equal": Method("PEFT LoRA, r = 288: StyleInject's number of parameters", rank=288),
    "naive": Method("StyleInject, equations as written: r = 32, n = 16", naive=True),
    "styleinject": Method("**StyleInject**: r = 32, n = 16"),
    "by_token": Method("**StyleInject**, routed by token: r = 32, n = 16", config=BY_TOKEN),
    "lora_four": Method("PEFT LoRA, r = 4: to_q, to_k, to_v, to_out.0", rank=4, config=KRONECKER, beside="lora_four"),
    "kronecker": Method("**DiffuseKronA**, factors 64, 4: the same layers", config=KRONECKER, beside="lora_four"),
}


@dataclass(frozen=True)
class Setting:
    """What is the same for all methods. In bfloat16 the frozen weights are, adapters stay float32, under autocast."""

    quick: bool
    device: str
    dtype: torch.dtype
    size: int
    batch: int

    def base(self) -> UNet2DConditionModel:
        return nn.Module.to(build_unet(self.quick, self.device), self.dtype)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, a timestep for each image, 77 tokens for each image."""
        torch.manual_seed(1)
        return (
            torch.randn(self.batch, 4, self.size, self.size, device=self.device, dtype=self.dtype),
            torch.randint(0, 1000, (self.batch,), device=self.device),
            torch.randn(self.batch, 77, 768, device=self.device, dtype=self.dtype),
        )

    def autocast(self) -> torch.autocast:
        low = self.dtype == torch.bfloat16
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=low)


def loss_of(unet: nn.Module, inputs: tuple[Tensor, ...], setting: Setting) -> Tensor:
    """The error of the prediction, with the latents for a target: any will do."""
    with setting.autocast():
        prediction = unet(*inputs).sample
    return (prediction.float() - inputs[0].float()).square().mean()


class Trainee:
    """The U-Net as one method trains it: own modules, the frozen tensors shared with every other trainee.

    Every adapter parameter is away from its initial value, so that no work can be left out.
    """

    def __init__(self, key: str, base: UNet2DConditionModel, setting: Setting):
        method = METHODS[key]
        self.setting, self.targets = setting, method.targets
        self.unet = copy.deepcopy(base, {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]})
        torch.manual_seed(0)  # the two ways to train StyleInject get the same adapter
        if method.rank is not None:
            config = peft.LoraConfig(r=method.rank, lora_alpha=method.rank, target_modules=list(method.targets))
            peft.inject_adapter_in_model(config, self.unet)
            self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
            for name, parameter in self.unet.named_parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
                    if "lora_B" in name:
                        nn.init.normal_(parameter, 0, 0.02)
        else:
            adapter = build_adapter(self.unet, method.config, setting.device).requires_grad_(True)
            self.parameters = list(adapter.parameters())
            if method.naive:
                for name, layer in adapter.layers.items():
                    module = self.unet.get_submodule(name)
                    module.forward = partial(naive, module, layer)
            else:
                attach(self.unet, adapter)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6)

    def loss(self, inputs: tuple[Tensor, ...]) -> Tensor:
        return loss_of(self.unet, inputs, self.setting)

    def step(self, inputs: tuple[Tensor, ...]) -> None:
        self.loss(inputs).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def replay(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Forward and backward of one adapted layer."""
        with self.setting.autocast():
            out = self.unet.get_submodule(name)(x)
        out.backward(gradient.to(out.dtype))


def time_steps(trainees: dict[str, Trainee], inputs: tuple[Tensor, ...], runs: int, device: str) -> Clock:
    """Whole steps, under (method,). One untimed run first: it also makes the optimizer's state."""
    clock, warm_up = Clock(device), Clock(device)
    for run in range(-1, runs):
        for key in rotated(list(trainees), run):
            (warm_up if run < 0 else clock).time((key,), partial(trainees[key].step, inputs))
        progress("whole steps", run + 1, runs)
    return clock


def record(trainee: Trainee, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The input of every adapted layer in one training step, a leaf that wants a gradient where it did there."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[name] = args[0].detach().requires_grad_(args[0].requires_grad)

    hooks = [
        module.register_forward_pre_hook(partial(keep, name))
        for name, module in trainee.unet.named_modules()
        if name.endswith(trainee.targets)
    ]
    trainee.loss(inputs)
    for hook in hooks:
        hook.remove()
    return seen


def time_layers(trainees: dict[str, Trainee], inputs: tuple[Tensor, ...], runs: int, device: str) -> Clock:
    """Every adapted layer's forward and backward, under (method, layer); the methods take turns at each layer, so that a
    disturbance hits all of them alike. One untimed sweep first."""
    clock, warm_up = Clock(device), Clock(device)
    groups = {
        METHODS[key].beside: [other for other in trainees if METHODS[other].beside == METHODS[key].beside] for key in trainees
    }
    recorded = [(name, x, groups[beside]) for beside in groups for name, x in record(trainees[beside], inputs).items()]
    for run in range(-1, runs):
        for index, (name, x, keys) in enumerate(recorded):
            width = trainees[keys[0]].unet.get_submodule(name).out_features
            gradient = torch.randn(*x.shape[:-1], width, device=device)
            for key in rotated(keys, run + index):
                (warm_up if run < 0 else clock).time((key, name), partial(trainees[key].replay, name, x, gradient))
                x.grad = None
                trainees[key].optimizer.zero_grad(set_to_none=True)
        progress("layers", run + 1, runs)
    return clock


def kept_for_backward(forward: Callable[[], Tensor], known: list[Tensor]) -> float:
    """MiB of the storages that autograd holds between forward and backward, each counted once, without those of `known`."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in known}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output kept with its own history would keep itself alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    del loss  # until here nothing of it is freed, so no address is used twice
    return sum(held.values()) / 2**20


def measure_kept(base: UNet2DConditionModel, trainees: dict[str, Trainee], inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """By method, MiB kept for the backward pass beyond those of the frozen U-Net, whose own are under "frozen".

    The latents want a gradient here: else the frozen U-Net would keep nothing.
    """
    inputs = (inputs[0].detach().requires_grad_(), *inputs[1:])
    known = [*base.parameters(), *base.buffers(), *inputs]
    setting = next(iter(trainees.values())).setting
    kept = {"frozen": kept_for_backward(lambda: loss_of(base, inputs, setting), known)}
    for key, trainee in trainees.items():
        kept[key] = kept_for_backward(partial(trainee.loss, inputs), known + trainee.parameters) - kept["frozen"]
    return kept


def measure_peak(key: str, setting: Setting) -> float:
    """MiB at the peak of a process that has done two steps with one method and nothing else."""
    trainee, inputs = Trainee(key, setting.base(), setting), setting.inputs()
    for _ in range(2):  # the second has the optimizer's state
        trainee.step(inputs)
    if setting.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def peak_in_fresh_process(key: str, options: list[str]) -> float:
    command = [sys.executable, __file__, *options, "--memory-of", key]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def table(steps: Clock, layers: Clock, trainees: dict[str, Trainee], kept: dict[str, float], peaks: dict[str, float]) -> str:
    """The results in Markdown; times and the peak relative to LoRA on the same layers."""
    own = {key: sum(layers.quartile(*timed) for timed in layers.times if timed[0] == key) for key in trainees}
    lines = [
        "| | trained parameters | whole step | adapted layers | kept for backward | peak memory | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for key, trainee in trainees.items():
        beside = METHODS[key].beside
        cells = [
            METHODS[key].label,
            f"{sum(p.numel() for p in trainee.parameters):,}",
            f"{steps.quartile(key) / steps.quartile(beside):.2f}",
            f"{own[key] / own[beside]:.2f}",
            f"+{kept[key]:,.1f} MiB",
            f"{peaks[key]:,.0f} MiB",
            f"{peaks[key] / peaks[beside]:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(options: list[str] | None = None) -> None:
    """Run the benchmark; `options` are sys.argv's where not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, help="side of the latents (default 32; 16 with --quick)")
    parser.add_argument("--batch", type=int, default=2, help="images per step")
    parser.add_argument("--runs", type=int, help="interleaved runs over the layers (default 9; 2 with --quick)")
    parser.add_argument("--step-runs", type=int, help="interleaved runs of whole steps (default 5; 2 with --quick)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the frozen model")
    parser.add_argument("--quick", action="store_true", help="a tiny U-Net, for a smoke test")
    parser.add_argument(
        "--rows", nargs="+", choices=METHODS, default=list(METHODS), help="only these, and what they are beside"
    )
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    options = sys.argv[1:] if options is None else options
    arguments = parser.parse_args(options)
    for option, default, quick in (("size", 32, 16), ("runs", 9, 2), ("step_runs", 5, 2)):
        if getattr(arguments, option) is None:
            setattr(arguments, option, quick if arguments.quick else default)
    device = arguments.device
    setting = Setting(arguments.quick, device, getattr(torch, arguments.dtype), arguments.size, arguments.batch)
    if arguments.memory_of:
        print(json.dumps(measure_peak(arguments.memory_of, setting)))
        return

    rows = [key for key in METHODS if key in arguments.rows or key in {METHODS[row].beside for row in arguments.rows}]
    peaks = {}
    for done, key in enumerate(rows, 1):
        peaks[key] = peak_in_fresh_process(key, options)
        progress("memory", done, len(rows))
    base, inputs = setting.base(), setting.inputs()
    trainees = {key: Trainee(key, base, setting) for key in rows}
    kept = measure_kept(base, trainees, inputs)
    layers = time_layers(trainees, inputs, arguments.runs, device)
    steps = time_steps(trainees, inputs, arguments.step_runs, device)
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    print(f"\n{where}, {platform.machine()}, torch {torch.__version__}, peft {peft.__version__}, {arguments.dtype}")
    print(f"{setting.batch} images, latents {setting.size}x{setting.size}; ", end="")
    print(f"runs: {arguments.runs} of layers, {arguments.step_runs} of steps")
    for key in (key for key in rows if METHODS[key].beside == key):
        print(f"a step with {METHODS[key].label}: {steps.quartile(key):.2f} s; ", end="")
    print(f"kept for backward by the frozen U-Net: {kept['frozen']:,.0f} MiB\n")
    print(table(steps, layers, trainees, kept, peaks))


if __name__ == "__main__":
    main()
