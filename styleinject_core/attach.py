"""attach: put adapters on a host model's layers, and take them off again without a trace."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from weakref import ref

from torch import nn
from torch.utils.hooks import RemovableHandle

from .adapter import Adapter
from .call import CurrentCall, ModelCall
from .layers import LayerShape, UnsupportedLayerError
from .methods import AdapterLayer
from .override import Installation, Override
from .selector import parse_weights, select
from .site import HostProgram, Rows, Site


class AdapterMismatchError(ValueError):
    """An adapter does not fit the host: nothing matches, or a layer's sizes differ. The message names both sides."""


@dataclass(frozen=True)
class Applied:
    """One adapter with its strengths, on the layers a selector leaves (method, section 2).

    Args:
        strength: scales both parts; 0 is the base model bit for bit, 1 the trained adapter, negative and > 1 allowed.
        dma, sta: strengths of the low-rank increment and of the AdaIN step.
        layers: a layer selector (`styleinject_core.selector`).
        layer_weights: `selector = number` lines that scale both parts per layer.

    Raises:
        ValueError: a strength that is no finite number.
    """

    adapter: Adapter
    strength: float = 1.0
    dma: float = 1.0
    sta: float = 1.0
    layers: str = "all"
    layer_weights: str = ""

    def __post_init__(self) -> None:
        for label in ("strength", "dma", "sta"):
            value = getattr(self, label)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{self.adapter.name}: {label} must be a finite number, found {value!r}")

    def layer_scales(self) -> dict[str, float]:
        """The weight of every layer that the selector leaves. Raises SelectorError."""
        shapes = self.adapter.shapes
        chosen = select(shapes, self.layers)
        return {name: weight for name, weight in parse_weights(shapes, self.layer_weights).items() if name in chosen}


@dataclass(frozen=True)
class MatchReport:
    """Which layers of one adapter found a module of the host; names in the adapter's spelling.

    Args:
        skipped, unused: see `Adapter`.
        biases: layers whose bias was to change, and is not there.
        narrowed: layers that have more input channels in this model, of which the adapter changes the first.
    """

    adapter: str
    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    unused: Mapping[str, str] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    narrowed: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Layers in the file that are for such a model."""
        return len(self.matched) + len(self.unmatched) + len(self.unused)

    @property
    def share(self) -> float:
        """How much of the file is in use, 0 to 1."""
        return len(self.matched) / max(self.total, 1)

    def __str__(self) -> str:
        partial = f" ({self.share:.0%})" if self.share < 1 else ""
        lines = [f"{self.adapter}: {len(self.matched)} of {self.total} layers matched{partial}"]
        reasons: dict[str, list[str]] = {"not in this model": list(self.unmatched)}
        for key, reason in self.unused.items():
            reasons.setdefault(reason, []).append(key)
        reasons["changes of biases that these layers of the model do not have"] = list(self.biases)
        reasons["with more input channels in this model, of which the adapter changes those it was made for"] = list(
            self.narrowed
        )
        reasons["for another model (a text encoder, a VAE)"] = list(self.skipped)
        lines += [f"  {label} ({len(names)}): {_first(names)}" for label, names in reasons.items() if names]
        return "\n".join(lines)


def _first(names: Sequence[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(name if len(name) <= 200 else f"{name[:100]}..." for name in names[:count]) + more


@dataclass(frozen=True)
class Place:
    """Where in a host an adapter's layer is: a module, or some rows of its weight where it fuses several layers; or, for
    fixed changes, another of its parameters (the modulation of some transformers' blocks)."""

    module: str
    rows: Rows | None = None
    parameter: str = "weight"

    @classmethod
    def of(cls, place: str | Place) -> Place:
        return cls(place) if isinstance(place, str) else place


class _Matching:
    """One adapter's layers, looked for in a host one by one."""

    def __init__(self, item: Applied, modules: Mapping[str, nn.Module], names: Mapping[str, str | Place], program: HostProgram):
        self.item, self.modules, self.names, self.program = item, modules, names, program
        self.layers, self.selected, self.current = item.adapter.layers, item.layer_scales(), CurrentCall()
        self.sites: list[Site] = []
        self.places: list[tuple[nn.Module, LayerShape, Site]] = []
        self.unmatched: list[str] = []
        self.biases: list[str] = []
        self.other_inputs: dict[str, LayerShape] = {}  # layers of which only the number of input channels differs
        self._taken: dict[Place, str] = {}

    def match(self, name: str) -> None:
        """Find one layer's place.

        Raises:
            AdapterMismatchError: a layer of other sizes, or one that another name of the adapter means too.
        """
        place, layer = Place.of(self.names.get(name, name)), self.layers[name]
        module = self.modules.get(place.module)
        if module is None:
            self.unmatched.append(name)
            return
        if (other := self._taken.setdefault(place, name)) != name:
            raise AdapterMismatchError(
                f"{self.item.adapter.name}: {other} and {name} are one layer of the model, {place.module}"
            )
        whole = _host_shape(name, module, layer.fixed and place.rows is None, place.parameter)
        fitting = self._fitted(name, layer, whole if place.rows is None else replace(whole, out_features=place.rows.size))
        if fitting is not None and fitting.shift() is not None and getattr(module, "bias", None) is None:
            self.biases.append(name)
            fitting = fitting.without_bias()
        if fitting is not None:
            site = Site(name, fitting, self.program, self.current, place.rows, adapter=self.item.adapter.name)
            site.parameter = place.parameter
            self.sites.append(site)
            self.places.append((module, whole, site))

    def _fitted(self, name: str, layer: AdapterLayer, shape: LayerShape) -> AdapterLayer | None:
        """The layer for a host layer of that shape; None where it does not fit and is not selected.

        One layer may have another number of input channels: the first of an inpainting or edit model takes more than a latent.
        """
        fitting = layer.on(shape)
        if fitting is not None or name not in self.selected:
            return fitting
        if self.other_inputs or replace(shape, in_features=layer.shape.in_features) != layer.shape:
            raise self._mismatch(name, shape)
        self.other_inputs[name] = shape
        return layer if shape.in_features > layer.shape.in_features else None

    def _mismatch(self, name: str, shape: LayerShape) -> AdapterMismatchError:
        return AdapterMismatchError(
            f"{self.item.adapter.name}: {name}: adapter made for {self.layers[name].shape}, model has {shape}; "
            f'a layer selector can leave it out: "!{name}"'
        )

    def check(self) -> None:
        """Raise AdapterMismatchError where the one layer with other input channels is all there is: it is another model."""
        for name, shape in self.other_inputs.items():
            if all(site.name == name for site in self.sites):
                raise self._mismatch(name, shape)

    def report(self) -> MatchReport:
        """What was found."""
        adapter, matched = self.item.adapter, tuple(site.name for site in self.sites)
        narrowed = tuple(name for name in self.other_inputs if name in matched)
        fewer = {
            name: f"made for {self.layers[name].shape.in_features} input channels, the model has {shape.in_features}"
            for name, shape in self.other_inputs.items()
            if name not in narrowed
        }
        unused = {**adapter.unused, **fewer}
        return MatchReport(adapter.name, matched, tuple(self.unmatched), adapter.skipped, unused, tuple(self.biases), narrowed)


Self = TypeVar("Self", bound="Attachment")


class Attachment(Installation[Site]):
    """Adapters matched to a host's modules; a context manager that installs them for its length.

    Args:
        host: any module tree.
        applied: the adapters with their strengths. Their increments add up, the order does not matter.
        names: adapter module name -> where it is in the host: a module's name, or a `Place`.
        program: what is special about the host program.

    Raises:
        AdapterMismatchError: an adapter none of whose layers is in the host, or a layer of other sizes.
        SelectorError: a selector that matches nothing.
    """

    def __init__(
        self,
        host: nn.Module,
        applied: Sequence[Applied],
        names: Mapping[str, str | Place] | None = None,
        program: HostProgram | None = None,
    ):
        super().__init__()
        self.program = program or HostProgram()
        self._hook: RemovableHandle | None = None  # where a router reads the prompt that the host is called with
        self._host = ref(host)  # weak: hosts may be freed while something remembers what was attached to them
        self.applied = list(applied)
        self.reports: list[MatchReport] = []
        self.sites: list[list[Site]] = []  # one list per adapter
        modules = dict(host.named_modules())
        overrides: dict[nn.Module, Override] = {}
        for item in self.applied:
            found = _Matching(item, modules, names or {}, self.program)
            for name in item.adapter.names:
                found.match(name)
            found.check()
            self.sites.append(found.sites)
            self._places.extend((overrides.setdefault(m, Override(m, whole)), site) for m, whole, site in found.places)
            self.reports.append(found.report())
            if not found.sites:
                raise AdapterMismatchError(
                    f"{item.adapter.name}: none of its {len(found.unmatched)} layers is in the model; "
                    f"the first it looked for: {_first(found.unmatched)}"
                )
            _check_share(self.reports[-1], found.selected)
        for index in range(len(self.applied)):
            self._refresh(index)
        reading = (sites[0].current for sites in self.sites if any(site.layer.prompt_features for site in sites))
        self._reading = list(reading)

    @property
    def reads_prompt(self) -> bool:
        """Whether the router of any adapter reads the prompt."""
        return bool(self._reading)

    @property
    def host(self) -> nn.Module:
        """The model the adapters are matched to. Raises ReferenceError: it is gone."""
        host = self._host()
        if host is None:
            raise ReferenceError("the model these adapters were attached to is gone")
        return host

    def _refresh(self, index: int) -> None:
        item = self.applied[index]
        scales = item.layer_scales()
        for site in self.sites[index]:
            scale = item.strength * scales.get(site.name, 0.0)
            site.dma, site.sta = scale * item.dma, scale * item.sta

    def set_strength(
        self, strength: float, *, adapter: Adapter | None = None, dma: float | None = None, sta: float | None = None
    ) -> None:
        """Change the strength of one adapter (or of all), installed or not; parts that are None stay as they are.

        Raises:
            ValueError: not a finite number, or an adapter that is not attached here.
        """
        if adapter is not None and all(item.adapter is not adapter for item in self.applied):
            raise ValueError(f"{adapter.name} is not attached here: {', '.join(i.adapter.name for i in self.applied)}")
        for index, item in enumerate(self.applied):
            if adapter is None or item.adapter is adapter:
                self.applied[index] = replace(
                    item,
                    strength=strength,
                    dma=item.dma if dma is None else dma,
                    sta=item.sta if sta is None else sta,
                )
                self._refresh(index)

    @property
    def places(self) -> Iterator[tuple[nn.Module, Site]]:
        """Every layer's module and site."""
        return ((override.module, site) for override, site in self._places)

    def install(self: Self) -> Self:
        first = self._installed == 0
        super().install()
        if first and self._reading:
            self._hook = self.host.register_forward_pre_hook(_Reading(self._reading, self.program), with_kwargs=True)
        return self

    def detach(self) -> None:
        super().detach()
        if self._installed == 0 and self._hook is not None:
            self._hook.remove()
            self._hook = None

    @contextmanager
    def in_call(self, call: ModelCall, rows: Sequence[int] | None = None) -> Iterator[None]:
        """Tell the layers of every adapter what the current call of the host knows, for the length of a with block.

        Args:
            rows: see `CurrentCall.during`.
        """
        with ExitStack() as stack:
            for sites in self.sites:
                stack.enter_context(sites[0].current.during(call, rows))
            yield

    def __str__(self) -> str:
        return "\n".join(map(str, self.reports))


class _Reading:
    """Tells routers the prompt that their host is called with."""

    def __init__(self, current: Sequence[CurrentCall], program: HostProgram):
        self.current, self.program = current, program

    def __call__(self, _host: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        prompt = self.program.text(args, named)
        if prompt is not None:
            for current in self.current:
                current.call = replace(current.call, prompt=prompt)


class _Attached(Attachment):
    """An attachment that `attach` has installed already: leaving its `with` block detaches it."""

    def __enter__(self) -> _Attached:
        return self if self._installed else self.install()


def attach(
    host: nn.Module,
    adapters: Adapter | Applied | Iterable[Adapter | Applied],
    strength: float = 1.0,
    *,
    layers: str = "all",
    layer_weights: str = "",
    names: Mapping[str, str | Place] | None = None,
    program: HostProgram | None = None,
) -> Attachment:
    """Attach adapters to any module tree; use it as a context manager or call `detach()`.

        with attach(unet, adapter, strength=0.8):
            images = pipeline(prompt)

    Args:
        host: the model whose modules the adapters' layers name.
        adapters: one or several; an `Applied` carries strengths and a selector of its own, a plain Adapter takes
            `strength`, `layers` and `layer_weights` from here.
        names: adapter module name -> where it is in the host: a module's name, or a `Place`.

    Returns:
        The installed Attachment; `print` it for what matched.

    Raises:
        AdapterMismatchError, SelectorError, ValueError: see `Attachment` and `Applied`. The host is left untouched.
    """
    items = [adapters] if isinstance(adapters, (Adapter, Applied)) else list(adapters)
    applied = [
        item if isinstance(item, Applied) else Applied(item, strength, layers=layers, layer_weights=layer_weights)
        for item in items
    ]
    attachment = _Attached(host, applied, names, program)
    attachment.install()
    return attachment


def _check_share(report: MatchReport, selected: Mapping[str, float]) -> None:
    """Refuse an adapter of whose selected layers less than half are in the model: what is left of it means nothing."""
    missing = [name for name in report.unmatched if name in selected]
    found = [name for name in report.matched if name in selected]
    if len(found) >= len(missing) + len(report.unused):
        return
    lines = str(replace(report, matched=tuple(found), unmatched=tuple(missing))).split("\n")
    raise AdapterMismatchError(
        f"{lines[0].strip()}, which is less than half: it is not applied. " + "; ".join(line.strip() for line in lines[1:])
    )


def _host_shape(name: str, module: nn.Module, any_kind: bool = False, parameter: str = "weight") -> LayerShape:
    try:
        shape = LayerShape.of(module) if parameter == "weight" else None
    except UnsupportedLayerError as error:
        raise AdapterMismatchError(f"{name}: {error}") from None
    if shape is None and any_kind:
        shape = LayerShape.of_other(module, parameter)
    if shape is None:
        raise AdapterMismatchError(f"{name}: the model has a {type(module).__name__} there, not a Linear or a Conv2d")
    return shape
