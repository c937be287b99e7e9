"""Fixed changes as ComfyUI's own weight patches: a step then costs what the model costs, and what works with LoRAs works.

That is for changes that hold for a whole run at one strength; what a schedule switches on and off is installed for the length
of a call (`injection`). Both give the same latents up to rounding.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable
from typing import Any

from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ..styleinject_core import Attachment
from ..styleinject_core.methods import AdapterLayer


class FixedPatch(WeightAdapterBase):  # type: ignore[misc]
    """One layer's change of a weight or a bias; ComfyUI makes it part of the weight when it loads the model.

    `weights` is (layer, "weight" or "bias", what it belongs to): newer versions rebuild a patch from `loaded_keys` and
    `weights`, and move what tensors they find in there.
    """

    name = "styleinject"

    def __init__(self, loaded_keys: set[str], weights: tuple[AdapterLayer, str, object]):
        self.loaded_keys, self.weights = loaded_keys, weights

    @property
    def owner(self) -> object:
        """What the patch was added for."""
        return self.weights[2]

    def calculate_weight(
        self, weight: Tensor, key: str, strength: float, strength_model: float, offset: Any, function: Any, *_: Any, **__: Any
    ) -> Tensor:
        """weight + strength · change, in place; `weight` is the slice of the model's that the layer is for."""
        layer, part, _owner = self.weights
        whole, expected = weight, layer.shape.weight if part == "weight" else (layer.shape.out_features,)
        if tuple(weight.shape) != expected and weight.ndim == len(expected):  # other channels than it was made for
            if any(size < wanted for size, wanted in zip(weight.shape, expected, strict=True)):
                logging.warning("StyleInject: %s is left out: made for %s, found %s", key, expected, tuple(weight.shape))
                return whole
            weight = weight[tuple(slice(wanted) for wanted in expected)]
        change = layer.change(weight) if part == "weight" else layer.shift()
        if change is not None:
            weight += function((strength * change.to(weight.device)).to(weight.dtype).reshape(weight.shape))
        return whole


def add_patches(model: Any, attachment: Attachment, owner: object) -> None:
    """Add an attachment's changes to a MODEL (a ModelPatcher), a clone of the caller's.

    Args:
        attachment: of one adapter whose every layer is fixed; it tells places and strengths, and is not installed.
        owner: what `remove_patches` finds them by.
    """
    names = {module: name for name, module in model.model.named_modules()}
    by_strength: dict[float, dict[Any, FixedPatch]] = {}
    for module, site in attachment.places:
        if site.dma == 0:
            continue
        patches = by_strength.setdefault(site.dma, {})
        parts = {"weight": site.parameter} | ({} if site.layer.shift() is None else {"bias": "bias"})
        for part, parameter in parts.items():
            key = f"{names[module]}.{parameter}"
            where = key if site.rows is None else (key, (0, site.rows.start, site.rows.size))
            patches[where] = FixedPatch(set(), (site.layer, part, owner))
    for strength, patches in by_strength.items():
        model.add_patches(patches, strength)


def remove_patches(model: Any, owners: Iterable[object]) -> None:
    """Take the patches of some owners off a MODEL, a clone of the caller's."""
    gone = {id(owner) for owner in owners}
    if not gone:
        return
    kept = {key: [patch for patch in patches if not _of(patch, gone)] for key, patches in model.patches.items()}
    model.patches = {key: patches for key, patches in kept.items() if patches}
    model.patches_uuid = uuid.uuid4()


def _of(patch: tuple, owners: set[int]) -> bool:
    return isinstance(patch[1], FixedPatch) and id(patch[1].owner) in owners
