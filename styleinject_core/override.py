"""The forward override of one module: how adapters, and rows to append, get between a host layer and its caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from .call import CurrentCall, ModelCall
from .functional.host import HostLayer, as_tokens
from .layers import LayerShape
from .plan import Plan
from .site import Site

_ACTIVE = "_styleinject_override"


@dataclass(eq=False)
class Tail:
    """Rows that are appended to what one module returns, as tokens of a reference image are to keys and values.

    Args:
        rows: given the module's input (B, L, k), its output (B, L, d) and the call, the rows (B, S, d), or None for none.
        current: the call that the module is in.
    """

    rows: Callable[[Tensor, Tensor, ModelCall], Tensor | None]
    current: CurrentCall


class Override:
    """The instance-level `forward` that a module has while sites are installed on it.

    One override serves every attachment on the module, so that their increments add up and they can leave in any
    order; with the last one the module is as it was before. Adapters come first and see the module's own rows alone,
    whatever is appended to them. The module's `forward` is the override itself: one object
    for its whole life, which spares compiled models a recompilation, and no reference cycle, which would keep a model's
    weights in memory until Python's collector comes by.
    """

    def __init__(self, module: nn.Module, shape: LayerShape):
        self.module: Any = module
        self.shape = shape
        self.sites: list[Site] = []
        self.tails: list[Tail] = []
        self._plan: Plan | None = None
        self._constants: dict[Any, Any] = {}
        self._class_forward = type(module).forward.__get__(module)
        self._former: Callable[..., Tensor] | None = None  # an instance-level forward somebody set before us

    def install(self, part: Site | Tail) -> None:
        """Add a site or a tail to the module's active override, this one where there is none yet."""
        attributes = self.module.__dict__
        active: Any = attributes.get(_ACTIVE)
        if active is None:
            self._former = attributes.get("forward")
            attributes[_ACTIVE] = attributes["forward"] = self
            active = self
        (active.tails if isinstance(part, Tail) else active.sites).append(part)

    @staticmethod
    def remove(module: nn.Module, part: Site | Tail) -> None:
        """Take a site or a tail off the module; with the last one, restore the module's forward.

        Where somebody else has put a forward over ours in the meantime, ours stays below it and passes through.
        """
        attributes = module.__dict__
        active = attributes.get(_ACTIVE)
        if not isinstance(active, Override):
            return
        parts: list[Any] = active.tails if isinstance(part, Tail) else active.sites
        if part in parts:
            parts.remove(part)
        on_top = attributes.get("forward") is active
        if active.sites or active.tails or not on_top:
            return
        del attributes[_ACTIVE]
        if active._former is None:
            del attributes["forward"]
        else:
            attributes["forward"] = active._former
        active._former = None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """h* of the module (or h, bit for bit, where every strength is 0), with the rows that are appended to it."""
        if not self.sites:  # rows alone, or neither where somebody else's forward is on top
            out = self._original(x, *args, **kwargs)
            return self._with_tails(x, out) if self.tails else out
        plan = self._plan
        if plan is None or not plan.holds(self.sites, x, self._class_forward if self._former is None else self._former):
            plan = self._new_plan(x)
        line = None if args or kwargs else plan.line(x)
        if line is not None:
            out = line(x)
        elif not plan.active:
            out = self._original(x, *args, **kwargs)
        elif self.shape.other:
            with _changed(self.module, plan.active):
                out = self._original(x, *args, **kwargs)
        else:
            out = self._adapted(plan, x, args, kwargs)
        for current in plan.current:
            current.ran = True
        return out if not self.tails else self._with_tails(x, out)

    def _with_tails(self, x: Tensor, out: Tensor) -> Tensor:
        for tail in self.tails:
            tail.current.ran = True
        found = (tail.rows(x, out, tail.current.call) for tail in self.tails)
        return torch.cat([out, *(rows for rows in found if rows is not None)], 1)

    def _adapted(self, plan: Plan, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        first, host, tokens = plan.active[0], plan.host, x
        if host.shape.kernel is None:
            tokens = as_tokens(x, first.program.samples(x, first.name, first.current.call.images))
        seen = None
        if plan.looks and first.current.call.tokens is not None:
            seen = first.tokens(tokens.shape[1])
        for site in plan.reading:
            host = replace(host, prompt=site.prompt())
        if tokens is x and seen is None and not args and not kwargs:
            return plan.run(x, host)

        def frozen(y: Tensor) -> Tensor:
            if y is not tokens:
                return self._original(y, *args, **kwargs)
            out = self._original(x, *args, **kwargs)
            return out if tokens is x else out.reshape(*tokens.shape[:-1], -1)

        host = replace(host, forward=frozen)
        out = plan.run(tokens, host) if seen is None else plan.run_on(tokens, host, *seen)
        return out if tokens is x else out.reshape(*x.shape[:-1], -1)

    @property
    def _original(self) -> Callable[..., Tensor]:
        return self._class_forward if self._former is None else self._former

    def _new_plan(self, x: Tensor) -> Plan:
        keep = not torch.compiler.is_compiling()
        plan = Plan(self.sites, x, self._frozen(x, keep), keep)
        if keep:
            self._plan = plan if plan.kept else None
        return plan

    def _frozen(self, x: Tensor, keep: bool) -> HostLayer:
        """The module by itself."""
        weight = bias = read = None
        if self.sites:
            program = self.sites[0].program
            read = partial(program.frozen_weight, self.module)
            if self._former is None and program.readable(self.module, x):
                weight, bias = self.module._parameters["weight"], self.module._parameters["bias"]
        return HostLayer(self.shape, self._original, weight, bias, self.module, self._constants if keep else None, read)


Part = TypeVar("Part", Site, Tail)
Kind = TypeVar("Kind", bound="Installation[Any]")


class Installation(Generic[Part]):
    """Parts on the modules of a host that are put on and taken off together; a context manager, whose blocks nest."""

    def __init__(self) -> None:
        self._places: list[tuple[Override, Part]] = []
        self._installed = 0

    def install(self: Kind) -> Kind:
        """Put the overrides in place; calls nest."""
        self._installed += 1
        if self._installed == 1:
            for override, part in self._places:
                override.install(part)
        return self

    def detach(self) -> None:
        """Take them off; the host is as it was before this installation, whatever else was put on it since."""
        if self._installed == 0:
            return
        self._installed -= 1
        if self._installed == 0:
            for override, part in self._places:
                Override.remove(override.module, part)

    def __enter__(self: Kind) -> Kind:
        return self.install()

    def __exit__(self, *exception: Any) -> None:
        self.detach()


@contextmanager
def _changed(module: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """Other parameters for the length of a with block: how a fixed change gets onto what is neither Linear nor Conv2d."""
    own, names = module._parameters, dict.fromkeys((*(site.parameter for site in sites), "bias"))
    kept: dict[str, Any] = {name: own[name] for name in names if own.get(name) is not None}
    try:
        for name, parameter in kept.items():
            changed = parameter.detach().float()
            for site in sites:
                change = site.layer.shift() if name == "bias" else None
                if name == site.parameter:
                    change = site.layer.change(parameter.detach())
                if change is not None:
                    changed = changed + site.dma * change.to(changed.device)
            module._parameters[name] = changed.to(parameter.dtype)  # type: ignore[assignment]
        yield
    finally:
        module._parameters.update(kept)
