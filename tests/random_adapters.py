"""Adapters with random weights for a ComfyUI model, for the tests of ``tests/nodes``."""

from __future__ import annotations

from typing import Any

import torch
from pack_loader import Pack


def unet_shapes(pack: Pack, model: Any) -> dict[str, Any]:
    """Every adaptable layer of a MODEL's U-Net: diffusers name -> LayerShape."""
    import comfy.utils

    layer_shape = pack.submodule("styleinject_core").LayerShape
    modules = dict(model.model.diffusion_model.named_modules())
    table = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    found = {}
    for key, value in sorted(table.items()):  # the table's own order differs from run to run
        module = modules.get(value.removesuffix(".weight"))
        if key.endswith(".weight") and module is not None and (shape := layer_shape.of(module)) is not None:
            found[key.removesuffix(".weight")] = shape
    return found


def random_adapter(
    pack: Pack, model: Any, *targets: str, name: str = "style", seed: int = 1, scale: float = 0.05, **config: Any
) -> Any:
    """An adapter that visibly changes what `model` does: every parameter drawn from N(0, scale²), A as it starts.

    Args:
        targets: selector terms, by default to_q and to_v.
        config: fields of AdapterConfig; r = 4 and n_styles = 3 unless given.
    """
    core = pack.submodule("styleinject_core")
    settings = core.AdapterConfig(**{"r": 4, "n_styles": 3, "target_modules": targets or ("to_q", "to_v"), **config})
    adapter = core.Adapter.create(unet_shapes(pack, model), settings, name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter.layers.values():
            for part, values in layer.tensors().items():
                deviation = values.shape[2:].numel() ** -0.5 if part == "A" else scale
                values.copy_(torch.randn(values.shape, generator=generator) * deviation)
    return adapter


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
    """Whether two latents are equal up to rounding: the largest difference beside b's deviation."""
    return ((a - b).abs().max() / b.std()).item() <= tolerance
