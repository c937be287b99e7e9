"""A reference image on a MODEL: DEADiff's tokens as more keys and values, for the length of one `apply_model` call.

Without a mask the rows are all there is to it: whoever computes the attention finds them among its keys. A mask needs a bias
on their columns, so for the length of a call with masked references each cross-attention has a replace patch, on a copy of
the call's transformer_options.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor, nn

from ..styleinject_core.call import ModelCall
from ..styleinject_core.deadiff import Reference, ReferenceAttachment, ReferenceMismatchError
from ..styleinject_core.deadiff.config import Site
from ..styleinject_core.deadiff.rows import NEGATIVE, check_mask, mask_bias, masked_blend
from ..styleinject_core.hosts.architectures import title_of
from .injection import SigmaBounds, check_percents, model_title
from .places import diffusion_model, unet_modules

POSITIVE = "positive"
Attend = Callable[[Tensor, Tensor, Tensor, Mapping[str, Any]], Tensor]  # an attn2 replace patch


@dataclass(frozen=True, eq=False)
class AppliedReference:
    """A reference on a MODEL, with the part of sampling and of the picture it is active in.

    Args:
        reference: tokens and weights.
        start_percent, end_percent: the part of the sampling schedule, 0 to 1; by noise level, as ControlNet has it.
        mask: (images, H, W) in [0, 1], or None for the whole picture.
        node_id: the execution id of the node that applied it, for what there is to say about it; "" where unknown.

    Raises:
        ValueError: percents outside of 0 to 1, or a start after the end.
        TokensError: a mask that is empty or has NaN values.
    """

    reference: Reference
    start_percent: float = 0.0
    end_percent: float = 1.0
    mask: Tensor | None = None
    node_id: str = ""
    _attached: WeakKeyDictionary[nn.Module, ReferenceAttachment] = field(
        init=False, default_factory=WeakKeyDictionary, repr=False
    )
    _bounds: SigmaBounds = field(init=False, default_factory=SigmaBounds, repr=False)
    _warned: list[str] = field(init=False, default_factory=list, repr=False)

    def __post_init__(self) -> None:
        check_percents(self.name, self.start_percent, self.end_percent)
        if self.mask is not None:
            mask = self.mask if self.mask.ndim == 3 else self.mask.reshape(-1, *self.mask.shape[-2:])
            check_mask(mask)
            object.__setattr__(self, "mask", mask.detach().float().cpu())

    @property
    def name(self) -> str:
        return self.reference.model.name

    def active(self, model: nn.Module, timestep: Tensor) -> bool:
        """Whether it takes part at this noise level."""
        return self.reference.active and self._bounds.within(model, timestep, self.start_percent, self.end_percent)

    def attachment(self, model: nn.Module) -> ReferenceAttachment:
        """The reference matched to the layers of one model, made once per model.

        Args:
            model: a comfy.model_base.BaseModel.

        Raises:
            ReferenceMismatchError: it does not fit; says what DEADiff was made for and what the model is.
        """
        host = diffusion_model(model)
        if host not in self._attached:
            try:
                self._attached[host] = ReferenceAttachment(host, self.reference, self._names(model))
            except ReferenceMismatchError as error:
                made_for = title_of(self.reference.model.config.base)
                raise ReferenceMismatchError(
                    f'DEADiff "{self.name}" was made for {made_for}, this model is {model_title(model)}. {error}'
                ) from None
        return self._attached[host]

    def _names(self, model: nn.Module) -> dict[str, str]:
        wanted = [f"{site.name}.{part}" for site in self.reference.model.config.sites for part in ("to_k", "to_v")]
        return unet_modules(model, wanted)

    def blocks(self, model: nn.Module) -> dict[tuple[str, int, int], Site]:
        """ComfyUI's key of the transformer block that each site is in: ("input", 1, 0)."""
        names = self._names(model)
        return {block_key(names[f"{site.name}.to_k"]): site for site in self.reference.model.config.sites}

    def call(self, call: ModelCall) -> ModelCall:
        """The call with its roles as this reference needs them: "negative", and anything else."""
        return ModelCall(call.images, call.sigma, call.extras, cache(lambda: self._roles(call)))

    def _roles(self, call: ModelCall) -> tuple[str, ...]:
        roles, entries = call.roles, list(call.extras.get("cond_or_uncond") or ())
        if all(role.startswith("cond ") or role == "unknown" for role in roles):
            if not entries or (call.images and call.images % len(entries)):
                return (POSITIVE,)
            if not self._warned:
                self._warned.append("roles")
                logging.warning(
                    "StyleInject: nothing says which rows are the negative prompt's; %s takes them for those of ComfyUI's "
                    "second conditioning",
                    self.name,
                )
            return tuple(NEGATIVE if entry == 1 else POSITIVE for entry in entries)
        return tuple(NEGATIVE if NEGATIVE in role else POSITIVE for role in roles)

    def __deepcopy__(self, memo: dict) -> AppliedReference:
        return self


def block_key(module: str) -> tuple[str, int, int]:
    """ "input_blocks.1.1.transformer_blocks.0.attn2.to_k" -> ("input", 1, 0); the middle block is ("middle", 0, 0)."""
    found = re.search(r"(input|middle|output)_blocks?\.(\d+)\..*transformer_blocks\.(\d+)\.", module)
    if found is None:
        raise ValueError(f"{module}: no cross-attention of a U-Net")
    return found[1], 0 if found[1] == "middle" else int(found[2]), int(found[3])


def masked_options(
    references: Sequence[AppliedReference], model: nn.Module, x: Tensor, calls: Sequence[ModelCall], options: Mapping[str, Any]
) -> dict[str, Any]:
    """transformer_options with a replace patch on every cross-attention, for calls with masked references among them.

    Args:
        references: those that are active, in the order of their rows.
        x: the call's latents (B, C, H, W).
        calls: the call of each reference.
        options: the call's transformer_options, which stay as they are.
    """
    replaced = dict(options.get("patches_replace") or {})
    patches = dict(replaced.get("attn2") or {})
    for key, site in references[0].blocks(model).items():
        inner = patches.get(key, patches.get(key[:2]))
        patches[key] = MaskedAttention(references, model, site, x, calls, inner)
    replaced["attn2"] = patches
    return {**options, "patches_replace": replaced}


def unmasked_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformer_options as they were before `masked_options`; the same ones where it had not been."""
    replaced = options.get("patches_replace") or {}
    patches = replaced.get("attn2") or {}
    if not any(isinstance(patch, MaskedAttention) for patch in patches.values()):
        return options
    former = {key: patch.inner if isinstance(patch, MaskedAttention) else patch for key, patch in patches.items()}
    kept = {key: patch for key, patch in former.items() if patch is not None}
    return {**options, "patches_replace": {**replaced, "attn2": kept}}


class MaskedAttention:
    """An attn2 replace patch: the joint attention with each reference's mask on the columns of its tokens.

    `inner`, a patch that another pack has put there, computes the attention itself; its results with and without a reference
    are blended by the mask, which is the same where the mask is 0 or 1. Where masks overlap, the last reference wins there.
    """

    def __init__(
        self,
        references: Sequence[AppliedReference],
        model: nn.Module,
        site: Site,
        x: Tensor,
        calls: Sequence[ModelCall],
        inner: Attend | None,
    ):
        self.attachments = [reference.attachment(model) for reference in references]
        self.masks = [self._of_rows(r.mask, x.shape[0], call) for r, call in zip(references, calls, strict=True)]
        self.site, self.size, self.inner = site, tuple(x.shape[-2:]), inner

    @staticmethod
    def _of_rows(mask: Tensor | None, rows: int, call: ModelCall) -> Tensor | None:
        """(rows, H, W): image k of each part of the batch has mask k."""
        if mask is None:
            return None
        images = torch.arange(max(1, rows // max(1, len(call.roles)))) % mask.shape[0]
        return mask[images].repeat(-(-rows // len(images)), 1, 1)[:rows]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: Mapping[str, Any]) -> Tensor:
        height, width = latent_size(q.shape[1], *self.size)
        length, counts = self._columns(k.shape[1])
        biases = [
            torch.zeros(1, q.shape[1], count) if mask is None else mask_bias(mask, height, width, 0, count)
            for mask, count in zip(self.masks, counts, strict=True)
        ]
        inner = self.inner
        if inner is not None:
            shares = [None if mask is None else bias[..., :1].exp() for mask, bias in zip(self.masks, biases, strict=True)]
            return masked_blend(lambda k, v: inner(q, k, v, extra_options), k, v, length, counts, shares)
        rows = max(bias.shape[0] for bias in biases)
        text = torch.zeros(rows, q.shape[1], length)
        bias = torch.cat([text, *(b.expand(rows, -1, -1) for b in biases)], -1).to(q)  # (rows, N, length + added)
        precision = extra_options.get("attn_precision")
        return optimized_attention(q, k, v, extra_options["n_heads"], mask=bias, attn_precision=precision)

    def _columns(self, total: int) -> tuple[int, list[int]]:
        """How many of the keys are the text's, and how many each reference's: L + Σ S · repeats(L) = total."""
        for length in range(total, 0, -1):
            counts = [attachment.added(self.site, length) for attachment in self.attachments]
            if length + sum(counts) == total:
                return length, counts
        raise ValueError(f"{self.site.name}: {total} keys, expected the prompt's and its references'")


def latent_size(tokens: int, height: int, width: int) -> tuple[int, int]:
    """The height and width of a layer with so many tokens, of latents halved as often as it takes. Raises ValueError."""
    h, w = height, width
    while h * w > tokens and (h > 1 or w > 1):
        h, w = (h + 1) // 2, (w + 1) // 2
    if h * w != tokens:
        raise ValueError(f"a mask cannot be put on {tokens} tokens of latents of {height} x {width}")
    return h, w
