"""Whether an adapter took part in a sampling run, and what is said where it did not: once, in the log and in its node."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .injection import Injection
from .live import running_server

# What a node may put in the place of ComfyUI's own way to the model, in a run's model_options.
_REPLACED = ("sampler_calc_cond_batch_function", "model_function_wrapper")
_LOW, _HIGH, _HALVINGS = 0.0, 1.0, 20


@dataclass
class Part:
    """What one adapter did in one run."""

    injection: Injection
    active: bool = False  # it was on the model in a call
    ran: bool = False  # one of its layers was called then


class TakingPart:
    """The parts that the adapters of a MODEL have in one run."""

    def __init__(self, injections: Sequence[Injection]):
        self._parts = {id(injection): Part(injection) for injection in injections}

    def took_part(self, injection: Injection, ran: bool) -> None:
        """An adapter was on the model for the length of a call; `ran`: a layer of it was called."""
        part = self._parts.get(id(injection))
        if part is not None:  # else it is on another MODEL, the second of a guider's
            part.active, part.ran = True, part.ran or ran

    def tell(self, model: nn.Module, levels: Tensor, options: Mapping[str, Any], guider: Any) -> None:
        """Say which adapters of a strength that is not 0 had no effect in a run that is over, and why.

        Args:
            levels: the noise level at which each step began, on the CPU.
            options: the run's model_options.
        """
        if len(levels) == 0:
            return
        for part in self._parts.values():
            injection = part.injection
            if part.ran or injection.patched or not injection.strong or not injection.adapted_layers(model):
                continue
            reason = "" if part.active else _of_percents(injection, model, levels)
            name = injection.applied.adapter.name
            say(f'"{name}" had no effect in this run: {reason or _of_others(options, guider)}', injection.node_id)


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


def _of_percents(injection: Injection, model: nn.Module, levels: Tensor) -> str:
    """Why an adapter was never active, where its percents are the reason; else empty."""
    if any(injection.active(model, level) for level in levels):
        return ""
    sampling: Any = model.model_sampling
    to_sigma: Callable[[float], Any] = sampling.percent_to_sigma
    first, last = (round(_percent(to_sigma, float(level)), 3) for level in (levels.max(), levels.min()))
    steps = "its only step is" if len(levels) == 1 else f"none of its {len(levels)} steps is"
    where = f"at {first:g}" if len(levels) == 1 else f"they go from {first:g} to {last:g}"
    late = first > injection.end_percent
    why = " A run with a denoise below 1, or a second pass, begins late in the schedule." if late else ""
    wanted = f"start_percent {injection.start_percent:g} to end_percent {injection.end_percent:g}"
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
