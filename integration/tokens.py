"""Which of the tokens in a transformer's sequences are the image's: read from what ComfyUI gives the model in a call.

How many there are follows from the latents and the size of a patch. What shares a sequence with them is in `LAYOUTS`, for each
network of ComfyUI that mixes prompt and image in one. Of any other network only sequences of the image's tokens alone are
recognized; `layers_with_unknown_tokens` says where that is too little.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..styleinject_core import Adapter
from ..styleinject_core.call import Tokens, averaged
from ..styleinject_core.layer_names import parse
from .places import diffusion_model


@dataclass(frozen=True)
class Layout:
    """What a network puts into one sequence with the image's tokens.

    Args:
        after: arguments of the call that hold latents, or tokens, (B, L, c), which follow the image's. What else there is
            comes before them.
        padded: the network's attribute that says of what number the count of the image's tokens is made a multiple.
        leading: whether the image's tokens come first.
    """

    after: tuple[str, ...] = ()
    padded: str = ""
    leading: bool = False


# The class of the network -> its layout. Where ComfyUI says `img_slice`, tests/nodes/test_transformers.py compares it.
LAYOUTS = {
    "Flux": Layout(after=("ref_latents",)),  # prompt, image, reference images
    "Chroma": Layout(),  # prompt, image
    "ChromaRadiance": Layout(),
    "NextDiT": Layout(padded="pad_tokens_multiple"),  # Lumina 2, Z-Image: prompt and its padding, references, image, padding
    "QwenImageTransformer2DModel": Layout(after=("ref_latents",)),  # in the image's stream
    "OpenAISignatureMMDITWrapper": Layout(),  # SD 3: the image has a stream of its own
    "WanModel": Layout(after=("time_dim_concat", "context_latents")),  # a reference image's tokens before the clip's
    "OmniGen2Transformer2DModel": Layout(),  # prompt, reference images, image
    "SingleStreamDiT": Layout(after=("ref_latents",)),  # Krea 2, as Flux
    "MMDiT": Layout(),  # AuraFlow: registers, prompt, image
    "ErnieImageModel": Layout(leading=True),  # image, prompt
    "CogVideoXTransformer3DModel": Layout(),  # prompt, clip
    "HiDreamO1Transformer": Layout(after=("ref_patches",)),  # prompt, which may be kept from an earlier call, image, references
}


def tokens_of(model: nn.Module, x: Tensor, given: Mapping[str, Any]) -> Tokens | None:
    """Where the image's tokens are in the sequences of one call.

    Args:
        model: a comfy.model_base.BaseModel.
        x: the latents of the call, (B, C, H, W) or (B, C, T, H, W).
        given: what else `apply_model` is given, by name.

    Returns:
        None for a network that is no transformer, or whose patches have no size that is known here.
    """
    host = diffusion_model(model)
    patch = _patch(host)
    if patch is None or x.ndim not in (4, 5):
        return None
    count, frames = _count(x, patch), x.shape[2] // patch[0] if x.ndim == 5 else 1
    layout = LAYOUTS.get(type(host).__name__)
    if layout is None or _differs_by_row(host, given):
        return Tokens(count, frames=frames, alone=True)
    after = sum(_count(latent, patch) for name in layout.after for latent in _latents(given.get(name)))
    multiple = getattr(host, layout.padded, None) if layout.padded else None
    return Tokens(count, after + (-count % multiple if multiple else 0), frames, leading=layout.leading)


def prompt_of(given: Mapping[str, Any]) -> Tensor | None:
    """What routers read of the prompt in one call, (B, c), see `ModelCall.prompt`; `given` as for `tokens_of`."""
    text, mask = given.get("c_crossattn"), given.get("attention_mask")
    if not isinstance(text, Tensor) or text.ndim != 3:
        return None
    return averaged(text, mask if isinstance(mask, Tensor) else None)


def layers_with_unknown_tokens(model: nn.Module, adapter: Adapter) -> list[str]:
    """An adapter's layers that look at the image's tokens alone, in a transformer of which nobody here can tell them."""
    host = diffusion_model(model)
    if type(host).__name__ in LAYOUTS:
        return []
    looking = [name for name, layer in adapter.layers.items() if layer.tokens != "all"]
    # alone in their sequences they are recognized by their number, where that is known
    mixed = ("both", "") if _patch(host) is not None else ("both", "", "image")
    return [name for name in looking if (named := parse(name)).stream in mixed and named.stack]


def _patch(host: nn.Module) -> tuple[int, int, int] | None:
    """Frames, height and width of a patch, in latents."""
    size: Any = getattr(host, "patch_size", None)
    if size is None and hasattr(host, "patch_spatial"):
        size = (host.patch_temporal, host.patch_spatial, host.patch_spatial)  # Cosmos
    if isinstance(size, int):
        return (1, size, size)
    if isinstance(size, (tuple, list)) and len(size) in (2, 3) and all(isinstance(part, int) for part in size):
        frames, height, width = (1, *size)[-3:]
        return frames, height, width
    return None


def _count(latents: Tensor, patch: tuple[int, int, int]) -> int:
    if latents.ndim == 3:
        return latents.shape[1]
    sizes = (1, *latents.shape[2:])[-3:]
    return math.prod(-(-size // part) for size, part in zip(sizes, patch, strict=True))


def _latents(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [latent for latent in value if isinstance(latent, Tensor)] if isinstance(value, (list, tuple)) else []


def _differs_by_row(host: nn.Module, given: Mapping[str, Any]) -> bool:
    """Lumina 2 in older versions cuts each prompt to its own length: the image's tokens are not the same in all rows."""
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or type(host).__name__ != "NextDiT" or hasattr(host, "pad_tokens_multiple"):
        return False
    return mask.shape[0] > 1 and bool((mask.sum(1) != mask[0].sum()).any())
