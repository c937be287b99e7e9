"""What the tests of the training nodes share: small settings, random latents, and what must hold afterwards."""

from __future__ import annotations

from typing import Any

import torch

# What a training needs is counted in tests/nodes/test_memory.py; elsewhere that is most of what a test of a few steps would take.
SMALL = {"name": "rough", "rank": 2, "styles": 2, "steps": 4, "learning_rate": 3e-3, "layers": "to_q, to_v", "batch_size": 2,
         "memory": "off"}  # fmt: skip
LISTS = {
    "latents",
    "conditioning",
    "image_styles",
    "class_latents",
    "class_conditioning",
    "teacher_conditioning",
    "empty",
    "teacher_empty",
}


def latents(count: int = 4, seed: int = 0, height: int = 8, width: int = 8) -> dict[str, Any]:
    """A LATENT of noise, made as VAE Encode makes one: in inference mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        return {"samples": torch.randn(count, 4, height, width, generator=generator)}


def as_lists(inputs: dict[str, Any]) -> dict[str, list]:
    """A node's inputs as ComfyUI passes them to a node that takes lists."""
    return {key: value if key in LISTS and _is_list(value) else [value] for key, value in inputs.items()}


def _is_list(value: Any) -> bool:
    """Whether it is a list of LATENTs, CONDITIONINGs or names, and not a single one."""
    return isinstance(value, list) and (isinstance(value[0], (dict, str)) or isinstance(value[0][0], list))


def mean(values: Any) -> float:
    return sum(values) / len(values)


def same(adapter: Any, other: Any) -> bool:
    """Whether two adapters have the same layers with the same values."""
    mine, theirs = ({name: layer.tensors() for name, layer in a.layers.items()} for a in (adapter, other))
    return mine.keys() == theirs.keys() and all(
        torch.equal(tensor, theirs[name][part]) for name, parts in mine.items() for part, tensor in parts.items()
    )


def assert_clean(model: Any) -> None:
    """Nothing of training is left on a MODEL."""
    import comfy.model_management

    assert not [name for name, module in model.model.named_modules() if "forward" in module.__dict__ or module._forward_hooks]
    assert model.model.current_patcher is None
    assert not getattr(comfy.model_management, "in_training", False)
