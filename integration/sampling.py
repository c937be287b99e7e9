"""A sampling run of a MODEL with adapters: what lasts exactly as long as the run, and which rows are whose.

A run is made in a WrappersMP.OUTER_SAMPLE wrapper and travels in the run's own copy of `transformer_options`; a
CALC_COND_BATCH wrapper adds which conditionings are being worked out; the APPLY_MODEL wrapper finds both there, and makes of
them the `ModelCall` that the adapters' layers see. So nothing outlives the run, and two runs, or the threads of several GPUs,
cannot mix theirs up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ..styleinject_core import Attachment
from ..styleinject_core.call import Listener, ModelCall
from ..styleinject_core.router.control import Steered
from .injection import KEY, Injection
from .monitor import Monitor
from .reference import AppliedReference, masked_options

UNKNOWN = "unknown"  # the role of rows that are not the conditionings ComfyUI was asked for


class Run:
    """One sampling run of one MODEL.

    Args:
        guider: ComfyUI's, which knows its conditionings by name.
        sigmas: the schedule, one more than there are steps; on the CPU.
        injections: the adapters on the MODEL.
        monitors: who wants to know.
    """

    def __init__(self, guider: Any, sigmas: Tensor, injections: Sequence[Injection], monitors: Sequence[Monitor]) -> None:
        self.guider, self.sigmas, self.steps = guider, sigmas, max(1, len(sigmas) - 1)
        model, gpu = guider.model_patcher.model, guider.model_patcher.load_device.type != "cpu"
        self.observations = [o for monitor in monitors for o in monitor.observe(injections, model, self.steps, gpu)]
        self.memory: dict[Any, Tensor] = {}  # what router controls hold for the length of the run
        self._warned = False
        self._seen: dict[int, int] = {}  # observation -> calls that the live feed has shown

    def roles(self, conds: Sequence[Any]) -> tuple[str, ...]:
        """The name of each conditioning: the guider's for that very list, or for one made of its entries; else its place."""
        known: dict[str, Any] = getattr(self.guider, "conds", None) or {}
        by_entry: dict[Any, set[str]] = {}  # an area's entry is in the other prompt's list too, under the same id
        for name, entries in known.items():
            for entry in entries or ():
                by_entry.setdefault(entry.get("uuid"), set()).add(name)
        found = []
        for place, entries in enumerate(conds):
            name = next((name for name, own in known.items() if entries is not None and entries is own), None)
            of_entries = [by_entry.get(entry.get("uuid"), set()) for entry in entries or ()]
            names = {name} if name is not None else set.intersection(*of_entries) if of_entries else set()
            found.append(names.pop() if len(names) == 1 else f"cond {place}")
        return tuple(found)

    def warn_of_unknown_rows(self, injection: Injection) -> None:
        """Say once that a control for one prompt has no effect on rows that nobody can tell apart."""
        if not self._warned and any(rule.role != "all" for rule in injection.control):
            self._warned = True
            logging.warning(
                "StyleInject: another node has rearranged the batch; router controls of %s for the positive or the negative "
                "prompt alone have no effect",
                injection.applied.adapter.name,
            )

    def stepped(self, step: int) -> None:
        """Show what has happened since the last step in the browser."""
        for place, observation in enumerate(self.observations):
            recorder = observation.recorder
            latest = recorder.since(self._seen.get(place, 0))
            self._seen[place] = recorder.recorded
            if latest is not None:
                observation.feed.step(step, self.steps, recorder.sigma, *latest, levels=self.sigmas[:-1])

    def close(self, result: Tensor | None, label: str) -> None:
        """Hand what was recorded to the monitors; `result` is None where the run did not come to its end."""
        self.guider, self.memory = None, {}
        for observation in self.observations:
            observation.feed.close(result is not None)
        for monitor in {id(o.monitor): o.monitor for o in self.observations}.values():
            own = [o for o in self.observations if o.monitor is monitor]
            monitor.keep([o.trace(self.sigmas[:-1], result is not None, label) for o in own], result)

    def __deepcopy__(self, memo: dict) -> Run:
        return self


@dataclass(frozen=True)
class Conditionings:
    """What a sampling run is working out now: the roles of the conditionings by their index, and the images of each."""

    run: Run
    roles: tuple[str, ...] = ()
    images: int = 0

    def of_rows(self, rows: int, cond_or_uncond: Sequence[int] | None) -> tuple[str, ...]:
        """The role of each equal part of a batch of `rows`; one part, unknown, where it is not what was asked for."""
        entries = list(cond_or_uncond or ())
        if not entries or rows != self.images * len(entries) or max(entries) >= len(self.roles):
            return (UNKNOWN,)
        return tuple(self.roles[entry] for entry in entries)

    def __deepcopy__(self, memo: dict) -> Conditionings:
        return self


class ApplyModelWrapper:
    """The WrappersMP.APPLY_MODEL wrapper of a MODEL that has adapters or references: all of them, on it for the length of a
    call."""

    def __init__(self, injections: Iterable[Injection], references: Iterable[AppliedReference] = ()):
        self.injections = tuple(injections)
        self.references = tuple(references)

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        model, x, timestep = executor.class_obj, args[0], args[1]
        patcher = getattr(model, "current_patcher", None)
        # guiders of two models hand each the wrappers of both
        if patcher is None or self not in patcher.get_wrappers(WrappersMP.APPLY_MODEL, KEY):
            return executor(*args, **kwargs)
        options = (args[5] if len(args) > 5 else kwargs.get("transformer_options")) or {}
        call = model_call(x, timestep, options)
        with ExitStack() as stack:
            for injection in self.injections:
                if injection.active(model, timestep):
                    attachment = injection.attachment(model)
                    stack.enter_context(attachment.in_call(call))
                    stack.enter_context(_listened(injection, attachment, model, timestep, call))
                    stack.enter_context(attachment)
            active = [reference for reference in self.references if reference.active(model, timestep)]
            calls = [reference.call(call) for reference in active]
            for reference, own in zip(active, calls, strict=True):
                attached = reference.attachment(model)
                stack.enter_context(attached.in_call(own))
                stack.enter_context(attached)
            if any(reference.mask is not None for reference in active):
                arguments = _Arguments(args, kwargs)
                arguments[5, "transformer_options"] = masked_options(active, model, x, calls, options)
                args, kwargs = tuple(arguments.args), arguments.kwargs
            return executor(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> ApplyModelWrapper:
        return self  # some versions deep-copy a model's options; the adapters in here are not theirs to copy


def model_call(x: Tensor, timestep: Tensor, options: Mapping[str, Any]) -> ModelCall:
    """What one `apply_model` call knows; `options` are its transformer_options."""
    now = options.get(KEY)

    def roles() -> tuple[str, ...]:
        known = isinstance(now, Conditionings)
        return now.of_rows(x.shape[0], options.get("cond_or_uncond")) if known else (UNKNOWN,)

    # no count where gradients are wanted: a backward pass may run blocks of an earlier call again
    images = 0 if torch.is_grad_enabled() else x.shape[0]
    return ModelCall(images, timestep.flatten()[0], options, roles)


@contextmanager
def _listened(
    injection: Injection, attachment: Attachment, model: nn.Module, timestep: Tensor, call: ModelCall
) -> Iterator[None]:
    """Steer and record one adapter for the length of one model call, where its controls and monitors ask for it."""
    now = call.extras.get(KEY)
    run = now.run if isinstance(now, Conditionings) else None
    observed = [] if run is None else [o.recorder for o in run.observations if o.injection is injection]
    if injection.steering is None and not observed:
        yield
        return
    roles, rows = call.roles, timestep.shape[0]
    listeners: list[Listener] = []
    if injection.steering is not None:
        if roles == (UNKNOWN,) and run is not None:
            run.warn_of_unknown_rows(injection)
        ids = call.extras.get("uuids") or ()
        keys = [(id(injection), role, ids[k] if len(ids) == len(roles) else k) for k, role in enumerate(roles)]
        memory = {} if run is None else run.memory
        active = injection.active_rules(model, timestep)
        listeners.append(Steered(injection.steering.steers(active, roles, keys, call.sigma, memory, rows)))
    calls = [recorder.begin(roles, call.sigma, rows) for recorder in observed]
    listeners.extend(recorded for recorded in calls if recorded is not None)
    with attachment.sites[0][0].current.listened(*listeners):
        yield
    for recorder, recorded in zip(observed, calls, strict=True):
        recorder.end(recorded)


class SampleWrapper:
    """The OUTER_SAMPLE wrapper of a MODEL that has adapters: makes the run that its model calls belong to."""

    def __init__(self, injections: Sequence[Injection], monitors: Sequence[Monitor]):
        self.injections, self.monitors = tuple(injections), tuple(monitors)

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        guider = executor.class_obj
        if self not in guider.model_patcher.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
            return executor(*args, **kwargs)
        arguments = _Arguments(args, kwargs)
        sigmas = arguments[3, "sigmas"].detach().float().cpu()
        run = Run(guider, sigmas, self.injections, self.monitors)
        guider.model_options.setdefault("transformer_options", {})[KEY] = Conditionings(run)
        arguments[5, "callback"] = _calling(run, arguments[5, "callback"])
        result = None
        try:
            result = executor(*arguments.args, **arguments.kwargs)
            return result
        finally:
            if result is not None:
                run.stepped(run.steps - 1)  # what samplers did after their last callback
            run.close(result, f"seed {arguments[7, 'seed']}, {run.steps} steps")

    def __deepcopy__(self, memo: dict) -> SampleWrapper:
        return self


def calc_cond_batch_wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Say which conditionings are being worked out, to the model calls inside."""
    arguments = _Arguments(args, kwargs)
    options = arguments[4, "model_options"]
    transformer_options = options.get("transformer_options", {})
    now = transformer_options.get(KEY)
    if isinstance(now, Conditionings):
        now = replace(now, roles=now.run.roles(arguments[1, "conds"]), images=arguments[2, "x_in"].shape[0])
        arguments[4, "model_options"] = {**options, "transformer_options": {**transformer_options, KEY: now}}
    return executor(*arguments.args, **arguments.kwargs)


class _Arguments:
    """A call's arguments, each by its position and its name: wrappers may be given them either way."""

    def __init__(self, args: Sequence[Any], kwargs: dict[str, Any]):
        self.args, self.kwargs = list(args), dict(kwargs)

    def __getitem__(self, key: tuple[int, str]) -> Any:
        position, name = key
        return self.args[position] if position < len(self.args) else self.kwargs.get(name)

    def __setitem__(self, key: tuple[int, str], value: Any) -> None:
        position, name = key
        if position < len(self.args):
            self.args[position] = value
        else:
            self.kwargs[name] = value


def _calling(run: Run, callback: Callable[..., Any] | None) -> Callable[..., Any]:
    def stepped(step: int, *args: Any, **kwargs: Any) -> Any:
        run.stepped(step)
        return None if callback is None else callback(step, *args, **kwargs)

    return stepped
