"""The scoped injection: adapters are on a model's layers for the length of one `apply_model` call, and then gone.

Nothing here outlives the objects it belongs to: what is attached to a model is kept in weak dictionaries keyed by that
model, so a model can be freed while a MODEL that once used it lives on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakKeyDictionary

import comfy.model_management
import comfy.ops
import torch
from torch import Tensor, nn

from ..styleinject_core import AdapterMismatchError, Applied, Attachment, MatchReport
from ..styleinject_core.functional.host import REPLACED
from ..styleinject_core.hosts.architectures import describe
from ..styleinject_core.layer_names import parse
from ..styleinject_core.router.control import Rule, Steering
from ..styleinject_core.site import HostProgram
from .places import diffusion_model, find_places

KEY = "styleinject"
_SUFFIX = ".safetensors"
_PLAIN_LAYERS = {
    nn.Linear,
    nn.Conv2d,
    comfy.ops.disable_weight_init.Linear,
    comfy.ops.disable_weight_init.Conv2d,
    comfy.ops.manual_cast.Linear,
    comfy.ops.manual_cast.Conv2d,
}
_PLAIN_TENSORS = (nn.Parameter, Tensor)
# what a module has where its weights are changed at each use
_ON_THE_WAY = ("weight_function", "bias_function", "weight_lowvram_function", "bias_lowvram_function")
_TITLES = {
    "SD15": "Stable Diffusion 1.x",
    "SD20": "Stable Diffusion 2.x",
    "SD21UnclipL": "Stable Diffusion 2.x unCLIP",
    "SD21UnclipH": "Stable Diffusion 2.x unCLIP",
    "SDXL": "Stable Diffusion XL",
    "SDXLRefiner": "Stable Diffusion XL refiner",
    "SSD1B": "SSD-1B",
    "SD3": "Stable Diffusion 3",
    "Flux2": "Flux 2",
    "Lumina2": "Lumina 2",
    "ZImage": "Z-Image",
    "QwenImage": "Qwen-Image",
    "WAN21_T2V": "Wan 2.x text to video",  # ComfyUI loads 2.2's large ones as these
    "WAN21_I2V": "Wan 2.x image to video",
    "WAN22_T2V": "Wan 2.2 text and image to video",
}


class ComfyProgram(HostProgram):
    """ComfyUI's ways: weights move and are cast at each use, and patches may split an image over rows of the batch.

    Args:
        layers: the adapter's, by name.
    """

    def __init__(self, layers: Iterable[str] = ()):
        # HyperTile splits images over rows in a U-Net's self-attention. More rows in cross-attention are regions' prompts.
        self._tiled = frozenset(n for n in layers if (name := parse(n)).side and name.attention == "self")

    def cast(self, parameter: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        if parameter.dtype == dtype and parameter.device == x.device:
            return parameter
        non_blocking = comfy.model_management.device_supports_non_blocking(x.device)
        return comfy.model_management.cast_to(parameter, dtype, x.device, non_blocking=non_blocking)

    def readable(self, module: nn.Module, x: Tensor) -> bool:
        """Whether the layer is one of ComfyUI's plain ones and computes with module.weight as it lies there.

        Not so for quantized and fp8 layers, weights that live on another device or in another dtype, and those that
        a low-VRAM LoRA patches on the way.
        """
        attributes = module.__dict__  # a module's own way to an attribute takes ten times as long
        if type(module) not in _PLAIN_LAYERS or attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]:
            return False
        if "_v" in attributes or REPLACED in attributes or any(map(attributes.get, _ON_THE_WAY)):
            return False
        parameters, dtype, device = attributes["_parameters"], x.dtype, x.device
        weight, bias = parameters.get("weight"), parameters.get("bias")
        for parameter in (weight,) if bias is None else (weight, bias):
            if type(parameter) not in _PLAIN_TENSORS or parameter.dtype != dtype or parameter.device != device:
                return False
        return True

    def frozen_weight(self, module: nn.Module, x: Tensor) -> Tensor:
        """W0 with what low-VRAM LoRAs add to it on the way."""
        weight = super().frozen_weight(module, x)
        functions = module.__dict__.get("weight_function") or ()
        lowvram = module.__dict__.get("weight_lowvram_function")
        for function in (*functions, *(() if lowvram is None else (lowvram,))):
            weight = function(weight)
        return weight

    def text(self, args: Sequence[Any], named: Mapping[str, Any]) -> Tensor | None:
        """`model_call` has it, of every call; some packs do not call the network as a whole."""
        return None

    def samples(self, x: Tensor, layer: str, images: int) -> int:
        """Where HyperTile may have split images over rows, as many as the call has."""
        return images if images and layer in self._tiled else x.shape[0]


@dataclass(frozen=True, eq=False)
class Injection:
    """One adapter on a MODEL, with its strengths and the part of sampling it is active in.

    Args:
        applied: the adapter with its strengths; its parameters are the ones ComfyUI loads and offloads.
        start_percent, end_percent: the part of the sampling schedule, 0 to 1; by noise level, as ControlNet has it.
        control: what steers its router.
        patched: whether it is in the model's weights already (`weight_patches`): then calls have nothing to do.
        node_id: the execution id of the node that applied it, for what there is to say about it; "" where unknown.

    Raises:
        ValueError: percents outside of 0 to 1, or a start after the end; a control that does not fit the adapter.
    """

    applied: Applied
    start_percent: float = 0.0
    end_percent: float = 1.0
    control: tuple[Rule, ...] = ()
    patched: bool = False
    node_id: str = ""
    steering: Steering | None = field(init=False, default=None, repr=False)
    _attached: WeakKeyDictionary[nn.Module, Attachment] = field(init=False, default_factory=WeakKeyDictionary, repr=False)
    _bounds: SigmaBounds = field(init=False, default_factory=lambda: SigmaBounds(), repr=False)

    def __post_init__(self) -> None:
        check_percents(self.applied.adapter.name, self.start_percent, self.end_percent)
        if self.control:
            object.__setattr__(self, "steering", Steering(self.control, self.applied.adapter))

    @property
    def strong(self) -> bool:
        """Whether its strengths let it change anything."""
        return self.applied.strength != 0 and (self.applied.dma != 0 or self.applied.sta != 0)

    def active(self, model: nn.Module, timestep: Tensor) -> bool:
        """Whether the adapter takes part at this noise level: percent_to_sigma(end) <= sigma <= percent_to_sigma(start)."""
        return not self.patched and self.strong and self._within(model, timestep, self.start_percent, self.end_percent)

    def active_rules(self, model: nn.Module, timestep: Tensor) -> list[bool]:
        """The same for each rule of the control."""
        return [self._within(model, timestep, rule.start_percent, rule.end_percent) for rule in self.control]

    def _within(self, model: nn.Module, timestep: Tensor, start: float, end: float) -> bool:
        return self._bounds.within(model, timestep, start, end)

    def attachment(self, model: nn.Module) -> Attachment:
        """The adapter matched to the layers of one model, made once per model.

        Args:
            model: a comfy.model_base.BaseModel.

        Raises:
            AdapterMismatchError: it does not fit; says what the adapter was made for and what the model is.
            SelectorError: the layer selector or a layer weight matches nothing.
        """
        host = diffusion_model(model)
        if host not in self._attached:
            adapter = self.applied.adapter
            names = {name: found.place for name, found in find_places(model, adapter).items()}
            try:
                self._attached[host] = Attachment(host, [self.applied], names, ComfyProgram(adapter.names))
            except AdapterMismatchError as error:
                raise AdapterMismatchError(
                    f'adapter "{adapter.name}" was made for {describe(adapter)}, this model is {model_title(model)}. {error}'
                ) from None
            self._check_prompts(model)
        return self._attached[host]

    def _check_prompts(self, model: nn.Module) -> None:
        """Refuse a router that reads prompts of another text encoder, where the model's are known (AdapterMismatchError)."""
        adapter, config = self.applied.adapter, cast(Any, model.model_config)
        width = config.unet_config.get("context_dim")
        made_for = {layer.prompt_features for layer in adapter.layers.values()} - {0}
        if made_for and isinstance(width, int) and made_for != {width}:
            numbers = " and ".join(map(str, sorted(made_for)))
            raise AdapterMismatchError(
                f'adapter "{adapter.name}": its router reads text conditioning of {numbers} features, this model '
                f"({model_title(model)}) has {width}"
            )

    def adapted_layers(self, model: nn.Module) -> set[str]:
        """The layers of this model that the adapter changes: matched, selected, and of a weight that is not 0."""
        return {site.name for site in self.attachment(model).sites[0] if site.dma != 0 or site.sta != 0}

    def report(self, model: nn.Module) -> MatchReport:
        """Which of the adapter's layers found their place in this model."""
        return self.attachment(model).reports[0]


def check_percents(name: str, start: float, end: float) -> None:
    """Whether two numbers are a part of sampling. Raises ValueError: out of 0 to 1, or the wrong way around."""
    for label, value in (("start_percent", start), ("end_percent", end)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: {label} is {value}, expected 0 to 1")
    if start > end:
        raise ValueError(f"{name}: start_percent {start} is after end_percent {end}")


class SigmaBounds:
    """Which noise levels a part of sampling is, by ComfyUI's convention; worked out once per model."""

    def __init__(self) -> None:
        self._bounds: WeakKeyDictionary[nn.Module, dict] = WeakKeyDictionary()

    def within(self, model: nn.Module, timestep: Tensor, start: float, end: float) -> bool:
        """percent_to_sigma(end) <= sigma <= percent_to_sigma(start), in float32."""
        if start == 0 and end == 1:
            return True  # without reading the timestep, which would wait for the device
        sampling: Any = model.model_sampling
        bounds = self._bounds.setdefault(sampling, {})
        if (start, end) not in bounds:
            bounds[start, end] = tuple(_float32(sampling.percent_to_sigma(percent)) for percent in (end, start))
        lowest, highest = bounds[start, end]
        return lowest <= _float32(timestep.flatten()[0]) <= highest


def select_adapters(injections: Sequence[Injection], adapter_name: str) -> list[Injection]:
    """The adapters of that name ("all": every one).

    Raises:
        ValueError: no adapter is applied, or none of that name.
    """
    wanted = _stems(adapter_name)
    everyone = adapter_name.strip() in ("all", "")
    if not injections:
        raise ValueError("no StyleInject adapter is applied to this model: connect the output of an Apply StyleInject node")
    found = [i for i in injections if everyone or i.applied.adapter.name in wanted]
    if not found:
        names = ", ".join(dict.fromkeys(i.applied.adapter.name for i in injections))
        raise ValueError(f'no adapter named "{adapter_name}" is applied to this model; there are: {names}')
    return found


def _stems(name: str) -> set[str]:
    """The names an adapter may have that somebody calls by this one: a file's, with or without folders and suffix."""
    spelled = [name, name.strip()]
    stems = {s[: -len(_SUFFIX)] if s.lower().endswith(_SUFFIX) else s for s in spelled}
    return stems | {re.split(r"[\\/]", stem)[-1] for stem in stems} | {stem.rsplit("/", 1)[-1] for stem in stems}


def model_title(model: nn.Module) -> str:
    """What a model is, in words, as far as ComfyUI knows it."""
    kind = type(model.model_config)
    return getattr(kind, "title", None) or _TITLES.get(kind.__name__, kind.__name__)


def _float32(value: float | Tensor) -> float:
    """Rounded to float32: sigmas are, and percents that were not would miss a step."""
    return torch.as_tensor(value, dtype=torch.float32).item()
