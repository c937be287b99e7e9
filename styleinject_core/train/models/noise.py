"""Noise schedules and what models predict: z_t = a x0 + b ε, and everything that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")


class NoiseSchedule(Protocol):
    """How a model's training noise is made. Times are whatever the model takes: indices, sigmas, or t in (0, 1)."""

    @property
    def prediction_type(self) -> str:
        """One of PREDICTION_TYPES."""
        ...

    def coefficients(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of z_t = a x0 + b ε for times (B,), each (B,) float32."""
        ...

    def times(self, uniform: Tensor) -> Tensor:
        """Times for numbers uniform in [0, 1), increasing with them; (B,) -> (B,)."""
        ...


@dataclass(frozen=True)
class DiscreteSchedule:
    """The variance-preserving schedule of DDPM and Stable Diffusion: times index ᾱ.

    Args:
        alphas_cumprod: ᾱ, (T,).
        prediction_type: "epsilon", "v_prediction" or "sample" (x0).

    Raises:
        ValueError: an unknown prediction type.
    """

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        check_prediction_type(self.prediction_type, PREDICTION_TYPES[:3])

    def coefficients(self, times: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.alphas_cumprod.to(times.device, torch.float32)[times]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def times(self, uniform: Tensor) -> Tensor:
        return (uniform * len(self.alphas_cumprod)).long()

    @classmethod
    def from_diffusers(cls, config: Any) -> DiscreteSchedule:
        """The schedule of a diffusers scheduler config: "linear" or "scaled_linear" betas, or its trained_betas.

        Raises:
            ValueError: another kind of schedule.
        """
        prediction_type = config.get("prediction_type", "epsilon")
        if config.get("trained_betas") is not None:
            betas = torch.as_tensor(config["trained_betas"], dtype=torch.float32)
        else:
            kind = config.get("beta_schedule")
            if kind not in ("linear", "scaled_linear"):
                name = config.get("_class_name", "this scheduler")
                raise ValueError(f"{name}: beta_schedule: expected linear or scaled_linear, found {kind!r}")
            power = 2 if kind == "scaled_linear" else 1
            ends = (config["beta_start"] ** (1 / power), config["beta_end"] ** (1 / power))
            betas = torch.linspace(*ends, config["num_train_timesteps"]) ** power
        alphas_cumprod = torch.cumprod(1 - betas, 0)
        if config.get("rescale_betas_zero_snr"):
            if prediction_type == "epsilon":
                raise ValueError("rescale_betas_zero_snr: pure noise holds nothing to predict noise from; expected v or x0")
            alphas_cumprod = zero_terminal_snr(alphas_cumprod)
        return cls(alphas_cumprod, prediction_type)


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """ᾱ (T,) shifted and scaled so that the last time is pure noise (Lin et al., arXiv 2305.08891, algorithm 1)."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def logit_normal(uniform: Tensor) -> Tensor:
    """Times in (0, 1) for numbers uniform in [0, 1): the sigmoid of a normal variable, float32."""
    return torch.sigmoid(torch.special.ndtri(uniform.double().clamp(1e-6, 1 - 1e-6))).float()


def check_prediction_type(found: str, allowed: tuple[str, ...] = PREDICTION_TYPES) -> None:
    if found not in allowed:
        raise ValueError(f"prediction_type: expected {', '.join(allowed[:-1])} or {allowed[-1]}, found {found!r}")


def add_noise(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """z_t = a x0 + b ε, like latents (B, ...)."""
    a, b = _per_sample(schedule, times, latents)
    return a * latents + b * noise


def target(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """What a perfect model predicts: ε, v = (a ε - b x0) / √(a² + b²), x0, or ε - x0; like latents (B, ...)."""
    match schedule.prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return latents
        case "flow":
            return noise - latents
        case _:
            a, b = _per_sample(schedule, times, latents)
            return (a * noise - b * latents) / (a**2 + b**2).sqrt()


def matching_times(schedule: NoiseSchedule, times: Tensor, other: NoiseSchedule) -> Tensor:
    """The times (B,) at which the noise of another schedule of the same kind is closest to this one's at `times` (B,)."""
    if not (isinstance(schedule, DiscreteSchedule) and isinstance(other, DiscreteSchedule)):
        return times  # sigmas, or t: the noise level itself
    other_snr, snr = (s.alphas_cumprod.cpu().double().logit(1e-9) for s in (other, schedule))  # log SNR
    if other_snr.shape == snr.shape and torch.equal(other_snr, snr):
        return times
    return (snr[times.cpu()].unsqueeze(1) - other_snr).abs().argmin(1).to(times.device)


def predicted_sample(schedule: NoiseSchedule, prediction: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
    """The x0 that a prediction at z_t stands for."""
    a, b = _per_sample(schedule, times, noisy)
    match schedule.prediction_type:
        case "epsilon":
            return (noisy - b * prediction) / a
        case "sample":
            return prediction
        case "flow":  # z - b (ε - x0) = (a + b) x0
            return (noisy - b * prediction) / (a + b)
        case _:
            return (a * noisy - b * (a**2 + b**2).sqrt() * prediction) / (a**2 + b**2)


def prediction_of(schedule: NoiseSchedule, sample: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
    """The prediction of this schedule's type that stands for an x0 at z_t; the inverse of `predicted_sample`."""
    a, b = _per_sample(schedule, times, noisy)
    return target(schedule, sample, (noisy - a * sample) / b, times)


def min_snr_weight(schedule: NoiseSchedule, times: Tensor, gamma: float) -> Tensor:
    """Weights (B,) of the squared error by min(SNR, γ) (Hang et al., arXiv 2303.09556), for what the model predicts.

    Raises:
        ValueError: a flow model, for which the weighting is not defined.
    """
    a, b = schedule.coefficients(times)
    snr = (a / b) ** 2
    clipped = snr.clamp(max=gamma)
    match schedule.prediction_type:
        case "epsilon":
            return clipped / snr
        case "v_prediction":
            return clipped / (snr + 1)
        case "sample":
            return clipped
        case other:
            raise ValueError(f"min_snr_gamma has no meaning for a model that predicts {other}: leave it at 0")


def _per_sample(schedule: NoiseSchedule, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    a, b = schedule.coefficients(times)
    shape = (-1, *[1] * (like.ndim - 1))
    return a.to(like).view(shape), b.to(like).view(shape)
