"""Training data from the graph: LATENT and CONDITIONING, single or in lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...styleinject_core.train.data.batches import Conditioning, Each, Given, mapped
from ..patcher import ModelPatcher

Prompt = tuple[Tensor, dict[str, Any]]  # one entry of a CONDITIONING: (1, L, C), and what else belongs to it

CONDS = "conds"  # under which a batch has what its model is given for each prompt: name -> Given
_NOT_FOR_TRAINING = {
    "control": "a ControlNet",
    "area": "an area",
    "mask": "a mask",
    "hooks": "hooks",
    "gligen": "GLIGEN boxes",
    "start_percent": "a range of timesteps",
}


def flat_latents(values: Sequence[dict[str, Any]], what: str = "latents") -> list[Tensor]:
    """The latents of one or several LATENTs, (C, H, W) each (or (C, T, H, W)), as the VAE made them.

    Raises:
        ValueError: none, or audio and video packed into one.
    """
    found: list[Tensor] = []
    for value in values:
        samples = value["samples"]
        if getattr(samples, "is_nested", False):
            raise ValueError(f"{what}: these hold several streams (video and audio); expected images")
        found.extend(samples.detach().float().cpu())
    if not found:
        raise ValueError(f"{what}: no images")
    return found


def flat_prompts(values: Sequence[Sequence[Any]], what: str = "conditioning") -> list[Prompt]:
    """The prompts of one or several CONDITIONINGs, in order.

    Raises:
        ValueError: none, or one with something that training cannot honor; names it.
    """
    found: list[Prompt] = []
    for tensor, extras in (entry for value in values for entry in value):
        for key, meaning in _NOT_FOR_TRAINING.items():
            if extras.get(key) is not None:
                raise ValueError(
                    f"{what}: prompt {len(found) + 1} has {meaning}; training takes prompts as the text encoder gives them"
                )
        rows = tensor.shape[0]
        for row in range(rows):
            row_extras = {
                key: value[row : row + 1] if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
                for key, value in extras.items()
            }
            found.append((tensor[row : row + 1].detach(), row_extras))
    if not found:
        raise ValueError(f"{what}: no prompts")
    return found


def a_prompt_each(prompts: Sequence[Prompt], count: int, what: str = "conditioning") -> list[Prompt]:
    """As many prompts as images; a single one serves all. Raises ValueError: another number."""
    if len(prompts) not in (1, count):
        raise ValueError(f"{what}: {len(prompts)} prompts for {count} images; expected as many, or one for all")
    return list(prompts) * count if len(prompts) == 1 else list(prompts)


def empty_prompt(values: Sequence[Any] | None, what: str) -> Prompt | None:
    """The one prompt of an optional CONDITIONING input."""
    return None if values is None else flat_prompts(values, what)[0]


@dataclass(frozen=True)
class Images:
    """What is trained on, the latents in the scale of the VAE, (C, H, W) each, with a prompt each.

    Args:
        teacher_prompts: the same prompts by a teacher's text encoder, where it has another one.
        styles: the name of each image's style, empty where it has none; nothing where no image has one.
    """

    latents: Sequence[Tensor]
    prompts: Sequence[Prompt]
    teacher_prompts: Sequence[Prompt] | None = None
    styles: Sequence[str] = ()

    @property
    def style_names(self) -> list[str]:
        """The styles there are, in the order in which they come first."""
        return [name for name in dict.fromkeys(self.styles) if name]

    def style_numbers(self) -> list[int] | None:
        """The number of each image's style among them, -1 for none; None where no image has one."""
        names = self.style_names
        return [names.index(name) if name else -1 for name in self.styles] if names else None

    @property
    def shape(self) -> Sequence[int]:
        """Of the first latent."""
        return self.latents[0].shape


def images_and_prompts(
    latents: Sequence[dict[str, Any]], conditioning: Sequence[Sequence[Any]], styles: Sequence[str | None] | None = None
) -> Images:
    """The images of LATENTs with a prompt each, of CONDITIONINGs, and a style each, where there are styles.

    Raises:
        ValueError: another number of styles than of images; or see the functions above.
    """
    images = flat_latents(latents)
    named = [" ".join(str(name or "").split()) for name in styles or ()]
    if any(named) and len(named) != len(images):
        raise ValueError(f"image_styles: {len(named)} styles for {len(images)} images; expected one for each")
    return Images(images, a_prompt_each(flat_prompts(conditioning), len(images)), styles=named if any(named) else ())


@dataclass(frozen=True)
class Encoder:
    """What a model makes of latents and prompts before it denoises: from the graph's values to a training batch's.

    Args:
        patcher: the MODEL.
    """

    patcher: ModelPatcher

    @property
    def channels(self) -> int:
        """Of a latent."""
        return self.patcher.model.latent_format.latent_channels

    @property
    def pixels_per_latent(self) -> int:
        """Of an image's side."""
        return getattr(self.patcher.model.latent_format, "spacial_downscale_ratio", 8)  # older versions: 8

    def latents(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Latents in the model's own scale.

        Raises:
            ValueError: latents of another model.
        """
        found = []
        for k, value in enumerate(values):
            value = self.framed(value)
            if value.shape[0] != self.channels:
                raise ValueError(
                    f"latent {k + 1} has {value.shape[0]} channels, this model takes {self.channels}: "
                    "encode the images with this model's VAE"
                )
            found.append(self.patcher.model.process_latent_in(value.unsqueeze(0))[0].float())
        return found

    def framed(self, value: Tensor) -> Tensor:
        """A latent (C, H, W) as the model takes it: for video models (C, 1, H, W), an image is a video of one frame."""
        video = getattr(self.patcher.model.latent_format, "latent_dimensions", 2) == 3
        return value.unsqueeze(1) if value.ndim == 3 and video else value

    def prompts(self, prompts: Sequence[Prompt], shapes: Sequence[Sequence[int]]) -> list[Conditioning]:
        """What the model is given for each prompt, one row each, for images of these shapes (C, ..., H, W)."""
        made: dict[tuple[int, tuple[int, ...]], Conditioning] = {}
        keys = [(id(prompt), tuple(shape)) for prompt, shape in zip(prompts, shapes, strict=True)]
        for prompt, key in zip(prompts, keys, strict=True):
            if key not in made:
                made[key] = self._prompt(prompt, key[1])
        return [made[key] for key in keys]

    def _prompt(self, prompt: Prompt, shape: tuple[int, ...]) -> Conditioning:
        tensor, extras = prompt
        device = next(self.patcher.model.diffusion_model.parameters()).device  # some refine the prompt by modules of their own
        blank = torch.zeros(1, *shape, device=device)
        height, width = (side * self.pixels_per_latent for side in shape[-2:])
        inputs = {"width": width, "height": height, "prompt_type": "positive", "latent_image": blank, "seed": 0, **extras}
        with torch.no_grad():
            conds = self.patcher.model.extra_conds(cross_attn=tensor, noise=blank, device=device, **inputs)
            # each as ComfyUI makes it one row
            one = {key: cond.process_cond(batch_size=1, area=None, device=device) for key, cond in conds.items()}
        return {CONDS: Each([{key: Given(type(cond), mapped(cond.cond, _kept)) for key, cond in one.items()}])}


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu() if tensor.is_floating_point() else tensor.detach().cpu()


def called_together(conditioning: Conditioning, device: torch.device) -> list[tuple[list[int], dict[str, Any]]]:
    """Which rows of a batch share a call of the model, and what that call is given by name: as ComfyUI batches prompts, which
    each kind of what a model is given knows itself (`comfy.conds`).

    Args:
        conditioning: of `Encoder.prompts`, joined.
    """
    calls: list[tuple[list[int], list[dict[str, Any]]]] = []
    rows: Any = conditioning[CONDS]
    for number, row in enumerate(rows):
        conds = {key: given.kind(mapped(given.value, lambda tensor: tensor.to(device))) for key, given in row.items()}
        for numbers, others in calls:
            if _fit(others[0], conds):
                numbers.append(number)
                others.append(conds)
                break
        else:
            calls.append(([number], [conds]))
    return [
        (numbers, {key: cond.concat([other[key] for other in conds[1:]]) for key, cond in conds[0].items()})
        for numbers, conds in calls
    ]


def _fit(conds: dict[str, Any], others: dict[str, Any]) -> bool:
    return conds.keys() == others.keys() and all(cond.can_concat(others[key]) for key, cond in conds.items())
