"""Sampling with a MODEL that has adapters: how they get onto the model for each of its calls.

A run is made in a WrappersMP.OUTER_SAMPLE wrapper and travels in the run's own copy of `transformer_options`; a
CALC_COND_BATCH wrapper adds which conditionings are being worked out; the APPLY_MODEL wrapper finds both there, and makes of
them the `ModelCall` that the adapters' layers see. So nothing outlives the run, and two runs, or the threads of several GPUs,
cannot mix theirs up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key, get_wrappers_with_key
from torch import Tensor, nn

from ..styleinject_core import Attachment
from ..styleinject_core.call import Listener, ModelCall, Tokens
from ..styleinject_core.functional.host import HostLayer
from ..styleinject_core.router.control import Steered
from ..styleinject_core.router.recorder import Call, Recorder
from .injection import KEY, Injection
from .monitor import Monitor
from .places import forget_prompts
from .reference import AppliedReference, masked_options, unmasked_options
from .sampling_run import UNKNOWN, Conditionings, Run
from .tokens import prompt_of, tokens_of

_FUNCTION_WRAPPER = "model_function_wrapper"
_APPLY = "apply_model"
_OPTIONS = (5, "transformer_options")  # where apply_model has them among its arguments
_CONTEXT = (3, "c_crossattn")


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
        arguments = _Arguments(args, kwargs)
        options = arguments[_OPTIONS] or {}
        with _applied(self.injections, self.references, model, x, timestep, options, given_of(args, kwargs)) as own:
            if own is not options:
                arguments[_OPTIONS] = own
            return executor(*arguments.args, **arguments.kwargs)

    def __deepcopy__(self, memo: dict) -> ApplyModelWrapper:
        return self  # some versions deep-copy a model's options; the adapters in here are not theirs to copy


def given_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a call of apply_model with these arguments is given by name, and the text conditioning, however it is given."""
    return {**kwargs, "c_crossattn": _Arguments(args, dict(kwargs))[_CONTEXT]}


def _wrappers_of(model: nn.Module) -> list[Any]:
    """Our wrappers on the MODEL that a model belongs to now."""
    patcher: Any = getattr(model, "current_patcher", None)
    return [] if patcher is None else patcher.get_wrappers(WrappersMP.APPLY_MODEL, KEY)


@contextmanager
def _applied(
    injections: Iterable[Injection],
    references: Iterable[AppliedReference],
    model: nn.Module,
    x: Tensor,
    timestep: Tensor,
    options: Mapping[str, Any],
    given: Mapping[str, Any],
) -> Iterator[Mapping[str, Any]]:
    """A model with what is active at this noise level, for the length of one call of it; yields the transformer_options
    that the call needs, the same ones where no reference has a mask. `given` is what else the call is given, by name."""
    with ExitStack() as stack:
        call = stack.enter_context(_adapted(injections, model, x, timestep, options, given))
        active = [reference for reference in references if reference.active(model, timestep)]
        calls = [reference.call(call) for reference in active]
        attachments = [reference.attachment(model) for reference in active]
        for attached, own in zip(attachments, calls, strict=True):
            stack.enter_context(attached.in_call(own))
            stack.enter_context(attached)
            attached.current.ran = False
        masked = any(reference.mask is not None for reference in active)
        yield masked_options(active, model, x, calls, options) if masked else options
        run = _run_of(options)
        if run is not None:
            for reference, attached in zip(active, attachments, strict=True):
                run.taking_part.took_part(reference, attached.current.ran)


def _run_of(options: Mapping[str, Any]) -> Run | None:
    """The run that a call with these transformer_options belongs to."""
    now = options.get(KEY)
    return now.run if isinstance(now, Conditionings) else None


@contextmanager
def _adapted(
    injections: Iterable[Injection],
    model: nn.Module,
    x: Tensor,
    timestep: Tensor,
    options: Mapping[str, Any],
    given: Mapping[str, Any],
) -> Iterator[ModelCall]:
    """A model with the adapters that are active at this noise level, for the length of one call of it, which it yields.

    Args:
        given: what else the call is given, by name.
    """
    active = [(injection, injection.attachment(model)) for injection in injections if injection.active(model, timestep)]
    prompt = prompt_of(given) if any(attachment.reads_prompt for _, attachment in active) else None
    call = model_call(x, timestep, options, tokens_of(model, x, given), prompt)
    run = _run_of(options)
    with ExitStack() as stack:
        for injection, attachment in active:
            stack.enter_context(attachment.in_call(call))
            stack.enter_context(_listened(injection, attachment, model, timestep, call))
            stack.enter_context(attachment)
            attachment.sites[0][0].current.ran = False
        if active:
            forget_prompts(model)
            stack.callback(forget_prompts, model)
        yield call
    if run is not None:
        for injection, attachment in active:
            run.taking_part.took_part(injection, attachment.sites[0][0].current.ran)


class FunctionWrapper:
    """Around a `model_function_wrapper` that somebody else has put into a run: some run the model's blocks by themselves.

    Adapters and references are on the model while it works, but for the calls of `apply_model` that it makes: those of this
    MODEL bring them along, and another MODEL of the same model has others, or none.
    """

    def __init__(self, run: Run, function: Callable[..., Any]):
        self.run, self.function = run, function
        self.__module__ = getattr(function, "__module__", None) or type(function).__module__

    def __call__(self, apply_model: Callable[..., Any], args: Mapping[str, Any]) -> Any:
        model = getattr(apply_model, "__self__", None)
        run = self.run
        own = (run.injections, run.references)
        if model is None or all((wrapper.injections, wrapper.references) != own for wrapper in _wrappers_of(model)):
            return self.function(apply_model, args)
        options = args["c"].get("transformer_options") or {}

        def applied() -> AbstractContextManager[Mapping[str, Any]]:
            return _applied(*own, model, args["input"], args["timestep"], options, args["c"])

        stack = ExitStack()

        def apply(_model: nn.Module, *others: Any, **named: Any) -> Any:
            arguments = _Arguments(others, named)
            if given := arguments[_OPTIONS]:
                arguments[_OPTIONS] = unmasked_options(given)
            stack.close()
            try:
                return apply_model(*arguments.args, **arguments.kwargs)
            finally:
                stack.enter_context(applied())

        former = model.__dict__.get(_APPLY)
        try:
            masked = stack.enter_context(applied())
            if masked is not options:
                args = {**args, "c": {**args["c"], "transformer_options": masked}}
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


def model_call(
    x: Tensor, timestep: Tensor, options: Mapping[str, Any], tokens: Tokens | None = None, prompt: Tensor | None = None
) -> ModelCall:
    """What one `apply_model` call knows; `options` are its transformer_options."""
    now = options.get(KEY)

    def roles() -> tuple[str, ...]:
        return now.of_rows(x.shape[0], options) if isinstance(now, Conditionings) else (UNKNOWN,)

    # no count where gradients are wanted: a backward pass may run blocks of an earlier call again
    images = 0 if torch.is_grad_enabled() else x.shape[0]
    return ModelCall(images, timestep.flatten()[0], options, roles, tokens=tokens, prompt=prompt)


@contextmanager
def _listened(
    injection: Injection, attachment: Attachment, model: nn.Module, timestep: Tensor, call: ModelCall
) -> Iterator[None]:
    """Steer and record one adapter for the length of one model call, where its controls and monitors ask for it."""
    now, run = call.extras.get(KEY), _run_of(call.extras)
    observed = [] if run is None else [o.recorder for o in run.observations if o.injection is injection]
    if injection.steering is None and not observed:
        yield
        return
    roles, rows = call.roles, timestep.shape[0]
    listeners: list[Listener] = []
    if injection.steering is not None:
        ids = call.extras.get("uuids") or ()
        keys = [(id(injection), role, ids[k] if len(ids) == len(roles) else k) for k, role in enumerate(roles)]
        memory = {} if run is None else run.memory
        active = injection.active_rules(model, timestep)
        if run is not None:
            if roles == (UNKNOWN,):
                run.warn_of_unknown_rows(injection)
            run.taking_part.steered(injection, active, roles, roles == (UNKNOWN,))
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
    """The OUTER_SAMPLE wrapper of a MODEL that has adapters or references: makes the run that its model calls belong to."""

    def __init__(
        self, injections: Sequence[Injection], monitors: Sequence[Monitor], references: Sequence[AppliedReference] = ()
    ):
        self.injections, self.monitors, self.references = tuple(injections), tuple(monitors), tuple(references)

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        guider = executor.class_obj
        if self not in guider.model_patcher.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
            return executor(*args, **kwargs)
        arguments = _Arguments(args, kwargs)
        sigmas = arguments[3, "sigmas"].detach().float().cpu()
        run = Run(guider, sigmas, self.injections, self.monitors, self.references)
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
        now = replace(now, conds=conds, images=x.shape[0], guidance=guidance)
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
