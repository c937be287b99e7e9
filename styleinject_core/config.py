"""The hyperparameters of adapters, as their files carry them (docs: method, section 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from .layers import LayerShape

ROUTER_POOLS = ("mean", "sum", "token", "paper")
ROUTER_INPUTS = ("layer", "prompt", "both")
TOKENS = ("image", "frame", "all")
STA_FORMS = ("multiplicative", "additive", "none")
_LARGEST = 3.4028234663852886e38  # of float32
Config = TypeVar("Config", bound="LayerConfig")


class LayerConfig:
    """What the configs of all methods have in common; each is a frozen dataclass with its own fields and these two.

    Args:
        target_modules: what `Adapter.create` adapts, as selector terms (see `styleinject_core.selector`).
        layers: {module name: {field: value}} for layers that differ in any field but target_modules.
    """

    target_modules: tuple[str, ...]
    layers: Mapping[str, Mapping[str, Any]]

    @property
    def method(self) -> str:
        """The method's name in `methods.METHODS`."""
        raise NotImplementedError

    @classmethod
    def default_targets(cls) -> tuple[str, ...]:
        """What the method's paper adapts."""
        return cls.target_modules  # of a class, the default

    @classmethod
    def per_layer(cls) -> tuple[str, ...]:
        """The fields that single layers may override."""
        return tuple(f.name for f in fields(cls) if f.name not in ("target_modules", "layers"))  # type: ignore[arg-type]

    def check_layers(self) -> None:
        """Make the targets a tuple and check the overrides (ValueError); for `__post_init__`."""
        if isinstance(self.target_modules, str) or not all(isinstance(t, str) for t in self.target_modules):
            raise ValueError(f"target_modules: expected a list of names, found {self.target_modules!r}")
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if not isinstance(self.layers, Mapping):
            raise ValueError(f"layers: expected an object of layers, found {self.layers!r}")
        for name, overrides in self.layers.items():
            if not isinstance(overrides, Mapping):
                raise ValueError(f"layers[{name}]: expected an object of fields, found {overrides!r}")
            if unknown := set(overrides) - set(self.per_layer()):
                known = ", ".join(self.per_layer())
                raise ValueError(f"layers[{name}]: unknown field {sorted(unknown)[0]!r}, expected {known}")
            try:
                replace(self, layers={}, **overrides)  # type: ignore[type-var]
            except ValueError as error:
                raise ValueError(f"layers[{name}]: {error}") from None

    def for_layer(self: Config, name: str) -> Config:
        """The config of one layer: this one with the layer's overrides applied."""
        return replace(self, layers={}, **self.layers.get(name, {}))  # type: ignore[type-var]

    def on(self: Config, shapes: Mapping[str, LayerShape]) -> Config:
        """The config of a new adapter for a model with these layers. Raises ValueError: they do not say what it needs."""
        return self

    def reading_prompts_of(self: Config, features: int) -> Config:
        """This config for a model whose text conditioning has so many features."""
        return self

    def override(self, layer: LayerConfig) -> dict[str, Any]:
        """The `layers` entry that makes `for_layer` equal `layer`; empty where nothing differs."""
        return {key: getattr(layer, key) for key in self.per_layer() if getattr(layer, key) != getattr(self, key)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(replace(self, layers={k: dict(v) for k, v in self.layers.items()}))  # type: ignore[type-var, call-overload]

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """The inverse of to_dict.

        Raises:
            ValueError: a field this version does not know, or a bad value; the message names it.
        """
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        if unknown := set(values) - set(names):
            raise ValueError(f"unknown field {sorted(unknown)[0]!r}: expected {', '.join(names)}")
        return cls(**values)


@dataclass(frozen=True)
class AdapterConfig(LayerConfig):
    """Hyperparameters of a StyleInject adapter, or of a LoRA; `layers` overrides them by module name.

    Args:
        r: rank of every down- and up-projection.
        n_styles: n, the number of parallel down-projections the router mixes.
        alpha: the low-rank increment is scaled by alpha / r; None means alpha = r.
        router_pool: how router logits become one vector per image: "mean" or "sum" over positions; or "token": every token has
            its own (Linear layers only); or "paper", as its text says: "token" on Linear layers, "sum" on convolutions.
        router_input: what the router reads: "layer", the layer's input, as in the paper; "prompt", the text conditioning
            averaged over its tokens, so that a style can be asked for by name; or "both", the sum of their logits.
        prompt_features: the width of that text conditioning, of routers that read it; 0 takes the model's in `Adapter.create`.
        sta: "multiplicative" (f_s(σ) = σ·(1 + hyper(s))), "additive" (σ + hyper(s)), or "none" (no AdaIN step).
        eps: lower bound of σ where it is divided by.
        tokens: what router and statistics of a transformer's layer look at: "image", the image's tokens, or all of a clip's
            (the prompt's, padding and reference images in the same sequence get Δh alone); "frame", each frame of a clip by
            itself; or "all", every token of the sequence.
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
    tokens: str = "image"
    router_input: str = "layer"
    prompt_features: int = 0

    @classmethod
    def default_targets(cls) -> tuple[str, ...]:
        """The selector's word for queries and values of attention, by whatever names the model has them."""
        return ("default",)

    def __post_init__(self) -> None:
        for name in ("r", "n_styles"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, found {value!r}")
        if self.alpha is not None and not is_finite(self.alpha):
            raise ValueError(f"alpha: expected a finite number, found {_shown(self.alpha)}")
        if not (is_finite(self.eps) and self.eps > 0):
            raise ValueError(f"eps: expected a positive number, found {_shown(self.eps)}")
        if self.router_pool not in ROUTER_POOLS:
            raise ValueError(f"router_pool: expected one of {', '.join(ROUTER_POOLS)}, found {self.router_pool!r}")
        if self.router_input not in ROUTER_INPUTS:
            raise ValueError(f"router_input: expected one of {', '.join(ROUTER_INPUTS)}, found {self.router_input!r}")
        features = self.prompt_features
        if isinstance(features, bool) or not isinstance(features, int) or features < 0:
            raise ValueError(f"prompt_features: expected an integer of at least 0, found {features!r}")
        if features and self.router_input == "layer":
            raise ValueError(f"prompt_features: is {features}, and router_input 'layer' reads no prompt; expected 0")
        if self.sta not in STA_FORMS:
            raise ValueError(f"sta: expected one of {', '.join(STA_FORMS)}, found {self.sta!r}")
        if self.tokens not in TOKENS:
            raise ValueError(f"tokens: expected one of {', '.join(TOKENS)}, found {self.tokens!r}")
        self.check_layers()

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if self.tokens == "image":  # so that versions that do not know the field read what means the same to them
            del values["tokens"]
        if self.router_input == "layer":
            del values["router_input"], values["prompt_features"]
        return values

    def on(self, shapes: Mapping[str, LayerShape]) -> AdapterConfig:
        """With the width of the model's text conditioning: what its cross-attention reads, where that is one width."""
        if self.prompt_features or not self.reads_prompt:
            return self
        widths = {shape.in_features for name, shape in shapes.items() if name.endswith("attn2.to_k")}
        if len(widths) != 1:
            raise ValueError(
                f"prompt_features: router_input {self.router_input!r} needs the width of the model's text conditioning, which "
                "cannot be told from its layers"
            )
        return self.reading_prompts_of(widths.pop())

    def reading_prompts_of(self, features: int) -> AdapterConfig:
        return replace(self, prompt_features=features) if self.reads_prompt else self

    @property
    def reads_prompt(self) -> bool:
        """Whether its router reads the text conditioning."""
        return self.router_input != "layer" and self.has_router

    @property
    def method(self) -> str:
        return "styleinject" if self.has_router else "lora"

    @property
    def scale(self) -> float:
        """alpha / r, the factor of the low-rank increment (eq. 2)."""
        return 1.0 if self.alpha is None else self.alpha / self.r

    @property
    def has_router(self) -> bool:
        """Whether a layer of this config has a style router; with one style and no hypernetwork it is LoRA."""
        return self.n_styles > 1 or self.sta != "none"


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float (JSON and TOML have booleans too, which Python takes for ints)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether a value is a number that float32 can hold: files have been seen with integers of 400 digits."""
    return is_number(value) and -_LARGEST <= value <= _LARGEST


def _shown(value: Any) -> str:
    text = "a number beyond all bounds" if is_number(value) and not is_finite(value) and isinstance(value, int) else repr(value)
    return text if len(text) < 100 else f"{text[:100]}..."
