"""Training objectives (method, section 4), on latents and noise schedules in diffusers' terms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]  # (z_t, t, conditioning) -> prediction


def fine_tune_loss(
    denoise: Denoiser,
    latents: Tensor,
    conditioning: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: str,
) -> Tensor:
    """E‖target - prediction‖², the plain fine-tuning objective.

    Args:
        denoise: the model with the adapter attached.
        latents: clean latents z_0, (B, C, H, W).
        noise: ε ~ N(0, 1), like latents.
        timesteps: (B,) indices into the schedule.
        alphas_cumprod: ᾱ of the noise schedule, (T,).
        prediction_type: "epsilon", "v_prediction" or "sample" (x0).

    Raises:
        ValueError: an unknown prediction type.
    """
    alpha_bar = alphas_cumprod.to(latents)[timesteps].view(-1, 1, 1, 1)
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    match prediction_type:
        case "epsilon":
            target = noise
        case "v_prediction":
            target = signal * noise - sigma * latents
        case "sample":
            target = latents
        case _:
            raise ValueError(f"prediction_type: expected epsilon, v_prediction or sample, found {prediction_type!r}")
    prediction = denoise(signal * latents + sigma * noise, timesteps, conditioning)
    return torch.nn.functional.mse_loss(prediction.float(), target.float())
