"""What a monitor records of the runs of a MODEL, and how a run is found again from what the sampler returned."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..styleinject_core.router.recorder import Recorder
from ..styleinject_core.router.trace import RouterTrace, TraceError
from .injection import Injection, select_adapters
from .live import LiveFeed

RUNS_KEPT = 8
_ROUNDING = 0.02  # how far a latent may be from what was sampled, in standard deviations: casts to bfloat16
# On a GPU, starting an operation takes longer than most of these small ones: increments are measured in every eighth call
# of a layer at most, twice at least in a run of many steps. On a CPU it makes no difference.
_EVERY_ON_GPU = 8
_HOW_TO_CONNECT = (
    "connect the monitor's MODEL output to the sampler, and the LATENT that sampler returns to `after` of this node"
)


@dataclass(frozen=True)
class Observation:
    """One adapter in one run, recorded for one monitor."""

    monitor: Monitor
    injection: Injection
    recorder: Recorder
    feed: LiveFeed
    name: str

    def trace(self, schedule: Tensor, finished: bool, label: str) -> RouterTrace:
        return replace(self.recorder.trace(schedule, finished=finished, label=label), adapter=self.name)


@dataclass(frozen=True)
class RecordedRun:
    """The traces of one sampling run, and what to recognize its result by; None where it has none."""

    traces: tuple[RouterTrace, ...]
    mark: Tensor | None


class Monitor:
    """The recordings of one monitor node, the STYLEINJECT_TRACE that it returns before the sampler has run.

    Args:
        node_id: the node's execution id, for the live view.
        adapter_name: which of the adapters on the model, "all" for every one that has a router.
    """

    def __init__(self, node_id: str, adapter_name: str) -> None:
        self.node_id, self.adapter_name = node_id, adapter_name
        self.runs: deque[RecordedRun] = deque(maxlen=RUNS_KEPT)

    def observe(self, injections: Sequence[Injection], model: nn.Module, steps: int, gpu: bool) -> list[Observation]:
        """The adapters to record in a run that begins now; of two with the same name, the second is "name (2)"."""
        every = max(1, min(_EVERY_ON_GPU, steps // 2)) if gpu else 1
        observations: list[Observation] = []
        for injection in select_adapters(injections, self.adapter_name):
            adapter = injection.applied.adapter
            try:
                recorder = Recorder(adapter, adapter.style_names, injection.adapted_layers(model), every=every)
            except TraceError:
                continue  # a LoRA among them
            twins = sum(other.recorder.adapter == adapter.name for other in observations)
            name = f"{adapter.name} ({twins + 1})" if twins else adapter.name
            feed = LiveFeed(self.node_id, name, recorder.layers, recorder.styles, recorder.convolutions)
            observations.append(Observation(self, injection, recorder, feed, name))
        return observations

    def keep(self, traces: Sequence[RouterTrace], result: Any) -> None:
        """Add a run; `result` is what the sampler returned, None where it failed."""
        self.runs.append(RecordedRun(tuple(traces), None if result is None else _mark(result)))

    def find(self, after: Any) -> tuple[RouterTrace, ...]:
        """The run that `after` comes from: the one whose result it is, where it is a LATENT, else the latest. A trace of each
        adapter that was active in it.

        Raises:
            TraceError: nothing was recorded, or not the run of this LATENT; the message says what to connect.
        """
        if after is None:
            raise TraceError(
                f"the trace is filled while the sampler runs, and nothing makes this node wait for it: {_HOW_TO_CONNECT}"
            )
        if not self.runs:
            raise TraceError(
                f"nothing was recorded: {_HOW_TO_CONNECT}. (If they are, ComfyUI has kept the sampler's result from before "
                "the monitor was there: change the seed.)"
            )
        if isinstance(after, dict) and (mark := _mark(after.get("samples"))) is not None:
            distances = [(_distance(run.mark, mark), -age, run) for age, run in enumerate(self.runs)]
            distance, _, run = min(distances, key=lambda item: item[:2])
            if distance > _ROUNDING:
                raise TraceError(
                    f"this LATENT is not the result of any of the {len(self.runs)} runs recorded by the monitor: "
                    f"{_HOW_TO_CONNECT}, directly, without a node between them"
                )
        else:
            run = self.runs[-1]
        if not (found := tuple(trace for trace in run.traces if trace.roles)):
            names = ", ".join(trace.adapter for trace in run.traces)
            raise TraceError(f"{names} was not active at any step of this run: look at its strength, percents and layers")
        return found

    def __deepcopy__(self, memo: dict) -> Monitor:
        return self


def traces_of(value: Any, after: Any = None) -> tuple[RouterTrace, ...]:
    """What a STYLEINJECT_TRACE input holds: finished traces as they are, a monitor's by what comes after the sampler."""
    return value.find(after) if isinstance(value, Monitor) else tuple(value)


def _mark(result: Any) -> Tensor | None:
    """A few values of a tensor, which tell it from others; None for what is no plain tensor (audio and video in one)."""
    if not isinstance(result, Tensor) or result.numel() == 0:
        return None
    values = result.detach().flatten()
    places = torch.linspace(
        0, values.numel() - 1, min(64, values.numel()), dtype=torch.float64
    ).long()  # on the CPU: not all have float64
    return torch.cat([values[places.to(values.device)].float().cpu(), torch.tensor([float(values.numel())])])


def _distance(first: Tensor | None, second: Tensor) -> float:
    """The largest difference beside the values' deviation; infinite for another shape."""
    if first is None or first.shape != second.shape:
        return math.inf
    return ((first - second)[:-1].abs().max() / first[:-1].std(correction=0).clamp(min=1e-6)).nan_to_num(math.inf).item()
