"""Steering the style router: rules that change, replace or hold the style probabilities while a model runs.

A rule acts on s in this order, each part only where it is given:

    s <- weights, or held values      instead of the router's own
    s <- softmax((log s + bias) / temperature)
    s <- its top_k largest, normalized
    s <- floor + (1 - Σ floor) s      no style below its floor
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..adapter import Adapter, no_router
from ..call import Listener
from ..layers import LayerShape
from ..selector import select
from .mean import router_mean
from .trace import RouterTrace

Steer = Callable[[Tensor], Tensor]  # s of a call -> the s to use

EVERY_STYLE = "all"
ROLES = ("all", "positive", "negative")
_PARTS = {"weights": 0.0, "bias": -math.inf, "floor": 0.0}  # per style, with the least value allowed


class ControlError(ValueError):
    """A rule that cannot be read or does not fit the adapter; the message names the field."""


@dataclass(frozen=True)
class Rule:
    """What to do with s, in which layers, for which prompt, in which part of sampling.

    Args:
        weights, bias, floor: style -> number; a style by its name, by its number as "1", or "all". Weights replace s
            (normalized); a floor is the least share of a style.
        temperature: above 1 evens the styles out, below 1 sharpens.
        top_k: how many styles may be used; 0 for all.
        hold_first: keep what each conditioning had when the rule first met it in a run.
        hold_mean: s is its mean over the training, which the adapter's file has.
        hold: take s from this trace, at the nearest noise level, for the same prompt and layer; of several, from the latest
            of the adapter's name.
        layers: a layer selector. role: one of ROLES.
        start_percent, end_percent: the part of the schedule, which the host knows.

    Raises:
        ControlError: a value out of range.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    bias: Mapping[str, float] = field(default_factory=dict)
    floor: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    top_k: int = 0
    hold_first: bool = False
    hold_mean: bool = False
    hold: RouterTrace | Sequence[RouterTrace] | None = None
    layers: str = "all"
    role: str = "all"
    start_percent: float = 0.0
    end_percent: float = 1.0

    def __post_init__(self) -> None:
        for part, least in _PARTS.items():
            for style, value in getattr(self, part).items():
                if not math.isfinite(value) or value < least:
                    raise ControlError(f"{part} of style {style!r} is {value}, expected a finite number of at least {least:g}")
        if self.weights and sum(self.weights.values()) <= 0:
            raise ControlError("weights: all are 0, at least one style must have some")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ControlError(f"temperature is {self.temperature}, expected a positive number")
        if self.top_k < 0:
            raise ControlError(f"top_k is {self.top_k}, expected 0 for all styles, or more")
        if bool(self.weights) + self.hold_first + self.hold_mean + (self.hold is not None) > 1:
            raise ControlError("weights and the three ways to hold s exclude each other: chain two rules instead")
        if self.role not in ROLES:
            raise ControlError(f"role is {self.role!r}, expected one of {', '.join(ROLES)}")
        if not 0 <= self.start_percent <= self.end_percent <= 1:
            raise ControlError(
                f"start_percent {self.start_percent} and end_percent {self.end_percent}: expected 0 <= start <= end <= 1"
            )


def parse_styles(text: str) -> dict[str, float]:
    """Numbers per style from text: "flat ink = 0.7, 3 = 0.3", "all = 0.05", or in order: "0.7, 0, 0.3".

    Entries are separated by commas, semicolons or new lines; a name may have commas itself.

    Raises:
        ControlError: an entry without a number, or a style named twice.
    """
    found: dict[str, float] = {}
    for place, entry in enumerate(_entries(text), 1):
        style, equals, number = entry.rpartition("=")
        style = style.strip() if equals else str(place)
        try:
            value = float(number)
        except ValueError:
            raise ControlError(f'{entry.strip()!r}: expected "style = number", as in "flat ink = 0.7" or "3 = 0.3"') from None
        if style in found or not style:
            raise ControlError(
                f"{entry.strip()!r}: " + (f"style {style!r} is there twice" if style else "no style before the =")
            )
        found[style] = value
    return found


def _entries(text: str) -> Iterator[str]:
    """The entries of a text: an entry ends at a comma once it has its number."""
    for line in re.split(r"[;\n]", text):
        entry = ""
        for part in line.split(","):
            entry = f"{entry},{part}" if entry.strip() else part
            if "=" in entry or _is_number(entry):
                yield entry
                entry = ""
        if entry.strip():
            yield entry


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class Steering:
    """Rules bound to one adapter. It has no state: what a run must remember is in a mapping that the run owns.

    Raises:
        ControlError: a style the adapter does not have, floors above 1 together, a trace of other layers or styles.
        SelectorError: a layer selector that matches nothing.
    """

    def __init__(self, rules: Sequence[Rule], adapter: Adapter):
        self.rules = tuple(rules)
        self._bound = [_Bound(rule, adapter) for rule in rules]

    def steers(
        self,
        active: Sequence[bool],
        roles: Sequence[str],
        keys: Sequence[Hashable],
        sigma: Tensor | float,
        memory: MutableMapping[Any, Tensor],
        rows: int = 0,
    ) -> dict[str, Steer]:
        """What each layer's router goes through in one call of the host: layer -> function of s.

        Args:
            active: for each rule, whether it is in its part of sampling.
            roles, keys: of each equal part of the batch: its role, and what it is recognized by in later calls.
            sigma: the noise level of the call.
            memory: the run's own, empty at its beginning.
            rows: of the batch; where a layer sees another number of images, s stays as it is. 0: any number.
        """
        chains: dict[str, list[Steer]] = {}
        for number, (bound, on) in enumerate(zip(self._bound, active, strict=True)):
            wanted = [k for k, role in enumerate(roles) if bound.rule.role in ("all", role)]
            if on and wanted:
                for layer in bound.layers:
                    chains.setdefault(layer, []).append(_Call(bound, number, layer, roles, keys, wanted, sigma, memory, rows))
        return {layer: chain[0] if len(chain) == 1 else _Chain(chain) for layer, chain in chains.items()}


class Steered(Listener):
    """Steers the layers that `steers` names, for one call of the host."""

    def __init__(self, steers: Mapping[str, Steer]):
        self._steers = steers

    def steer(self, layer: str, s: Tensor) -> Tensor:
        steer = self._steers.get(layer)
        return s if steer is None else steer(s)


class GivenStyles(Listener):
    """One style for each image, in the place of what its router says.

    Args:
        styles: (B,) numbers from 0, on the device of s; -1 leaves an image to its router. Layers that see another number of
            images, or have fewer styles, are left to theirs.
    """

    def __init__(self, styles: Tensor):
        self.styles = styles
        self._most = int(styles.max()) if len(styles) else 0
        self._unlike: dict[str, Tensor] = {}
        self._share = 1.0  # of the batch

    def of(self, rows: Sequence[int]) -> GivenStyles:
        part = GivenStyles(self.styles[list(rows)])
        part._unlike, part._share = self._unlike, self._share * len(rows) / len(self.styles)
        return part

    def steer(self, layer: str, s: Tensor) -> Tensor:
        if s.shape[0] != len(self.styles) or s.shape[-1] <= self._most:
            return s
        given = one_hot(self.styles.clamp(min=0), s.shape[-1]).to(s.dtype)
        shape = (len(s), *([1] * (s.ndim - 1)))  # by token: the same for every token
        left, given = self.styles.view(shape) < 0, given.view(*shape[:-1], -1)
        if s.requires_grad:
            share = (s * given).sum(-1, keepdim=True).float().clamp(min=torch.finfo(torch.float32).tiny)
            unlike = -share.log().masked_fill(left, 0.0).mean() * self._share
            self._unlike[layer] = self._unlike[layer] + unlike if layer in self._unlike else unlike
        return torch.where(left, s, given)

    def unlike(self) -> Tensor | float:
        """How far the routers' own choices are from the given styles: -log s of the given style, the mean over images and
        tokens, summed over the layers called so far, where a router is trained; images left to theirs count 0."""
        return torch.stack(list(self._unlike.values())).sum() if self._unlike else 0.0


@dataclass(frozen=True)
class _Chain:
    steers: list[Steer]

    def __call__(self, s: Tensor) -> Tensor:
        for steer in self.steers:
            s = steer(s)
        return s


class _Bound:
    """One rule with its numbers as tensors, for the layers of one adapter."""

    def __init__(self, rule: Rule, adapter: Adapter):
        self.rule, styles = rule, adapter.style_names
        routed = adapter.routed
        if not routed:
            raise ControlError(no_router(adapter, "control"))
        shapes: dict[str, LayerShape] = {name: layer.shape for name, layer in routed.items()}
        chosen = select(shapes, rule.layers)
        # a layer with another number of styles than the adapter's is left alone: its styles have no names
        self.layers = [n for n, layer in routed.items() if n in chosen and layer.styles == len(styles)]
        self._vectors = {
            part: _vector(part, getattr(rule, part), styles, adapter.name) for part in _PARTS if getattr(rule, part)
        }
        if "weights" in self._vectors:
            self._vectors["weights"] = self._vectors["weights"] / self._vectors["weights"].sum()
        if "floor" in self._vectors and self._vectors["floor"].sum() > 1 + 1e-6:
            raise ControlError(f"floor: together {float(self._vectors['floor'].sum()):g}, expected at most 1")
        self._trace = None if rule.hold is None else _trace_of(adapter.name, rule.hold)
        if self._trace is not None:
            _check_trace(self._trace, self.layers, styles, adapter.name)
        self._means = router_mean(adapter) if rule.hold_mean else {}
        if rule.hold_mean and not self._means:
            raise ControlError(
                f"{adapter.name}: its file does not have the mean of its router to hold it at: an older version trained it; "
                "train it again, or hold it to a trace"
            )
        self._on_device: dict[tuple[Hashable, ...], Tensor] = {}

    def vector(self, part: str, like: Tensor) -> Tensor | None:
        """The numbers of a part per style, (n,), on the device of `like`; None where the rule has none."""
        return self._moved((part,), self._vectors[part], like) if part in self._vectors else None

    def held(self, layer: str, role: str, images: int, sigma: Tensor | float, like: Tensor) -> Tensor | None:
        """The mean of s, or the trace's s at the nearest noise level, (images, n); None where there is none for the layer."""
        if layer in self._means:
            return self._moved(("mean", layer), self._means[layer], like).expand(images, -1)
        trace = self._trace
        if trace is None or layer not in trace.layers:
            return None
        rows = trace.rows(role if role in trace.roles else None)
        levels = self._moved(("levels", role), trace.sigmas[rows], like)
        table = self._moved(("table", role), trace.probabilities[rows], like)
        nearest = (levels - sigma).abs().argmin().unsqueeze(0)  # an index on the device: nothing waits for it
        values = table[:, trace.layers.index(layer)].index_select(0, nearest).squeeze(0)  # (images of the trace, n)
        return values if values.shape[0] == images else values.nanmean(0, keepdim=True).expand(images, -1)

    def _moved(self, key: tuple[Hashable, ...], values: Tensor, like: Tensor) -> Tensor:
        place = (*key, like.device)
        if place not in self._on_device:
            self._on_device[place] = values.to(like.device)
        return self._on_device[place]

    def change(self, s: Tensor, instead: Tensor | None) -> Tensor:
        """The rule's formula; `instead`, where given, takes the place of s (NaN leaves it)."""
        weights, bias, floor = (self.vector(part, s) for part in _PARTS)
        out = s
        if instead is not None:
            instead = instead if instead.ndim == s.ndim else instead.unsqueeze(1)  # by token: the same for every token
            out = torch.where(instead.isnan(), s, instead.to(s.dtype)).expand_as(s)
        if weights is not None:
            out = weights.to(s.dtype).expand_as(s)
        if bias is not None or self.rule.temperature != 1:
            logits = out.clamp(min=torch.finfo(s.dtype).tiny).log()
            out = torch.softmax((logits if bias is None else logits + bias) / self.rule.temperature, -1)
        if 0 < self.rule.top_k < s.shape[-1]:
            largest = out.topk(self.rule.top_k, -1)
            out = torch.zeros_like(out).scatter(-1, largest.indices, largest.values)
            out = out / out.sum(-1, keepdim=True)
        if floor is not None:
            out = floor + (1 - floor.sum()) * out
        return out


@dataclass(frozen=True)
class _Call:
    """One rule at one layer in one call of the host."""

    bound: _Bound
    number: int
    layer: str
    roles: Sequence[str]
    keys: Sequence[Hashable]
    wanted: list[int]  # the parts of the batch it acts on
    sigma: Tensor | float
    memory: MutableMapping[Any, Tensor]
    rows: int

    def __call__(self, s: Tensor) -> Tensor:
        if self.rows and s.shape[0] != self.rows:
            return s
        images = s.shape[0] // len(self.roles)
        parts = list(s.split(images))
        for k in self.wanted:
            parts[k] = self.bound.change(parts[k], self._instead(parts[k], k))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _instead(self, s: Tensor, part: int) -> Tensor | None:
        if not self.bound.rule.hold_first:
            return self.bound.held(self.layer, self.roles[part], s.shape[0], self.sigma, s)
        first = self.memory.setdefault((self.number, self.layer, self.keys[part], s.shape), s.detach())
        return first.to(s.device)


def _vector(part: str, values: Mapping[str, float], styles: Sequence[str], adapter: str) -> Tensor:
    vector = torch.full((len(styles),), values.get(EVERY_STYLE, 0.0))
    for style, value in values.items():
        if style != EVERY_STYLE:
            vector[_place(part, style, styles, adapter)] = value
    return vector


def _place(part: str, style: str, styles: Sequence[str], adapter: str) -> int:
    if style in styles:
        return styles.index(style)
    if style.isdecimal() and 1 <= int(style) <= len(styles):
        return int(style) - 1
    names = ", ".join(styles[:8]) + (" and more" if len(styles) > 8 else "")
    raise ControlError(f"{part}: {adapter} has no style {style!r}; it has {len(styles)}: {names}")


def _trace_of(adapter: str, traces: RouterTrace | Sequence[RouterTrace]) -> RouterTrace:
    """The latest trace of the adapter's name; a single one may have another, for files are renamed."""
    traces = [traces] if isinstance(traces, RouterTrace) else list(traces)
    own = [trace for trace in traces if trace.adapter == adapter]
    if not own and len(traces) != 1:
        names = ", ".join(dict.fromkeys(trace.adapter for trace in traces)) or "none"
        raise ControlError(f"hold: expected a trace of {adapter}, found those of {names}")
    return (own or traces)[-1]


def _check_trace(trace: RouterTrace, layers: Sequence[str], styles: Sequence[str], adapter: str) -> None:
    common = len(set(layers) & set(trace.layers))
    if not trace.roles or len(trace.styles) != len(styles) or not common:
        raise ControlError(
            f"the trace to hold to is of {trace.adapter}, with {len(trace.styles)} styles in {len(trace.layers)} layers; "
            f"{adapter} has {len(styles)} styles in {len(layers)} layers, {common} of them in common"
        )
