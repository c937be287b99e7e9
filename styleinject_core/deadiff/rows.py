"""The rows that tokens add to the keys and values of a cross-attention, for one layer and one model call.

    K = [Wk text ; w · Ik img]      V = [Wv text ; w · Iv img]      one softmax over both (paper, eq. 4)

img are the stream's tokens in the rows of the batch that the positive prompt has, and zeros in those of the negative
one. A stream that is idle, or a weight of 0, gives zeros everywhere: rows of K = V = 0, which keep their exp(0) in the
softmax's denominator. The model was trained with them, so they stay wherever DEADiff is applied at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention

from ..layers import LayerShape
from ..selector import parse_weights
from .config import Site
from .model import Deadiff
from .tokens import Tokens, TokensError

NEGATIVE = "negative"
MAX_WEIGHT = 2.0
_NOTHING = -3e4  # a bias whose exp is 0 in every dtype, and which no attention by chunks turns into NaN, as it does -inf


@dataclass(frozen=True)
class Reference:
    """What is applied to a model: tokens and their weights.

    Args:
        model: whose tokens they are.
        style, content: the tokens of the two streams; None leaves the stream idle.
        weight_style, weight_content: 0 to 2. They scale keys and values together, so their effect is not linear.
        layer_weights: `selector = number` lines (styleinject_core.selector), -2 to 2, over the to_k and to_v of the layers;
            1 where no line says otherwise.
        negative_style, negative_content: tokens for the rows of the negative prompt, in place of zeros.

    Raises:
        TokensError: no tokens, tokens that are not the model's, more negative tokens than positive ones, a weight that is
            out of its range.
        SelectorError: a line of layer_weights that cannot be read or matches nothing.
    """

    model: Deadiff
    style: Tokens | None = None
    content: Tokens | None = None
    weight_style: float = 1.0
    weight_content: float = 1.0
    layer_weights: str = ""
    negative_style: Tokens | None = None
    negative_content: Tokens | None = None

    def __post_init__(self) -> None:
        if self.style is None and self.content is None:
            raise TokensError("no tokens to apply: connect style tokens, content tokens or both")
        for stream in ("style", "content"):
            tokens, negative = getattr(self, stream), getattr(self, f"negative_{stream}")
            for given in (tokens, negative):
                if given is not None:
                    self.model.check(given, stream)
            weight = getattr(self, f"weight_{stream}")
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= MAX_WEIGHT:
                raise TokensError(f"weight_{stream} is {weight!r}, expected 0 to {MAX_WEIGHT:g}")
            if negative is not None and negative.count > self.count(stream):
                raise TokensError(
                    f"the negative reference has {negative.count} {stream} tokens, more than the {self.count(stream)} of the "
                    "positive one: both need the same rows of the softmax"
                )
        self.scales()

    @property
    def active(self) -> bool:
        """Whether anything is installed: not where every stream that has tokens has weight 0."""
        streams = ("style", "content")
        return any(getattr(self, s) is not None and getattr(self, f"weight_{s}") != 0 for s in streams)

    def count(self, stream: str) -> int:
        """S of a stream's layers: its own tokens, or as many zeros as the other stream has tokens."""
        own, other = (self.style, self.content) if stream == "style" else (self.content, self.style)
        given = own if own is not None else other
        assert given is not None
        return given.count

    def scales(self) -> dict[str, tuple[float, float]]:
        """Site name -> the factors of its keys and of its values: the stream's weight times the layer's."""
        config = self.model.config
        shapes = {
            f"{site.name}.{part}": LayerShape(config.context, site.width) for site in config.sites for part in ("to_k", "to_v")
        }
        weights = parse_weights(shapes, self.layer_weights)
        for name, weight in weights.items():
            if abs(weight) > MAX_WEIGHT:
                raise TokensError(f"layer weight of {name} is {weight:g}, expected {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
        scales = {}
        for site in config.sites:
            weight = getattr(self, f"weight_{site.stream}")
            scales[site.name] = (weight * weights[f"{site.name}.to_k"], weight * weights[f"{site.name}.to_v"])
        return scales

    def rows(self) -> dict[str, LayerRows]:
        """The constants of every site. A matter of milliseconds; i_to_k and i_to_v are not needed afterwards."""
        scales = self.scales()
        return {site.name: self._rows_of(place, site, *scales[site.name]) for place, site in enumerate(self.model.config.sites)}

    def _rows_of(self, place: int, site: Site, key_scale: float, value_scale: float) -> LayerRows:
        count = self.count(site.stream)

        def scaled(tokens: Tokens | None) -> tuple[Tensor, Tensor]:
            if tokens is None:
                nothing = torch.zeros(1).expand(1, count, site.width)
                return nothing, nothing
            missing = (0, 0, 0, count - tokens.count)  # a shorter negative reference: null tokens for the rest
            keys, values = self.model.key_values(tokens, place)
            return pad(key_scale * keys, missing), pad(value_scale * values, missing)

        positive, negative = scaled(getattr(self, site.stream)), scaled(getattr(self, f"negative_{site.stream}"))
        keys, values = (
            ConstantRows(own, others, self.model.config.text_tokens) for own, others in zip(positive, negative, strict=True)
        )
        return LayerRows(site, keys, values)


@dataclass(frozen=True, eq=False)
class ConstantRows:
    """Constant rows for the output of one Linear, to_k or to_v.

    Args:
        positive: (R, S, C), scaled; R is 1 or the images of a batch with a reference each.
        negative: (R', S, C) for the rows of the negative prompt.
        text_tokens: rows of the text the tokens were trained beside (77).
    """

    positive: Tensor
    negative: Tensor
    text_tokens: int
    _latest: dict[Any, tuple[Any, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def for_call(self, roles: Sequence[str], batch: int, length: int, like: Tensor) -> Tensor:
        """What is appended to `like`, the Linear's output.

        Args:
            roles: the role of each equal part of the batch; "negative" gets the negative rows, all others the positive.
            batch: B, rows of the batch.
            length: L, rows of the text. A text that was repeated or is longer gets the tokens `repeats(L)` times.
            like: for device and dtype.

        Returns:
            (B, S · repeats, C).

        Raises:
            TokensError: a batch that is no multiple of its parts.
        """
        key = (tuple(roles), batch, length, like.dtype)
        found = self._latest.get(like.device)
        if found is None or found[0] != key:
            found = key, self._build(roles, batch, length).to(like)
            self._latest[like.device] = found  # the last one alone: every step of a run asks for the same
        return found[1]

    def _build(self, roles: Sequence[str], batch: int, length: int) -> Tensor:
        return build_rows(self.positive, self.negative, roles, batch, repeats(length, self.text_tokens))


@dataclass(frozen=True, eq=False)
class LayerRows:
    """The rows of one site's keys and values."""

    site: Site
    keys: ConstantRows
    values: ConstantRows

    def nbytes(self) -> int:
        """Memory of the constants."""
        parts = [t for rows in (self.keys, self.values) for t in (rows.positive, rows.negative)]
        return sum(part.untyped_storage().nbytes() for part in parts)


def repeats(length: int, text_tokens: int) -> int:
    """How often the tokens are appended: max(1, round(L / 77)).

    Host programs repeat a short prompt's context to the length of a longer one. For text alone that changes nothing; a
    joint softmax would give the tokens half of their weight. As many copies of the tokens restore it exactly.
    """
    return max(1, round(length / text_tokens))


def build_rows(positive: Tensor, negative: Tensor, roles: Sequence[str], batch: int, copies: int) -> Tensor:
    """(R, S, C) and (R', S, C) -> (B, S · copies, C): image k of each part of the batch gets reference k mod R.

    Raises:
        TokensError: `batch` is no multiple of the number of roles.
    """
    parts = max(1, len(roles))
    if batch % parts:
        raise TokensError(f"a batch of {batch} rows cannot be {parts} equal parts ({', '.join(roles)})")
    images = torch.arange(batch // parts)
    pieces = []
    for role in roles or ("",):
        source = negative if role == NEGATIVE else positive
        pieces.append(source[images % source.shape[0]])
    return torch.cat(pieces).repeat(1, copies, 1)


def joint_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(d) + bias) v by heads, before the output projection.

    Args:
        q: (B, N, C); k, v: (B, M, C) with the rows appended.
        bias: (B or 1, N, M), added to the logits of every head.

    Returns:
        (B, N, C).
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask = None if bias is None else bias.unsqueeze(1).to(q)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def mask_bias(mask: Tensor, height: int, width: int, text: int, added: int) -> Tensor:
    """log(mask) on the columns of the tokens: 1 is the joint softmax, 0 the attention to the text alone.

    Args:
        mask: (B, H, W) in [0, 1], of the image; resized to the layer's tokens.
        height, width: of the layer's latent; N = height · width.
        text, added: columns of the text and of the tokens.

    Returns:
        (B, N, text + added), float32.
    """
    small = interpolate(mask.float().unsqueeze(1), (height, width), mode="area")
    columns = small.clamp(0, 1).flatten(1).log().clamp(min=_NOTHING).unsqueeze(-1)  # (B, N, 1)
    return torch.cat([columns.new_zeros(*columns.shape[:2], text), columns.expand(-1, -1, added)], -1)


def masked_blend(
    attend: Callable[[Tensor, Tensor], Tensor],
    k: Tensor,
    v: Tensor,
    length: int,
    counts: Sequence[int],
    shares: Sequence[Tensor | None],
) -> Tensor:
    """Masked references through an attention that takes no bias: its results with and without them, blended.

    Args:
        attend: keys and values -> (B, N, C).
        k, v: (B, length + Σ counts, C): the text's, then each reference's.
        counts: columns of each reference.
        shares: (B or 1, N, 1) in [0, 1], the reference's mask; None for one that is everywhere.

    Returns:
        (B, N, C); the same as a bias of log(mask) gives where the masks are 0 or 1 and do not overlap.
    """
    pieces = list(zip(k.split([length, *counts], 1), v.split([length, *counts], 1), strict=True))
    always = [pieces[0], *(piece for piece, share in zip(pieces[1:], shares, strict=True) if share is None)]

    def attended(*more: tuple[Tensor, Tensor]) -> Tensor:
        keys, values = zip(*always, *more, strict=True)
        return attend(torch.cat(keys, 1), torch.cat(values, 1))

    out = attended()
    for piece, share in zip(pieces[1:], shares, strict=True):
        if share is not None:
            out = torch.lerp(out, attended(piece), share.to(out).expand_as(out))
    return out


def check_mask(mask: Tensor) -> None:
    """Whether a mask can be used.

    Raises:
        TokensError: NaN or Inf values, or nothing but zeros.
    """
    if not torch.isfinite(mask).all():
        raise TokensError("the mask has NaN or Inf values")
    if not (mask > 0).any():
        raise TokensError("the mask is empty: it is 0 everywhere, so no part of the image would take the reference")
