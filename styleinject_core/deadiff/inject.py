"""Putting a reference on a host model: rows appended to what attn2.to_k and attn2.to_v return, and off again.

The frozen layers are still called, so that quantized weights, LoRAs and adapters on them work as they do alone, and an
attention that somebody else computes from the keys and values, an attn2 replace patch for one, is the joint one too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..call import CurrentCall, ModelCall
from ..layers import LayerShape, UnsupportedLayerError
from ..override import Installation, Override, Tail
from .config import Site
from .model import Deadiff
from .rows import ConstantRows, Reference, repeats
from .tokens import TokensError

PARTS = ("to_k", "to_v")


class ReferenceMismatchError(ValueError):
    """A host that DEADiff's tokens cannot be given to; the message names both sides."""


def matched_layers(
    host: nn.Module, model: Deadiff, names: Mapping[str, str] | None = None
) -> list[tuple[Site, str, nn.Module, LayerShape]]:
    """The host's to_k and to_v of each site, in the order of the sites.

    Args:
        names: see ReferenceAttachment.

    Raises:
        ReferenceMismatchError: a cross-attention that is not in the host, or has other sizes.
    """
    modules, found = dict(host.named_modules()), []
    for site in model.config.sites:
        wanted = LayerShape(model.config.context, site.width)
        for part in PARTS:
            layer = f"{site.name}.{part}"
            module = modules.get((names or {}).get(layer, layer))
            if module is None:
                count = len(model.config.layers)
                raise ReferenceMismatchError(
                    f"{model.name} has tokens for {count} cross-attentions, this model has none at {layer}"
                )
            try:
                shape: Any = LayerShape.of(module)
            except UnsupportedLayerError as error:
                shape = error
            if shape != wanted:
                raise ReferenceMismatchError(f"{model.name}: {layer}: made for {wanted}, this model has {shape}")
            found.append((site, part, module, wanted))
    return found


class _Appended:
    """The rows of one Linear in a call."""

    def __init__(self, source: ConstantRows, layer: str):
        self.source, self.layer = source, layer

    @torch.compiler.disable
    def __call__(self, x: Tensor, out: Tensor, call: ModelCall) -> Tensor:
        batch, length = x.shape[0], x.shape[1]
        if call.images and batch != call.images:
            raise TokensError(
                f"{self.layer}: the text has {batch} rows and the batch {call.images} images: a node that gives each region of "
                "the image a prompt of its own inside the attention cannot be combined with a reference"
            )
        return self.source.for_call(call.roles, batch, length, out)


class ReferenceAttachment(Installation[Tail]):
    """A reference matched to a host's cross-attentions; a context manager that installs it for its length.

    Args:
        host: any module tree.
        reference: tokens and weights.
        names: diffusers name of a layer ("...attn2.to_k") -> the host's module name, where it spells them otherwise.

    Raises:
        ReferenceMismatchError: a cross-attention that is not in the host, or has other sizes.
    """

    def __init__(self, host: nn.Module, reference: Reference, names: Mapping[str, str] | None = None):
        super().__init__()
        self.reference = reference
        self.current = CurrentCall()
        self.rows = reference.rows()
        for site, part, module, shape in matched_layers(host, reference.model, names):
            found = self.rows[site.name]
            source = found.keys if part == "to_k" else found.values
            self._places.append((Override(module, shape), Tail(_Appended(source, f"{site.name}.{part}"), self.current)))

    def added(self, site: Site, length: int) -> int:
        """How many rows a text of this length gets in a layer."""
        source = self.rows[site.name].keys
        return source.positive.shape[1] * repeats(length, source.text_tokens)

    @contextmanager
    def in_call(self, call: ModelCall) -> Iterator[None]:
        """Tell the layers what the current call of the host knows, for the length of a with block."""
        with self.current.during(call):
            yield

    def __str__(self) -> str:
        sites = self.reference.model.config.sites
        counts = {stream: sum(site.stream == stream for site in sites) for stream in ("style", "content")}
        return f"{self.reference.model.name}: {counts['style']} style + {counts['content']} content layers matched"


@contextmanager
def referenced(
    host: nn.Module,
    reference: Reference,
    roles: Sequence[str] = ("negative", "positive"),
    names: Mapping[str, str] | None = None,
) -> Iterator[ReferenceAttachment | None]:
    """A host with a reference, for the length of a with block.

        with referenced(pipeline.unet, Reference(model, model.encode(features, "style"))):
            image = pipeline("a red apple", guidance_scale=7.5).images[0]

    Args:
        host: a diffusers U-Net, or any module tree.
        reference: tokens and weights. Where all weights are 0 nothing is installed: the host is bit for bit its own.
        roles: of the batch's equal parts; diffusers puts the negative prompt first. ("positive",) without guidance.

    Raises:
        ReferenceMismatchError: the host does not fit.
    """
    attachment = ReferenceAttachment(host, reference, names)
    if not reference.active:
        yield None
        return
    call = ModelCall(find_roles=lambda: tuple(roles))
    with attachment.in_call(call), attachment:
        yield attachment
