"""A Stable Diffusion 1.5-type MODEL small enough to sample in a fraction of a second, weights random.

Only for tests that run inside ComfyUI (``tests/nodes``): everything of ComfyUI is imported in the functions,
after ``tests/nodes/conftest.py`` has put ComfyUI on the path.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

CONTEXT = 64
TOKENS = 77

# Two levels, a residual block and a transformer on each: every kind of layer of SD 1.5 once or more
# (down and up convolution, skip convolution, both attentions, the gated feed-forward).
UNET_CONFIG: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1],
    "context_dim": CONTEXT,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "use_temporal_attention": False,
    "adm_in_channels": None,
    "legacy": False,
}


def build_tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **unet_config: Any) -> Any:
    """Build the MODEL, a ModelPatcher, as ComfyUI's loader does.

    Built under ``inference_mode`` because nodes are executed under it: a loaded model's parameters are
    inference tensors, which training code has to cope with.

    Args:
        seed: of the weights. The same seed gives the same weights in every version of ComfyUI.
        dtype: of the weights.
        unet_config: fields of UNET_CONFIG to change, e.g. ``model_channels=64``.
    """
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    with torch.inference_mode():
        config = comfy.supported_models.SD15({**UNET_CONFIG, **unet_config})
        config.unet_config["num_heads"] = 4
        config.set_inference_dtype(dtype, None)
        model = config.get_model({}, "", device=comfy.model_management.unet_offload_device())
        fill(model.diffusion_model, seed)
    patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher_class(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def fp8_model(seed: int = 0):
    """The tiny model with weights in fp8 that are cast to float32 at each use, and its twin in float32."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    cpu = comfy.model_management.get_torch_device()
    patchers = []
    for dtype in (torch.float8_e4m3fn, torch.float32):
        with torch.inference_mode():
            config = comfy.supported_models.SD15(dict(UNET_CONFIG))
            config.unet_config["num_heads"] = 4
            config.set_inference_dtype(dtype, torch.float32 if dtype != torch.float32 else None)
            base = config.get_model({}, "", device=torch.device("cpu"))
            fill(base.diffusion_model, seed)
            if dtype == torch.float32:
                for parameter in base.diffusion_model.parameters():
                    parameter.copy_(parameter.to(torch.float8_e4m3fn))
        patchers.append(comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu))
    return patchers


def sdxl_model():
    """Like SDXL: no attention on the first level, two transformer blocks on the second, Linear projections, size labels."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    with torch.inference_mode():
        config = comfy.supported_models.SDXL(
            {**UNET_CONFIG, "use_linear_in_transformer": True, "transformer_depth": [0, 2],
             "transformer_depth_middle": 2, "transformer_depth_output": [0, 0, 2, 2],
             "adm_in_channels": 64 + 6 * 256, "num_classes": "sequential"}
        )  # fmt: skip
        config.unet_config["num_heads"], config.unet_config["num_head_channels"] = -1, 16
        config.set_inference_dtype(torch.float32, None)
        base = config.get_model({}, "", device=torch.device("cpu"))
        fill(base.diffusion_model, 0)
    cpu = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu)


def fill(module: torch.nn.Module, seed: int) -> None:
    """Fill a module's parameters in place: norms 1, other weights N(0, 1/fan_in), biases N(0, 0.02)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        if parameter.ndim == 1 and name.endswith("weight"):
            values = torch.ones(parameter.shape)
        else:
            std = 0.02 if parameter.ndim == 1 else 1 / math.sqrt(math.prod(parameter.shape[1:]))
            values = torch.randn(parameter.shape, generator=generator) * std
        parameter.copy_(values)


def conditioning(seed: int = 0, batch: int = 1, tokens: int = TOKENS, context: int = CONTEXT) -> list:
    """A CONDITIONING of random text features, (batch, tokens, context); another seed is another prompt."""
    generator = torch.Generator().manual_seed(1000 + seed)
    features = torch.randn(batch, tokens, context, generator=generator)
    return [[features, {"pooled_output": features.mean(dim=1)}]]


def sample(
    model: Any,
    *,
    seed: int = 0,
    steps: int = 3,
    sampler: str = "euler",
    scheduler: str = "normal",
    cfg: float = 4.0,
    denoise: float = 1.0,
    positive: list | None = None,
    negative: list | None = None,
    height: int = 8,
    width: int = 8,
    batch: int = 1,
    callback: Callable[..., None] | None = None,
) -> torch.Tensor:
    """Sample as the KSampler node does and return the latent, (batch, 4, height, width), on the CPU.

    Args:
        model: a MODEL.
        positive, negative: CONDITIONING; by default ``conditioning(0)`` and ``conditioning(1)``.
        height, width: of the latent.
        callback: called as ``callback(step, x0, x, total_steps)`` after each step.
    """
    import comfy.sample

    with torch.inference_mode():
        latent = torch.zeros(batch, 4, height, width)
        noise = comfy.sample.prepare_noise(latent, seed)
        result = comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            sampler,
            scheduler,
            conditioning(0) if positive is None else positive,
            conditioning(1) if negative is None else negative,
            latent,
            denoise=denoise,
            callback=callback,
            disable_pbar=True,
            seed=seed,
        )
        return result.cpu()
