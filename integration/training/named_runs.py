"""One training run inside ComfyUI: its folder under output/styleinject, what is shown meanwhile, and how it ends."""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from PIL import Image
from torch import Tensor

from ...styleinject_core import Adapter
from ...styleinject_core.files import AdapterFileError, save_adapter
from ...styleinject_core.train.objectives.tasks import FineTune
from ...styleinject_core.train.run.checkpoints import CheckpointError, RunFolder, validations
from ...styleinject_core.train.run.loop import Observer, Progress, Result, run_plan, train
from ...styleinject_core.train.run.watch import figure_pixels, loss_figure, save_picture, side_by_side
from ...styleinject_core.train.settings import TrainSettings
from .. import paths
from ..live import running_server

# What to do about a run of the same name: the choices of StyleInjectTrainOptions.existing_run.
GO_ON, MUST_GO_ON, NEW = "go on or new", "go on", "new"

Pictures = Callable[[], Iterable[Tensor]]

_PLOT_EVERY = 3.0  # seconds, at least; and at most a tenth of the time
_TEXT_EVERY = 0.5
_VIEW_HEIGHT = 468  # pixels of the live view


@dataclass(frozen=True)
class LossHistory:
    """The losses of a run, for plots."""

    title: str
    losses: tuple[float, ...]
    validation: tuple[tuple[int, float], ...] = ()


def _numbered(name: str) -> Iterator[Path]:
    """The folders of the runs of a name, and last the first one that is free."""
    for number in itertools.count(1):
        path = paths.trained_folder() / (name if number == 1 else f"{name}_{number}")
        yield path
        if not path.exists():
            return


def open_run(name: str, existing: str, plan: dict[str, Any], steps: int) -> RunFolder:
    """The folder to train in: "name", or the numbered ones beside it ("name_2", ...).

    Args:
        existing: one of the choices of StyleInjectTrainOptions.existing_run.
        plan, steps: the run's; a folder with a state of another plan, or of a later step, is never trained in, nor one that
            another program trains in at the moment.

    Raises:
        ValueError, CheckpointError: a run must go on, and there is none, or the latest is another one.
    """
    paths.trained_folder().mkdir(parents=True, exist_ok=True)
    *there, path = _numbered(name)
    runs = [folder for folder in map(RunFolder, reversed(there)) if folder.has_state]
    if existing == MUST_GO_ON:
        if not runs:
            raise ValueError(f'existing_run is "{MUST_GO_ON}", and there is no run named {name!r} in output/styleinject')
        runs[0].load_state(plan, steps)
        return runs[0]
    if existing == GO_ON:
        for folder in (run for run in runs if not run.is_busy):
            with suppress(CheckpointError):
                folder.load_state(plan, steps)
                return folder
        for left in map(RunFolder, there):
            if not left.has_state and not any(left.path.glob("*.safetensors")) and not left.is_busy:
                return left  # it ended before its first checkpoint
    return RunFolder(path)


# Adapters that this process has saved, by the name that was asked for, and how often one was found gone.
_saved: dict[str, set[Path]] = {}
_losses: Counter[str] = Counter()


def times_gone(name: str) -> int:
    """How often adapters of this name were found deleted after their training: ComfyUI, which keeps what a node put out,
    then has to run it again."""
    name = name.strip()
    if gone := {path for path in _saved.get(name, ()) if not path.is_file()}:
        _saved[name] -= gone
        _losses[name] += 1
    return _losses[name]


def chosen_before(name: str, existing: str) -> dict[str, Any]:
    """What the latest run of a name was trained with, where it may go on: see `RunFolder.chosen_before`."""
    paths_there = [path for path in _numbered(name) if path.exists()]
    return RunFolder(paths_there[-1]).chosen_before() if paths_there and existing != NEW else {}


class Watch(Observer):
    """Progress in the node: bar, text, the loss and the latest pictures; and ComfyUI's interrupt.

    Args:
        run: whose loss file is plotted.
        node_id: the node that shows it, None for none.
        pictures: draws the validation pictures one by one, (H, W, 3) in [0, 1].
        note: shown below the progress all the time.
    """

    def __init__(self, run: RunFolder, title: str, node_id: str | None, pictures: Pictures | None, note: str = ""):
        self.note = note
        self.run, self.title, self.node_id, self.pictures = run, title, node_id, pictures
        self._bar: Any = None
        self._latest: Image.Image | None = None  # pictures
        self._plot: Image.Image | None = None
        self._plots = True
        self._next_plot = time.monotonic() + 1.0
        self._next_text = 0.0
        self._mean: float | None = None

    def progress(self, progress: Progress) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(progress.steps)
        self._mean = progress.loss if self._mean is None else 0.95 * self._mean + 0.05 * progress.loss
        now, last = time.monotonic(), progress.step == progress.steps
        view = None
        if now >= self._next_plot or last:
            self._draw_plot()
            self._next_plot = time.monotonic() + max(_PLOT_EVERY, 10 * (time.monotonic() - now))
            view = self._live()
        if now >= self._next_text or last:
            self._next_text = now + _TEXT_EVERY
            self.say(
                f"step {progress.step} of {progress.steps}, loss {self._mean:.4f}, learning rate {progress.rate:.1e}, "
                f"{progress.seconds_per_step:.2f} s a step, {_duration(progress.seconds_left)} left"
                + (f"\n{self.note}" if self.note else "")
            )
        self._bar.update_absolute(progress.step, progress.steps, view)

    def sample(self, step: int) -> None:
        if self.pictures is None:
            return
        drawn, what = list[Tensor](), f"pictures of step {step}"
        try:
            drawn.extend(self.pictures())
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as error:  # out of memory, as a rule: what is only for looking at ends no run
            comfy.model_management.soft_empty_cache()
            reason = str(error).strip().split("\n", 1)[0]
            self.problem(f"{what}: {reason or type(error).__name__}")
        if not drawn:
            return
        pixels, said = side_by_side(drawn)  # those before what went wrong
        if said:
            self.problem(f"{what}: {said}")
        self._latest = _image(pixels)
        self._next_plot = 0.0  # show them with this step
        try:
            save_picture(pixels, self.run.samples / f"step-{step:06}.png")
        except OSError as error:
            self.problem(f"{what}: {error}")

    def problem(self, message: str) -> None:
        logging.warning("StyleInject training %s: %s", self.run.path.name, message)
        self.say(message)

    def say(self, text: str) -> None:
        """A line of text in the node, in the browser that queued the run: sent to nobody in particular, it would appear in
        whatever workflow another one has open, in the node that has this number there."""
        server = running_server()
        client = getattr(server, "client_id", None)
        if client is not None and self.node_id is not None:
            server.send_progress_text(text, self.node_id, client)

    def _draw_plot(self) -> None:
        if not self._plots:
            return
        try:
            lines = self.run.history()
            self._plot = _image(figure_pixels(loss_figure(self.title, [line["loss"] for line in lines], validations(lines))))
        except ImportError as error:
            self._plots = False
            logging.info("StyleInject training: no live plot of the loss, %s", error)
        except OSError as error:  # it may be there again the next time
            logging.warning("StyleInject training: the loss could not be read for its plot, %s", error)

    def _live(self) -> tuple[str, Image.Image, int] | None:
        """The plot and the pictures side by side, as ComfyUI's progress wants it."""
        parts = [
            part.resize((round(part.width * _VIEW_HEIGHT / part.height), _VIEW_HEIGHT), Image.Resampling.BICUBIC)
            for part in (self._plot, self._latest)
            if part is not None
        ]
        if not parts:
            return None
        whole = Image.new("RGB", (sum(part.width for part in parts), _VIEW_HEIGHT), "white")
        left = 0
        for part in parts:
            whole.paste(part, (left, 0))
            left += part.width
        return "JPEG", whole, max(whole.size)


@dataclass(frozen=True)
class Outcome:
    """What a run comes to."""

    adapter: Adapter
    result: Result
    losses: LossHistory
    message: str


def train_in_folder(
    adapter: Adapter,
    task: FineTune,
    settings: TrainSettings,
    *,
    existing: str,
    metadata: dict[str, str],
    dtype: torch.dtype,
    node_id: str | None,
    pictures: Pictures | None,
    note: str = "",
    heading: str = "",
) -> Outcome:
    """Train an adapter under its name in output/styleinject; what was reached is on disk, however it ends.

    Args:
        adapter: untrained, on the device it trains on.
        pictures, note: see `Watch`.
        heading: what is trained on what, said at the start and at the end.

    Returns:
        The adapter on the CPU, named after its run.
    """
    run = open_run(adapter.name, existing, run_plan(adapter, task, settings), settings.steps)
    run.metadata, run.dtype = metadata, dtype
    name = run.path.name
    watch = Watch(run, f"{name}: {task.objective}", node_id, pictures, note)
    if start := "\n".join(filter(None, (heading, note))):
        logging.info("StyleInject training %s: %s", name, start)
        watch.say(start)
    try:
        result = train(adapter, task, settings, run=run, observer=watch)
    except BaseException as error:
        reached = run.history()[-1:]
        if isinstance(error, comfy.model_management.InterruptProcessingException) and run.has_state:
            text = f"Stopped at step {reached[0]['step'] if reached else 0}. Queue again to continue from {_shown(run.path)}."
            logging.info("StyleInject training %s: %s", name, text)
            watch.say(text)
        raise
    step = result.best_step or result.step
    finished = Adapter(adapter.layers, adapter.config, {**adapter.metadata, **metadata, "styleinject.steps": str(step)}, name)
    finished.cpu().requires_grad_(False).eval()
    message = f"{name}: {result.step} steps" + (f", the best at step {step}" if result.best_step else "")
    if result.resumed_from:
        message += f", continued from step {result.resumed_from}" if result.resumed_from < result.step else ", trained before"
    try:
        path = run.final_file
        path.parent.mkdir(parents=True, exist_ok=True)
        save_adapter(finished, path, None, dtype)
        _saved.setdefault(adapter.name, set()).add(path)
        message += f". Saved as {_shown(path)}\n{how_to_use(path, finished)}"
    except (AdapterFileError, OSError) as error:  # trained, and still in the graph: StyleInject Save can write it elsewhere
        watch.problem(str(error))
        message += f". NOT saved: {error}"
    watch.say(message.split("\n", 1)[0])
    message += "".join(f"\n{line}" for line in (note, heading) if line)
    losses = LossHistory(watch.title, tuple(result.losses), tuple(result.validation))
    return Outcome(finished, result, losses, message)


def how_to_use(path: Path, adapter: Adapter) -> str:
    """What to do with an adapter that has been saved in output/styleinject, in words."""
    listed = f"output/{path.relative_to(paths.trained_folder()).as_posix()}"
    return (
        f"To use it, place the node StyleInject between the model and the sampler, press R, and choose {listed}. Begin at "
        "strength 1; go down to 0.7 where pictures copy those it was trained on, up where too little of the style shows."
        + (f' Prompts call it by "{trigger}".' if (trigger := adapter.metadata.get("modelspec.trigger_phrase")) else "")
        + (f" Its styles are {', '.join(styles)}: the name in a prompt chooses one." if (styles := _called(adapter)) else "")
    )


def _called(adapter: Adapter) -> list[str]:
    """The names of the styles that prompts choose."""
    reads = getattr(adapter.config, "reads_prompt", False)
    return [name for k, name in enumerate(adapter.style_names, 1) if name != f"style {k}"] if reads else []


def _image(pixels: Tensor) -> Image.Image:
    """(H, W, 3) uint8 -> a picture."""
    return Image.fromarray(pixels.contiguous().numpy())


def _shown(path: Path) -> str:
    """A path as users see it: from the output folder on."""
    return f"output/{paths.TRAINED}/{path.relative_to(paths.trained_folder()).as_posix()}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
