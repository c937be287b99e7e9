"""The training loop: the adapter's parameters on any task, with checkpoints from which it goes on bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...adapter import Adapter
from ...attach import Attachment
from ...call import ModelCall
from ...router.mean import MeanMeter, keep_router_mean
from ..data.images import DataError
from ..parallel import Processes
from ..random_numbers import RandomNumbers
from ..settings import TrainSettings
from .checkpoints import CheckpointError, RunFolder, TrainState, validations
from .optimizers import evaluating, make_optimizer, set_rate
from .saver import CheckpointsRefusedError, Saver, TrainingError

_MANY = 0.2  # of the layers: an attention function without a backward pass
_OVERFLOWS = 40  # in a row, each of which halves the scale of the loss, from 2 ** 16 on


class Task(Protocol):
    """What is trained for: where the adapter goes, and its loss."""

    @property
    def is_float16(self) -> bool:
        """Whether the model computes in float16, whose small gradients vanish unless the loss is scaled."""
        ...

    @property
    def advice(self) -> str:
        """What the user should know before training; empty where there is nothing."""
        ...

    def installed(self, adapter: Adapter) -> AbstractContextManager[Attachment | None]:
        """The adapter on the model; held open over forward and backward passes. None: what is trained has no routers."""
        ...

    def loss(self, rng: RandomNumbers) -> Tensor:
        """The scalar loss of forward pass `rng.index`."""
        ...

    def validation_loss(self) -> float:
        """The loss on the same examples, noise and times each time."""
        ...

    def plan(self) -> dict[str, Any]:
        """What of the task decides which adapter comes out: JSON values."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, where it is no function of the step."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Progress:
    """Where training stands after a step. `loss` is the mean over the step's forward passes."""

    step: int
    steps: int
    loss: float
    rate: float
    seconds_per_step: float
    validation: float | None = None

    @property
    def seconds_left(self) -> float:
        return (self.steps - self.step) * self.seconds_per_step


class Observer:
    """Who watches a run; by default nobody. An exception from `progress` stops the run after a checkpoint."""

    def progress(self, progress: Progress) -> None:
        """After every step."""

    def sample(self, step: int) -> None:
        """Every `sample_every` steps, with the adapter on the model and gradients off."""

    def problem(self, message: str) -> None:
        """Something is wrong that training survives."""


@dataclass
class Result:
    """How a run ended: the history of all its steps, resumed ones included."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    best_step: int | None = None
    resumed_from: int = 0
    stopped_early: bool = False


def train(
    adapter: Adapter,
    task: Task,
    settings: TrainSettings,
    *,
    run: RunFolder | None = None,
    observer: Observer | None = None,
    processes: Processes = Processes(),  # noqa: B008 - frozen
) -> Result:
    """Train an adapter in place; with a run folder, from its newest state on.

    With validation, the adapter is in the end the one of the best validation loss.

    Args:
        adapter: float32, on the device it trains on.

    Raises:
        TrainingError: a loss or gradient that is NaN or Inf; the parameters are those of the last good step.
        CheckpointsRefusedError: the disk refuses one checkpoint after the other.
        WriteError: the folder, the disk or a name refuses what will be written, before the first step.
        CheckpointError: the run folder holds the state of another plan, or of a later step, or another run trains in it.
    """
    folder = run if processes.is_main else None
    loop = _Loop(adapter, task, settings, folder, observer or Observer(), processes)
    with nullcontext() if folder is None else folder.locked():
        if run is not None:
            loop.resume(run)
        loop.try_writing()
        with torch.inference_mode(False), torch.enable_grad(), task.installed(adapter) as attachment:
            loop.go(attachment)
    return loop.result


def run_plan(
    adapter: Adapter,
    task: Task,
    settings: TrainSettings,
    processes: Processes = Processes(),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """What decides which adapter comes out of a run; a state is resumed by a run of the same plan only."""
    return {
        "settings": settings.result_fields(),
        "adapter": {"method": adapter.config.method, **adapter.config.to_dict(), "layer_names": len(adapter.names)},
        "processes": processes.world,
        **task.plan(),
    }


class _Loop:
    """The state of one call of `train`."""

    def __init__(
        self,
        adapter: Adapter,
        task: Task,
        settings: TrainSettings,
        run: RunFolder | None,
        observer: Observer,
        processes: Processes,
    ):
        self.adapter, self.task, self.settings, self.run = adapter, task, settings, run
        self.observer, self.processes = observer, processes
        self.parameters = [p for p in adapter.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, settings)
        device = self.parameters[0].device.type
        self.scaler = torch.amp.GradScaler(device, enabled=task.is_float16)
        self.result = Result()
        self.best: tuple[float, dict[str, Tensor], dict[str, Tensor]] | None = None  # its loss, parameters and mean of s
        self.waited = 0  # measurements since the best one
        self.saver = Saver(run, self._write, observer.problem, processes)
        self.position = task.state_dict()  # in the data, after the last whole step
        self.overflows = 0  # steps in a row that float16 made too large, and the scaler left out
        self.mid_step = False  # between the optimizer's step and the end of what belongs to it
        self.seconds: float | None = None
        self.meter = MeanMeter()
        self.listening: Callable[[], AbstractContextManager[None]] = nullcontext

    # the run on disk

    def plan(self) -> dict[str, Any]:
        return run_plan(self.adapter, self.task, self.settings, self.processes)

    def resume(self, run: RunFolder) -> None:
        state = run.load_state(self.plan(), self.settings.steps, self.observer.problem)
        if state is None:
            if self.run is not None:
                run.history(until=0)
            return
        try:
            self._go_on_from(state.parts)
            if state.version == 1:
                self._try_step(state.parts["optimizer"])
        except (DataError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # anything: it has no checksum where a version wrote it that had none
            where = f"{run.path.name}/{run.state_file.name}"
            reason = str(error)[:300]
            raise CheckpointError(f"{where}: not the state of such a run ({reason}): delete it to start anew") from error
        self.result.stopped_early = self._patience_is_over()
        lines = run.history(until=state.step if self.run is not None else None)
        self.result.losses = [line["loss"] for line in lines if line["step"] <= state.step]
        self.result.validation = validations(lines)
        self.result.step = self.result.resumed_from = self.saver.saved_at = state.step

    def _go_on_from(self, parts: Mapping[str, Any]) -> None:
        if parts["best"] is not None:
            self.result.best_step, value, tensors, *means = parts["best"]  # an older version kept no mean of s
            self.best = (float(value), tensors, means[0] if means else {})
            self.adapter.load_state_dict(tensors)  # it fits, or nothing is continued
        self.adapter.load_state_dict(parts["adapter"])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.scaler.load_state_dict(parts["scaler"])
        self.task.load_state_dict(parts["task"])
        self.position = parts["task"]
        if "router" in parts:
            self.meter.load_state_dict(parts["router"])
        self.waited = parts["waited"]

    def _try_step(self, state: Mapping[str, Any]) -> None:
        """Of a state without a checksum only a step tells whether the optimizer's part is whole; raises whatever that does."""
        twins = [nn.Parameter(parameter.detach().clone()) for parameter in self.parameters]
        for twin in twins:
            twin.grad = torch.zeros_like(twin)
        optimizer = make_optimizer(twins, self.settings)
        optimizer.load_state_dict(deepcopy(dict(state)))
        optimizer.step()

    def try_writing(self) -> None:
        """Before step 1, whether the disk takes a checkpoint. Raises WriteError."""
        if self.run is None or self.result.step >= self.settings.steps:
            return
        numbers = sum(tensor.numel() for tensor in self.adapter.state_dict().values())
        kept = 4 if self.settings.validate_every else 3  # float32: the adapter, AdamW's two moments, the best one
        self.run.try_writing(numbers * (4 * kept + self.run.dtype.itemsize), self.settings.steps)

    def _write(self, run: RunFolder) -> None:
        best = None if self.best is None else [self.result.best_step, *self.best]
        parts = {
            "adapter": self.adapter.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "task": self.position,
            "router": self.meter.state_dict(),
            "best": best,
            "waited": self.waited,
        }
        with evaluating(self.optimizer):
            self._keep_mean(self.meter.means)
            run.save_adapter(self.adapter, run.adapter_file(self.result.step), self.result.step)
        run.save_state(TrainState(self.result.step, self.plan(), parts))

    # the steps

    def go(self, attachment: Attachment | None) -> None:
        settings = self.settings
        if attachment is not None:
            self.listening = partial(attachment.in_call, ModelCall(listeners=(self.meter,)))
        if self.task.advice:
            self.observer.problem(self.task.advice)
        try:
            while self.result.step < settings.steps and not self.result.stopped_early:
                self.step()
                if settings.checkpoint_every and self.result.step % settings.checkpoint_every == 0:
                    self.saver.save(self.result.step)
                    if self.result.step < settings.steps:
                        self.saver.stop_if_refused(self.result.step)
        except CheckpointsRefusedError:
            raise
        except TrainingError as error:
            raise TrainingError(f"{error}. {self.saver.on_disk()}") from None
        except BaseException:
            if not self.mid_step:
                self.saver.save_at_last(self.result.step)
            raise
        self.saver.save_at_last(self.result.step)
        self._keep_mean(self.meter.means if self.best is None else self.best[2])
        if self.best is not None:
            self.adapter.load_state_dict(self.best[1])
        elif hasattr(self.optimizer, "eval"):
            self.optimizer.eval()  # a schedule-free optimizer's own average is the result

    def step(self) -> None:
        began, settings, step = time.perf_counter(), self.settings, self.result.step
        rate = set_rate(self.optimizer, settings, step)
        with self.listening():
            loss = self._gradients(step)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.processes.average([*gradients, loss])  # before the scaler looks for overflows: all processes see the same ones
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, settings.clip or math.inf)
        value = float(loss)
        finite = math.isfinite(float(norm))
        self.overflows = 0 if finite else self.overflows + 1
        if not (math.isfinite(value) and (finite or (self.task.is_float16 and self.overflows < _OVERFLOWS))):
            what = f"gradient became {float(norm)}" if math.isfinite(value) else f"loss became {value}"
            raise TrainingError(f"the {what} at step {step + 1} of {settings.steps}: {self._reason(step, value)}")
        self.mid_step = True
        self.meter.step()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.result.step += 1
        self.result.losses.append(value)
        line: dict[str, Any] = {"step": self.result.step, "loss": value, "rate": rate}
        if settings.validate_every and self.result.step % settings.validate_every == 0:
            line["validation"] = self._validate()
        self.saver.append(line)
        self.position = self.task.state_dict()
        self.mid_step = False
        if settings.sample_every and self.result.step % settings.sample_every == 0 and self.processes.is_main:
            with evaluating(self.optimizer), torch.no_grad():
                self.observer.sample(self.result.step)
        taken = time.perf_counter() - began
        self.seconds = taken if self.seconds is None else 0.9 * self.seconds + 0.1 * taken
        validation = line.get("validation")
        self.observer.progress(Progress(self.result.step, settings.steps, value, rate, self.seconds, validation))

    def _reason(self, step: int, value: float) -> str:
        """What to do about a loss or gradient that is no number."""
        if step == self.result.resumed_from == 0 and not math.isfinite(value):  # nothing has been learned yet
            return "the model itself gives it, with no change learned yet; let it compute in bfloat16 or float32"
        return "lower the learning rate"

    def _gradients(self, step: int) -> Tensor:
        """Gradients of one optimizer step, averaged over its forward passes; returns their mean loss."""
        self.optimizer.zero_grad(set_to_none=True)
        passes = self.settings.accumulation
        total = torch.zeros((), device=self.parameters[0].device)
        for k in range(passes):
            loss = self.task.loss(RandomNumbers(self.settings.seed, step * passes + k, self.processes)) / passes
            if loss.requires_grad:
                self.scaler.scale(loss).backward()
            total += loss.detach()
        if step == self.result.resumed_from:
            self._check_gradients()
        return total

    def _check_gradients(self) -> None:
        """Say which layers would stay untrained, for their gradient is missing (not 0); refuse to train if they are many."""
        layers = self.adapter.layers.items() if isinstance(self.adapter, Adapter) else ()  # a benchmark trains a U-Net
        trained = {name: [p for p in layer.parameters() if p.requires_grad] for name, layer in layers}
        missing = [name for name, parameters in trained.items() if parameters and all(p.grad is None for p in parameters)]
        if not missing:
            return
        few = f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        what = f"no gradient reaches {len(missing)} of {len(trained)} layers ({few})"
        if len(missing) < _MANY * len(trained):  # blocks whose last part the output does not depend on
            self.observer.problem(f"{what}: the model's output does not depend on them, they stay as they are")
        else:
            raise TrainingError(f"{what}: something runs them that has no backward pass, as SageAttention; train without that")

    def _validate(self) -> float:
        with evaluating(self.optimizer), torch.no_grad():
            value = self.task.validation_loss()
            self.result.validation.append((self.result.step, value))
            if not math.isfinite(value):
                self.observer.problem(f"the validation loss of step {self.result.step} is {value}")
            if math.isfinite(value) and (self.best is None or value < self.best[0]):
                tensors = {name: tensor.detach().clone() for name, tensor in self.adapter.state_dict().items()}
                self.best = (value, tensors, dict(self.meter.means))
                self.result.best_step, self.waited = self.result.step, 0
                self._keep_mean(self.meter.means)
                if self.run is not None:
                    with self.saver.surviving(f"best adapter of step {self.result.step}"):
                        self.run.save_adapter(self.adapter, self.run.best_file, self.result.step)
            else:
                self.waited += 1
        self.result.stopped_early = self._patience_is_over()
        return value

    def _keep_mean(self, means: Mapping[str, Tensor]) -> None:
        if means and isinstance(self.adapter, Adapter):
            keep_router_mean(self.adapter, means)

    def _patience_is_over(self) -> bool:
        return 0 < self.settings.patience <= self.waited
