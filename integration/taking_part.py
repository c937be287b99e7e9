"""What of a MODEL took part in a sampling run, adapters, router controls and reference images, and what is said where
something did not: once, in the log and in its node."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..styleinject_core.router.control import Rule
from .injection import Injection
from .live import running_server
from .reference import AppliedReference

# What a node may put in the place of ComfyUI's own way to the model, in a run's model_options.
_REPLACED = ("sampler_calc_cond_batch_function", "model_function_wrapper")
_NO_ROWS = "the model was never asked for the {} prompt alone (at a CFG of 1 ComfyUI leaves the negative one out)."
_LOW, _HIGH, _HALVINGS = 0.0, 1.0, 20


@dataclass
class Part:
    """What one adapter or reference did in one run."""

    applied: Injection | AppliedReference
    active: bool = False  # it was on the model in a call
    ran: bool = False  # one of its layers was called then
    rules: set[int] = field(default_factory=set)  # of an adapter's router control, that had rows to steer
    unknown: bool = False  # rows that nobody can tell apart, which is said when they come


class TakingPart:
    """The parts that the adapters and references of a MODEL have in one run."""

    def __init__(self, injections: Sequence[Injection], references: Sequence[AppliedReference] = ()):
        everything: list[Injection | AppliedReference] = [*injections, *references]
        self._parts = {id(applied): Part(applied) for applied in everything}

    def took_part(self, applied: Injection | AppliedReference, ran: bool) -> None:
        """An adapter or reference was on the model for the length of a call; `ran`: a layer of it was called."""
        part = self._parts.get(id(applied))
        if part is not None:  # else it is on another MODEL, the second of a guider's
            part.active, part.ran = True, part.ran or ran

    def steered(self, injection: Injection, active: Sequence[bool], roles: Sequence[str], unknown: bool) -> None:
        """A call had rows of these roles for the rules of an adapter's control, each active at its noise level or not."""
        part = self._parts.get(id(injection))
        if part is not None:
            part.unknown |= unknown
            there = {"all", *roles}
            part.rules |= {n for n, rule in enumerate(injection.control) if active[n] and rule.role in there}

    def tell(self, model: nn.Module, levels: Tensor, options: Mapping[str, Any], guider: Any) -> None:
        """Say what had no effect in a run that is over, though its strength is not 0, and why.

        Args:
            levels: the noise level at which each step began, on the CPU.
            options: the run's model_options.
        """
        if len(levels) == 0:
            return
        for part in self._parts.values():
            applied = part.applied
            name = applied.applied.adapter.name if isinstance(applied, Injection) else f"reference {applied.name}"
            if part.ran:
                for rule in _idle_rules(part):
                    assert isinstance(applied, Injection)
                    reason = _of_percents(rule, partial(_within, applied, rule), model, levels) or _NO_ROWS.format(rule.role)
                    what = f'a router control of "{name}" ({_described(rule)})'
                    say(f"{what} had no effect in this run: {reason}", applied.node_id)
            elif _may_act(applied, model):
                reason = "" if part.active else _of_percents(applied, applied.active, model, levels)
                say(f'"{name}" had no effect in this run: {reason or _of_others(options, guider)}', applied.node_id)


def _may_act(applied: Injection | AppliedReference, model: nn.Module) -> bool:
    """Whether somebody who put it on the model expects it to do something."""
    if isinstance(applied, AppliedReference):
        return applied.reference.active
    return not applied.patched and applied.strong and bool(applied.adapted_layers(model))


def _idle_rules(part: Part) -> list[Rule]:
    """The rules of an adapter's control that never had a row to steer, but where that has been said already."""
    if isinstance(part.applied, AppliedReference):
        return []
    idle = [rule for n, rule in enumerate(part.applied.control) if n not in part.rules]
    return [rule for rule in idle if not (part.unknown and rule.role != "all")]


def _within(injection: Injection, rule: Rule, model: nn.Module, level: Tensor) -> bool:
    return injection.active(model, level) and injection.active_rules(model, level)[injection.control.index(rule)]


def _described(rule: Rule) -> str:
    whose = "every prompt" if rule.role == "all" else f"the {rule.role} prompt"
    return f"for {whose}, {rule.start_percent:g} to {rule.end_percent:g}"


def say(text: str, node_id: str = "") -> None:
    """Put a line into the log, and into a node where the browser that queued the prompt shows it.

    Args:
        node_id: the node's execution id; "" for none.
    """
    logging.warning("StyleInject: %s", text)
    server = running_server()
    client = getattr(server, "client_id", None)
    if server is None or client is None or not node_id:
        return
    try:
        server.send_progress_text(text, node_id, client)
    except Exception:  # the picture is there: a browser that cannot be told is no reason to lose it
        logging.exception("StyleInject: the line above could not be shown in node %s", node_id)


def _of_percents(
    part: Injection | AppliedReference | Rule, active: Callable[[nn.Module, Tensor], bool], model: nn.Module, levels: Tensor
) -> str:
    """Why something was never active, where its percents are the reason; else empty."""
    if any(active(model, level) for level in levels):
        return ""
    sampling: Any = model.model_sampling
    to_sigma: Callable[[float], Any] = sampling.percent_to_sigma
    first, last = (round(_percent(to_sigma, float(level)), 3) for level in (levels.max(), levels.min()))
    steps = "its only step is" if len(levels) == 1 else f"none of its {len(levels)} steps is"
    where = f"at {first:g}" if len(levels) == 1 else f"they go from {first:g} to {last:g}"
    late = first > part.end_percent
    why = " A run with a denoise below 1, or a second pass, begins late in the schedule." if late else ""
    wanted = f"start_percent {part.start_percent:g} to end_percent {part.end_percent:g}"
    if len(levels) == 1:
        return f"{steps} {where} of the noise schedule, outside of {wanted}.{why}"
    return f"{steps} inside of {wanted}: {where} of the noise schedule.{why}"


def _percent(to_sigma: Callable[[float], Any], sigma: float) -> float:
    """The inverse of percent_to_sigma, which falls: where in the noise schedule a level is, 0 to 1."""
    low, high = _LOW, _HIGH
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if float(to_sigma(middle)) > sigma else (low, middle)
    return (low + high) / 2


def _of_others(options: Mapping[str, Any], guider: Any) -> str:
    """That somebody works the model out without asking for adapters, and who that may be."""
    suspects = [options[name] for name in _REPLACED if name in options]
    owners = [getattr(function, "__module__", None) or type(function).__module__ for function in suspects]
    if not type(guider).__module__.startswith(("comfy.", "comfy_extras.")):
        owners.append(type(guider).__module__)
    found = ", ".join(dict.fromkeys(owner for owner in owners if owner))
    return "another node works the model out by itself, and did not call its layers" + (f" ({found})." if found else ".")
