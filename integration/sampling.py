"""A sampling run of a MODEL with adapters: what lasts exactly as long as the run, and which rows are whose.

A run is made in a WrappersMP.OUTER_SAMPLE wrapper and travels in the run's own copy of `transformer_options`; a
CALC_COND_BATCH wrapper adds which conditionings are being worked out; the APPLY_MODEL wrapper finds both there, and makes of
them the `ModelCall` that the adapters' layers see. So nothing outlives the run, and two runs, or the threads of several GPUs,
cannot mix theirs up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key, get_wrappers_with_key
from torch import Tensor, nn

from ..styleinject_core import Attachment
from ..styleinject_core.call import Listener, ModelCall
from ..styleinject_core.functional.host import HostLayer
from ..styleinject_core.router.control import Steered
from ..styleinject_core.router.recorder import Call, Recorder
from .guidance import Passes
from .injection import KEY, Injection
from .monitor import Monitor
from .reference import AppliedReference, masked_options
from .taking_part import TakingPart

UNKNOWN = "unknown"  # the role of rows that are not the conditionings ComfyUI was asked for
_FUNCTION_WRAPPER = "model_function_wrapper"
_APPLY = "apply_model"


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
        self.injections = tuple(injections)
        self.observations = [o for monitor in monitors for o in monitor.observe(injections, model, self.steps, gpu)]
        self.passes, self.taking_part = Passes(), TakingPart(injections)
        self.memory: dict[Any, Tensor] = {}  # what router controls hold for the length of the run
        self._warned = False
        self._seen: dict[int, int] = {}  # observation -> calls that the live feed has shown

    def roles(self, conds: Sequence[Any]) -> tuple[str, ...]:
        """The name of each conditioning: the guider's for that very list, or for one made of its entries; else its place."""
        known: dict[str, Any] = getattr(self.guider, "conds", None) or {}
        by_entry, found = self.by_entry(), []
        for place, entries in enumerate(conds):
            name = next((name for name, own in known.items() if entries is not None and entries is own), None)
            of_entries = [by_entry.get(entry.get("uuid"), set()) for entry in entries or ()]
            names = {name} if name is not None else set.intersection(*of_entries) if of_entries else set()
            found.append(names.pop() if len(names) == 1 else f"cond {place}")
        return tuple(found)

    def by_entry(self) -> dict[Any, set[str]]:
        """Id of a conditioning's entry -> its names: an area's entry is in the other prompt's list too, under the same id."""
        names: dict[Any, set[str]] = {}
        for name, entries in (getattr(self.guider, "conds", None) or {}).items():
            for entry in entries or ():
                names.setdefault(entry.get("uuid"), set()).add(name)
        return names

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
    guidance: bool = False

    def of_rows(self, rows: int, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The role of each equal part of a batch of `rows`; one part, unknown, where it is not what was asked for.

        Nodes that split a batch, as for context windows, stand inside or outside of our wrapper: how many images were asked
        for last is in `sigmas`, and whose they are in `uuids`, which ComfyUI writes behind all of them.

        Args:
            options: the model call's transformer_options.
        """
        entries, ids, sigmas = (options.get(key) for key in ("cond_or_uncond", "uuids", "sigmas"))
        images = {self.images, len(sigmas) if isinstance(sigmas, Tensor) and sigmas.ndim == 1 else 0}
        if not entries or rows not in {count * len(entries) for count in images}:
            return (UNKNOWN,)
        by_entry = self.run.by_entry() if ids is not None and len(ids) == len(entries) else {}
        found: list[str] = []
        for place, entry in enumerate(entries):
            names = by_entry.get(ids[place], set()) if by_entry and ids is not None else set()
            if len(names) != 1:
                names = set(self.roles[entry : entry + 1])
            found.extend(names)
        return tuple(found) if len(found) == len(entries) else (UNKNOWN,)

    def recorded(self, roles: tuple[str, ...]) -> tuple[str, ...]:
        """What rows of these roles are called in a recording: those of a guidance are not the prompt's own."""
        return tuple(f"{role} guidance" for role in roles) if self.guidance else roles

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
        # guiders of two models hand each the wrappers of both
        if all(wrapper is not self for wrapper in _wrappers_of(model)):
            return executor(*args, **kwargs)
        options = (args[5] if len(args) > 5 else kwargs.get("transformer_options")) or {}
        with ExitStack() as stack:
            stack.enter_context(_adapted(self.injections, model, x, timestep, options))
            call = model_call(x, timestep, options)
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


def _wrappers_of(model: nn.Module) -> list[Any]:
    """Our wrappers on the MODEL that a model belongs to now."""
    patcher: Any = getattr(model, "current_patcher", None)
    return [] if patcher is None else patcher.get_wrappers(WrappersMP.APPLY_MODEL, KEY)


@contextmanager
def _adapted(
    injections: Iterable[Injection], model: nn.Module, x: Tensor, timestep: Tensor, options: Mapping[str, Any]
) -> Iterator[None]:
    """A model with the adapters that are active at this noise level, for the length of one call of it."""
    call = model_call(x, timestep, options)
    now = options.get(KEY)
    run = now.run if isinstance(now, Conditionings) else None
    active = [(injection, injection.attachment(model)) for injection in injections if injection.active(model, timestep)]
    with ExitStack() as stack:
        for injection, attachment in active:
            stack.enter_context(attachment.in_call(call))
            stack.enter_context(_listened(injection, attachment, model, timestep, call))
            stack.enter_context(attachment)
            attachment.sites[0][0].current.ran = False
        yield
    if run is not None:
        for injection, attachment in active:
            run.taking_part.took_part(injection, attachment.sites[0][0].current.ran)


class FunctionWrapper:
    """Around a `model_function_wrapper` that somebody else has put into a run: some run the model's blocks by themselves.

    The adapters are on the model while it works, but for the calls of `apply_model` that it makes: those of this MODEL bring
    them along, and another MODEL of the same model has others, or none.
    """

    def __init__(self, run: Run, function: Callable[..., Any]):
        self.run, self.function = run, function
        self.__module__ = getattr(function, "__module__", None) or type(function).__module__

    def __call__(self, apply_model: Callable[..., Any], args: Mapping[str, Any]) -> Any:
        model = getattr(apply_model, "__self__", None)
        if model is None or all(wrapper.injections != self.run.injections for wrapper in _wrappers_of(model)):
            return self.function(apply_model, args)
        options = args["c"].get("transformer_options") or {}

        def adapted() -> AbstractContextManager[None]:
            return _adapted(self.run.injections, model, args["input"], args["timestep"], options)

        stack = ExitStack()

        def apply(_model: nn.Module, *others: Any, **named: Any) -> Any:
            stack.close()
            try:
                return apply_model(*others, **named)
            finally:
                stack.enter_context(adapted())

        former = model.__dict__.get(_APPLY)
        try:
            stack.enter_context(adapted())
            model.__dict__[_APPLY] = MethodType(apply, model)
            return self.function(model.__dict__[_APPLY], args)
        finally:
            stack.close()
            if former is None:
                model.__dict__.pop(_APPLY, None)
            else:
                model.__dict__[_APPLY] = former

    def __deepcopy__(self, memo: dict) -> FunctionWrapper:
        return self


def model_call(x: Tensor, timestep: Tensor, options: Mapping[str, Any]) -> ModelCall:
    """What one `apply_model` call knows; `options` are its transformer_options."""
    now = options.get(KEY)

    def roles() -> tuple[str, ...]:
        return now.of_rows(x.shape[0], options) if isinstance(now, Conditionings) else (UNKNOWN,)

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
    names = now.recorded(roles) if isinstance(now, Conditionings) else roles
    recordings = [_Recording(recorder, names, call.sigma, rows) for recorder in observed]
    with attachment.sites[0][0].current.listened(*listeners, *recordings):
        yield
    for recording in recordings:
        recording.recorder.end(recording.call)


class _Recording(Listener):
    """A call for a recorder, begun with the first layer that is heard of: not every call is made that could be."""

    def __init__(self, recorder: Recorder, roles: tuple[str, ...], sigma: float | Tensor, rows: int):
        self.recorder = recorder
        self._asked: tuple[tuple[str, ...], float | Tensor, int] | None = (roles, sigma, rows)
        self.call: Call | None = None

    def record(self, layer: str, s: Tensor) -> None:
        if self._asked is not None:
            self.call, self._asked = self.recorder.begin(*self._asked), None
        if self.call is not None:
            self.call.record(layer, s)

    def measures(self, layer: str) -> bool:
        return self.call is not None and self.call.measures(layer)

    def measure(self, layer: str, s: Tensor, x: Tensor, h: Tensor | None, host: HostLayer, weights: Any) -> None:
        if self.call is not None:
            self.call.measure(layer, s, x, h, host, weights)


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
        result, model = None, guider.model_patcher.model
        try:
            result = executor(*arguments.args, **arguments.kwargs)
            return result
        finally:
            if result is not None:
                run.stepped(run.steps - 1)  # what samplers did after their last callback
                run.taking_part.tell(model, sigmas[:-1], guider.model_options, guider)
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
        conds, x = arguments[1, "conds"], arguments[2, "x_in"]
        guidance = bool(now.run.observations) and now.run.passes.guided(conds, x)
        now = replace(now, roles=now.run.roles(conds), images=x.shape[0], guidance=guidance)
        options = {**options, "transformer_options": {**transformer_options, KEY: now}}
        function = options.get(_FUNCTION_WRAPPER)
        if function is not None and not isinstance(function, FunctionWrapper):
            options[_FUNCTION_WRAPPER] = FunctionWrapper(now.run, function)
        arguments[4, "model_options"] = options
    return executor(*arguments.args, **arguments.kwargs)


def predict_noise_wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Tell the passes of a guidance from the prompts' own, in what is predicted inside; only where somebody records."""
    options = _Arguments(args, kwargs)[2, "model_options"] or {}
    now = options.get("transformer_options", {}).get(KEY)
    if isinstance(now, Conditionings) and now.run.observations:
        now.run.passes.begin(options)
    return executor(*args, **kwargs)


def prepare_state(patcher: Any, _timestep: Any, model_options: dict[str, Any] | None = None, *_others: Any) -> None:
    """The CallbacksMP.ON_PREPARE_STATE callback: a guider of two models hands the second the options of the first.

    ComfyUI calls it before it asks those options for wrappers, from the version on that has such guiders.
    """
    if not isinstance(model_options, dict):
        return
    options = model_options.setdefault("transformer_options", {})
    present = get_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY, options)
    for wrapper in patcher.get_wrappers(WrappersMP.APPLY_MODEL, KEY):
        if all(other is not wrapper for other in present):
            add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, wrapper, options)


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
