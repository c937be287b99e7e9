"""`styleinject train | dreambooth | distill`: run a job in the terminal, and leave its folder in order."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..train.data.captions import TABLES
from ..train.data.kept import MEMORY
from ..train.data.source import FolderSource
from ..train.parallel import launched_processes
from ..train.random_numbers import RandomNumbers
from ..train.run.checkpoints import RunFolder, validations
from ..train.run.loop import Progress, Result, train
from ..train.run.watch import ProgressBar, loss_plot, save_picture, side_by_side
from .build import ENCODED, Job, build
from .config_files import TrainConfig, load_config

PLOT_EVERY = 60.0  # seconds
_MEBI = 2**20


def run(kind: type[TrainConfig], path: Path, dry: bool = False) -> Result | None:
    """Run a config file, from where its last run stopped; with `dry`, print the plan and write nothing.

    Raises:
        ConfigError and what `build` and `train` raise.
    """
    config = load_config(kind, path)
    processes = launched_processes()
    if not processes.is_main:
        _quiet()
    job = build(config, path.parent, processes, dry)
    if dry:
        plan = _plan(job)
        if processes.is_main:
            print(plan)
        return None
    folder = RunFolder(job.out, job.metadata(), job.request.torch_dtype, config.output.name)
    if processes.is_main:
        print(_heading(job))
    with _Stop() as stop, _Watch(job, stop) as watch:
        result = train(job.adapter, job.task, job.config.train, run=folder, observer=watch, processes=processes)
        step = result.best_step or result.step
        if processes.is_main:
            final = folder.final_file
            folder.save_adapter(job.adapter, final, step)
            shutil.rmtree(job.out / ENCODED, ignore_errors=True)
        watch.plot()
    if processes.is_main:
        kept = f", the best of {len(result.validation)} validations" if result.best_step else ""
        print(f"{final.name}: step {step}{kept}, in {job.out}")
    processes.wait()
    return result


class _Watch(ProgressBar):
    """The progress bar, and what appears in the run's folder meanwhile: loss.png, samples/, TensorBoard's events."""

    def __init__(self, job: Job, stop: _Stop):
        super().__init__(job.config.train.steps)
        self.job, self.stop, self.started = job, stop, False
        self.folder = RunFolder(job.out)
        self.plotted = time.monotonic()
        self.board: Any = None
        if job.config.output.tensorboard and job.processes.is_main:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("output.tensorboard needs a package: pip install tensorboard") from error
            self.board = SummaryWriter(str(job.out / "tensorboard"))
        self.bar.disable = not job.processes.is_main

    def progress(self, progress: Progress) -> None:
        if not self.started:
            self.started = True
            self.bar.n = self.bar.initial = progress.step - 1
        super().progress(progress)
        if self.board is not None:
            with self._surviving("TensorBoard"):
                self.board.add_scalar("loss", progress.loss, progress.step)
                self.board.add_scalar("learning rate", progress.rate, progress.step)
                if progress.validation is not None:
                    self.board.add_scalar("validation loss", progress.validation, progress.step)
        if time.monotonic() - self.plotted > PLOT_EVERY:
            self.plot()
        if self.job.processes.any(self.stop.requested):  # all of them stop after the same step
            raise KeyboardInterrupt

    def plot(self) -> None:
        """Write loss.png from the loss file."""
        self.plotted = time.monotonic()
        if not self.job.processes.is_main:
            return
        title = f"{self.job.config.output.name}: {self.job.task.objective}"
        with self._surviving("loss.png"):
            lines = self.folder.history()
            loss_plot(self.job.out / "loss.png", title, [line["loss"] for line in lines], validations(lines))

    def sample(self, step: int) -> None:
        output, resolution = self.job.config.output, self.job.config.data.resolution
        if not output.prompts:
            return
        model, seed, images, what = self.job.model, self.job.config.train.seed, list[Tensor](), f"pictures of step {step}"
        with self._surviving(what):
            for k, prompt in enumerate(output.prompts):  # one by one: beside a training there is little memory left
                images.append(model.decode(model.sample([prompt], resolution, seed + k, guidance=output.guidance))[0])
        with self._surviving(what):
            if images:  # those before what went wrong
                pixels, said = side_by_side([(image.movedim(0, -1) + 1) / 2 for image in images])
                save_picture(pixels, self.folder.samples / f"step-{step:06}.png")
                if said:
                    self.problem(f"{what}: {said}")

    @contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        """What is only for looking at ends no run: whatever is wrong with it is reported, and training goes on."""
        try:
            yield
        except Exception as error:
            self.problem(f"{what}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def __exit__(self, kind: Any, *exception: Any) -> None:
        super().__exit__(kind, *exception)
        if self.board is not None:
            self.board.close()
        if kind is not None and issubclass(kind, KeyboardInterrupt) and self.job.processes.is_main and self.folder.has_state:
            print(f"Stopped. The same command goes on from the last checkpoint in {self.job.out}.")


def _heading(job: Job) -> str:
    data = job.task.plan()["data"]
    count = f"{data['images']} images" if "images" in data else f"a stream of {data.get('shards', '?')} shards"
    passes = job.config.train.batch_size * job.config.train.accumulation * job.processes.world
    return (
        f"{job.task.objective} on {job.model.name}: {count}, {len(job.adapter.names)} layers, "
        f"{job.adapter.parameter_count():,} parameters, {passes} images a step, on {next(job.adapter.parameters()).device}"
        + (f"\n{job.memory}" if job.memory else "")
        + f"\n{job.model.name} {job.model.about}\nlayers: {', '.join(job.config.adapter.targets)}; {_found(data)}"
        + _styles(job)
    )


def _styles(job: Job) -> str:
    """The styles that images have, in words, and what chooses them later."""
    counts = job.task.source.style_counts() if isinstance(job.task.source, FolderSource) else {}
    named = ", ".join(f"{name} ({count})" for name, count in counts.items()) or ", ".join(job.config.data.styles)
    reads = getattr(job.adapter.config, "router_input", "layer")
    read = {"layer": "each layer's input", "prompt": "the prompt", "both": "each layer's input and the prompt"}[reads]
    return f"\nstyles: {named}; the router reads {read}" if named else ""


def _found(data: dict[str, Any]) -> str:
    """What was found as data, in words."""
    sizes = data.get("buckets", {})
    counts = [f"{sizes[size]} of {size}" if isinstance(sizes, dict) else str(size) for size in sizes]
    kinds = {"txt": "captions from .txt files", "one for all": "one caption"}
    kinds |= {table: f"captions from {table}" for table in TABLES}
    said = [kinds.get(data.get("captions", ""), "") or "captions beside the images" if counts else "images drawn from prompts"]
    said += [f"sizes {', '.join(counts[:6])}{', ...' if len(counts) > 6 else ''}"] if counts else []
    return "; ".join(said)


def _plan(job: Job) -> str:
    """What a run would do, with the time of a step and its memory measured on a real one."""
    settings, lines = job.config.train, [_heading(job)]
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return tensor

    for k in range(2):  # the first one warms up
        saved.clear()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        with job.task.installed(job.adapter), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            job.task.loss(RandomNumbers(settings.seed, k, job.processes)).backward()
        seconds = (time.perf_counter() - began) * settings.accumulation
    weights = sum(p.numel() * p.element_size() for p in job.model.denoiser.parameters())
    trained = job.adapter.parameter_count() * 16  # float32 values, gradients, and AdamW's two moments
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    own = {p.untyped_storage().data_ptr() for p in (*job.model.denoiser.parameters(), *job.adapter.parameters())}
    activations = sum(size for pointer, size in stored.items() if pointer not in own)
    shown = ", ".join(job.adapter.names[:3])
    lines += [
        f"  layers       {shown}{' ...' if len(job.adapter.names) > 3 else ''}",
        f"  steps        {settings.steps}, {seconds:.2f} s each: {_duration(seconds * settings.steps)}",
        f"  memory       {weights / _MEBI:,.0f} MiB U-Net + {trained / _MEBI:,.0f} MiB adapter, gradients and optimizer + "
        f"{activations / _MEBI:,.0f} MiB activations",
    ]
    if torch.cuda.is_available():
        lines.append(f"  measured     {torch.cuda.max_memory_allocated() / _MEBI:,.0f} MiB at most on the GPU")
    if isinstance(job.task.source, FolderSource):
        size = job.task.source.kept_size()
        rest = f", of which {(size - MEMORY) / _MEBI:,.0f} MiB on disk, in {ENCODED}" if size > MEMORY else ""
        lines.append(f"  images       {size / _MEBI:,.0f} MiB of latents and captions in memory{rest}")
    every = settings.checkpoint_every
    lines.append(f"  checkpoints  {f'every {every} steps' if every else 'at the end'}, in {job.out}")
    lines.append("  data         " + json.dumps(job.task.plan()["data"]))
    if job.task.advice:
        lines.append(f"  warning      {job.task.advice}")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{max(1, minutes)} min"


class _Stop:
    """Ctrl-C and SIGTERM ask to stop after the step at hand, so that its checkpoint is whole; a second one stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> _Stop:
        self._former = {kind: signal.signal(kind, self._request) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _request(self, *_: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *_: Any) -> None:
        for kind, handler in self._former.items():
            signal.signal(kind, handler)


def _quiet() -> None:
    """Nothing on the terminal from processes other than the main one."""
    import warnings

    warnings.simplefilter("ignore")
