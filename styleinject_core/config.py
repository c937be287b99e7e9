"""AdapterConfig: the hyperparameters of a StyleInject adapter, as its file carries them (docs: method, section 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

ROUTER_POOLS = ("mean", "sum", "token")
STA_FORMS = ("multiplicative", "additive", "none")
_PER_LAYER = ("r", "n_styles", "alpha", "router_pool", "sta", "eps")


@dataclass(frozen=True)
class AdapterConfig:
    """Hyperparameters of an adapter; `layers` overrides them by module name.

    Args:
        r: rank of every down- and up-projection.
        n_styles: n, the number of parallel down-projections the router mixes.
        alpha: the low-rank increment is scaled by alpha / r; None means alpha = r.
        router_pool: how router logits become one vector per image: "mean" or "sum" over positions, or "token"
            (every token by itself; Linear layers only).
        sta: "multiplicative" (f_s(σ) = σ·(1 + hyper(s))), "additive" (σ + hyper(s)), or "none" (no AdaIN step).
        eps: lower bound of σ where it is divided by.
        target_modules: what `Adapter.create` adapts, as selector terms (see `styleinject_core.selector`).
        layers: {module name: {field: value}} for layers that differ in any field but target_modules.

    With n_styles = 1 and sta = "none" there is nothing to route: such a layer is plain LoRA, without router.

    Raises:
        ValueError: a value out of range, naming the field.
    """

    r: int = 32
    n_styles: int = 16
    alpha: float | None = None
    router_pool: str = "mean"
    sta: str = "multiplicative"
    eps: float = 1e-5
    target_modules: tuple[str, ...] = ("to_q", "to_v")
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("r", "n_styles"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, found {value!r}")
        if self.alpha is not None and not (_is_number(self.alpha) and math.isfinite(self.alpha)):
            raise ValueError(f"alpha: expected a finite number, found {self.alpha!r}")
        if not (_is_number(self.eps) and 0 < self.eps < math.inf):
            raise ValueError(f"eps: expected a positive number, found {self.eps!r}")
        if self.router_pool not in ROUTER_POOLS:
            raise ValueError(f"router_pool: expected one of {', '.join(ROUTER_POOLS)}, found {self.router_pool!r}")
        if self.sta not in STA_FORMS:
            raise ValueError(f"sta: expected one of {', '.join(STA_FORMS)}, found {self.sta!r}")
        if isinstance(self.target_modules, str) or not all(isinstance(t, str) for t in self.target_modules):
            raise ValueError(f"target_modules: expected a list of names, found {self.target_modules!r}")
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for name, overrides in self.layers.items():
            if unknown := set(overrides) - set(_PER_LAYER):
                raise ValueError(f"layers[{name}]: unknown field {sorted(unknown)[0]!r}, expected {', '.join(_PER_LAYER)}")
            try:
                replace(self, layers={}, **overrides)
            except ValueError as error:
                raise ValueError(f"layers[{name}]: {error}") from None

    @property
    def scale(self) -> float:
        """alpha / r, the factor of the low-rank increment (eq. 2)."""
        return 1.0 if self.alpha is None else self.alpha / self.r

    @property
    def has_router(self) -> bool:
        """Whether a layer of this config has a style router; with one style and no hypernetwork it is LoRA."""
        return self.n_styles > 1 or self.sta != "none"

    def for_layer(self, name: str) -> AdapterConfig:
        """The config of one layer: this one with the layer's overrides applied."""
        return replace(self, layers={}, **self.layers.get(name, {}))

    def override(self, layer: AdapterConfig) -> dict[str, Any]:
        """The `layers` entry that makes `for_layer` equal `layer`; empty where nothing differs."""
        return {key: getattr(layer, key) for key in _PER_LAYER if getattr(layer, key) != getattr(self, key)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(replace(self, layers={k: dict(v) for k, v in self.layers.items()}))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """The inverse of to_dict.

        Raises:
            ValueError: a field this version does not know, or a bad value; the message names it.
        """
        if unknown := set(values) - {f.name for f in fields(cls)}:
            raise ValueError(f"unknown field {sorted(unknown)[0]!r}: expected {', '.join(f.name for f in fields(cls))}")
        return cls(**values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
