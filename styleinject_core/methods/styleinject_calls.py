"""StyleInject's layers in calls, fast: what `styleinject.py` has as equations, worked out with n styles collapsed before any
position is touched, and with several adapters side by side (method, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..functional.host import HostLayer, statistics_dtype
from ..functional.stacked import stacked
from ..functional.update import Change, Head, Hear, LowRank, Prepared, Update, raised

if TYPE_CHECKING:
    from .styleinject import StyleInjectWeights


def prepare(several: Sequence[StyleInjectWeights]) -> Sequence[Prepared]:
    """The layers of this method on one host layer, ready for calls: those of one shape and kind together."""
    groups: dict[Any, list[StyleInjectWeights]] = {}
    for w in several:
        if not w.by_token:
            prompt = None if w.router_prompt is None else w.router_prompt.shape
            kind = (
                w.router_pool,
                w.A.shape,
                w.router_weight is None,
                prompt,
                w.router_bias is None,
                w.eps if w.needs_sigma else None,
            )
            groups.setdefault(kind, []).append(w)
    return [*map(_SideBySide.of, groups.values()), *(_TokenByToken(w) for w in several if w.by_token)]


def route(
    x: Tensor, weights: StyleInjectWeights, host: HostLayer, mean: Tensor | None = None, hear: Hear | None = None
) -> Tensor:
    """Style probabilities of one layer. The router is linear, so pooled logits need only the pooled input.

    Args:
        mean: x averaged over positions (B, k), where the caller has it already.

    Returns:
        (B, n), or (B, L, n) with router_pool "token"; in x's dtype, computed in at least float32.
    """
    if weights.router_bias is None:
        return x.new_ones(x.shape[0], 1)
    if not weights.by_token:
        side = _SideBySide.of([weights])
        if mean is None and side.needs_mean:
            mean = host.mean(x)
        return side.route(x, host, mean, hear).to(x.dtype)
    precise = statistics_dtype(x)
    logits = x.to(precise) @ weights.router_weight.to(precise).mT + weights.router_bias.to(precise)  # (B, L, n)
    if weights.router_prompt is not None:
        logits = logits + (host.prompt_of(x).to(precise) @ weights.router_prompt.to(precise).mT)[:, None]
    s = torch.softmax(logits, -1)
    return (s if hear is None else hear(weights, s)).to(x.dtype)


def hyper(s: Tensor, weights: StyleInjectWeights) -> Tensor:
    """hyper(s): the modulation of every channel, (B, d) or (B, L, d) by token, in at least float32."""
    precise = statistics_dtype(s)
    return s.to(precise) @ weights.hyper_weight.to(precise).mT + weights.hyper_bias.to(precise)


@dataclass(frozen=True, eq=False)
class _SideBySide:
    """Layers of one rank, one number of styles, one pooling and one kind of statistics, with an s per image: their routers,
    hypernetworks and projections run in the same few products, and n styles collapse before any position is touched.

    Nothing here depends on x. One layer's tensors are used as they are; of several, routers, hypernetworks and
    up-projections are copied (2 / r of what A takes), and A is stacked without a copy where it can be (`stacked`).

    Args:
        router, router_bias: (J·n, k) and (J·n,), in at least float32; no bias for LoRAs, whose s is 1, and no router where the
            prompt alone decides.
        prompt: (J·n, c), what reads the prompt; None where nothing does.
        hyper, hyper_bias: (d, J·n) and (d,), Σ_j sta_j of them, to be scaled by `sta`; None where none adapts statistics.
        down: the J matrices A (n, r, k[, kh, kw]).
        up: (d, J·r), with the strengths in it, to be scaled by `dma`; None where every dma is 0.
        together: whether the J matrices lie one after the other in one storage.
    """

    several: tuple[StyleInjectWeights, ...]
    router: Tensor | None
    router_bias: Tensor | None
    hyper: Tensor | None
    hyper_bias: Tensor | None
    sta: float
    down: tuple[Tensor, ...]
    up: Tensor | None
    dma: float
    together: bool = False
    prompt: Tensor | None = None

    @property
    def folds(self) -> bool:
        return not self.several[0].needs_sigma

    @classmethod
    def of(cls, several: Sequence[StyleInjectWeights]) -> _SideBySide:
        first = several[0]
        precise = statistics_dtype(first.A)
        statistics = any(w.adapts_statistics for w in several)
        changes = any(w.dma != 0 for w in several)
        if len(several) == 1:
            parts = (first.router_weight, first.router_bias, first.hyper_weight, first.hyper_bias, first.router_prompt)
            router, router_bias, hyper, hyper_bias, prompt = (None if p is None else p.to(precise) for p in parts)
            if not statistics:
                hyper = hyper_bias = None
            return cls((first,), router, router_bias, hyper, hyper_bias, first.sta, (first.A,), first.B if changes else None,
                       first.dma, prompt=prompt)  # fmt: skip
        together = not torch.is_grad_enabled() and not torch.compiler.is_compiling() and stacked([w.A for w in several])
        router = router_bias = hyper = hyper_bias = up = prompt = None
        if first.router_weight is not None:
            router = torch.cat([w.router_weight.to(precise) for w in several])
        if first.router_prompt is not None:
            prompt = torch.cat([w.router_prompt.to(precise) for w in several])
        if first.router_bias is not None:
            router_bias = torch.cat([w.router_bias.to(precise) for w in several])
        if statistics:
            own = [(w.hyper_weight, w.hyper_bias) if w.adapts_statistics else (None, None) for w in several]
            zero = first.B.new_zeros(first.B.shape[0], first.A.shape[0], dtype=precise)
            hyper = torch.cat([zero if p is None else p.to(precise) * w.sta for (p, _), w in zip(own, several, strict=True)], 1)
            biases = [b.to(precise) * w.sta for (_, b), w in zip(own, several, strict=True) if b is not None]
            hyper_bias = torch.stack(biases).sum(0)
        if changes:
            up = torch.cat([w.B * w.dma for w in several], 1)
        down = tuple(w.A for w in several)
        return cls(tuple(several), router, router_bias, hyper, hyper_bias, 1.0, down, up, 1.0, together, prompt)

    @property
    def needs_mean(self) -> bool:
        return self.router is not None

    @property
    def live(self) -> Sequence[Tensor]:
        return self.down

    def update(self, x: Tensor, host: HostLayer, mean: Tensor | None, hear: Hear | None) -> Update:
        gain: Tensor | None = None
        changes: tuple[Change, ...] = ()
        if self.router_bias is None:
            if self.hyper is not None:  # a hypernetwork without a router: one style, s = 1
                gain = (self.sta * (self.hyper.sum(1) + self.hyper_bias)).expand(x.shape[0], -1)
            if self.up is not None:
                ups = self.up.chunk(len(self.down), 1)
                changes = tuple(LowRank(A[0], up, self.dma) for A, up in zip(self.down, ups, strict=True))
            return _update(gain, changes, self.several[0])
        if mean is None and self.router is not None:
            mean = host.mean(x)
        s = self.route(x, host, mean, hear)  # (B, J·n)
        if self.hyper is not None:
            if self.sta == 1:
                gain = F.linear(s, self.hyper, self.hyper_bias)  # (B, d)
            else:
                gain = torch.addmm(self.hyper_bias, s, self.hyper.mT, beta=self.sta, alpha=self.sta)
        if self.up is not None:
            low = s if s.dtype == x.dtype else s.to(x.dtype)
            if len(self.down) == 1:
                mixed = low @ self.down[0].flatten(1)
            else:
                mixed = self._mixing(low.shape[0])(low.view(low.shape[0], len(self.down), -1))
            changes = (LowRank(mixed.view(x.shape[0], -1, *self.down[0].shape[2:]), self.up, self.dma),)
        return _update(gain, changes, self.several[0])

    @property
    def head(self) -> Head | None:
        """The update without its choices, where it has a router of the mean, a gain and a change."""
        router, router_bias, hyper, hyper_bias, sta = self.router, self.router_bias, self.hyper, self.hyper_bias, self.sta
        if router is None or self.prompt is not None or hyper is None or self.up is None or not self.folds:
            return None
        if self.several[0].router_pool != "mean":
            return None
        first, A, layers = self.several[0], self.down[0], len(self.down)
        router_t, hyper_t, styles = router.mT, hyper.mT, router_bias.shape[0] // layers
        addmm, mm, softmax = torch.addmm, torch.mm, torch.softmax
        scaled: dict[str, Any] = (
            {} if sta == 1 else {"beta": sta, "alpha": sta}
        )  # a number that is given takes time, also where it is 1

        def of(batch: int, positions: int, dtype: torch.dtype, hear: Hear | None) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
            share, same, down = 1 / positions, dtype == router.dtype, (batch, A.shape[1], A[0, 0].numel())
            by_layer, flat = (batch, layers, styles), (batch, layers * styles)
            mixed = self._mixing(batch)

            def one(total: Tensor) -> tuple[Tensor, Tensor]:
                s = softmax(addmm(router_bias, total, router_t, alpha=share), 1)
                if hear is not None:
                    s = hear(first, s)
                low = mm(s if same else s.to(dtype), A.flatten(1))
                return addmm(hyper_bias, s, hyper_t, **scaled), low.view(down)

            def several(total: Tensor) -> tuple[Tensor, Tensor]:
                s = softmax(addmm(router_bias, total, router_t, alpha=share).view(by_layer), 2)
                if hear is not None:
                    s = torch.stack([hear(*heard) for heard in zip(self.several, s.unbind(1), strict=True)], 1)
                low = mixed(s if same else s.to(dtype))
                return addmm(hyper_bias, s.view(flat), hyper_t), low

            return one if layers == 1 else several

        return Head(of, self.up, self.dma)

    def route(self, x: Tensor, host: HostLayer, mean: Tensor | None, hear: Hear | None) -> Tensor:
        """s of every layer side by side, (B, J·n), in at least float32."""
        layers = len(self.several)
        if self.router is None:
            logits = F.linear(host.prompt_of(x).to(self.router_bias.dtype), self.prompt, self.router_bias)
        else:
            logits = F.linear(mean, self.router, self.router_bias)
            if self.several[0].router_pool == "sum":
                logits = logits * host.count(x)
            if self.prompt is not None:
                logits = torch.addmm(logits, host.prompt_of(x).to(logits.dtype), self.prompt.mT)
        if layers > 1:
            logits = logits.view(logits.shape[0], layers, -1)
        s = torch.softmax(logits, -1)
        if hear is not None:
            parts = (s,) if layers == 1 else s.unbind(1)
            s = torch.cat([hear(weights, part) for weights, part in zip(self.several, parts, strict=True)], 1)
        return s.flatten(1) if s.ndim == 3 else s

    def _mixing(self, batch: int) -> Callable[[Tensor], Tensor]:
        """Σ_i s_i A_i of several layers side by side, as a function of s: (B, J, n) -> (B, J·r, k·kh·kw)."""
        first, layers = self.down[0], len(self.down)
        styles, rank = first.shape[:2]
        numbers = first.numel() // styles
        shape = batch, layers * rank, numbers // rank
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return lambda s: torch.stack([s[:, j] @ A.flatten(1) for j, A in enumerate(self.down)], 1).view(shape)
        by_layer = (layers, batch, numbers), (numbers, layers * numbers, 1)  # of what is `shape` in memory
        stack, bmm, mm = ((layers, styles, numbers), (styles * numbers, numbers, 1)), torch.bmm, torch.mm

        def together(s: Tensor) -> Tensor:
            mixed = s.new_empty(shape)
            bmm(s.transpose(0, 1), first.as_strided(*stack), out=mixed.as_strided(*by_layer))
            return mixed

        def apart(s: Tensor) -> Tensor:
            mixed = s.new_empty(shape)
            for one, A, out in zip(s.unbind(1), self.down, mixed.as_strided(*by_layer).unbind(), strict=True):
                mm(one, A.flatten(1), out=out)
            return mixed

        return together if self.together else apart


@dataclass(frozen=True, eq=False)
class _TokenByToken:
    """A layer that routes every token by itself."""

    weights: StyleInjectWeights
    folds = False
    needs_mean = False

    @property
    def live(self) -> Sequence[Tensor]:
        return self.weights.A, self.weights.B

    def update(self, x: Tensor, host: HostLayer, mean: Tensor | None, hear: Hear | None) -> Update:
        weights = self.weights
        s = route(x, weights, host, mean, hear)
        gain = hyper(s, weights) * weights.sta if weights.adapts_statistics else None
        changes = (_ByToken(s, weights.A, weights.B, weights.dma),) if weights.dma != 0 else ()
        return _update(gain, changes, weights)


def _update(gain: Tensor | None, changes: tuple[Change, ...], weights: StyleInjectWeights) -> Update:
    """An update whose gain is G, or, of additive statistics, what is divided by σ."""
    if weights.needs_sigma:
        return Update(sigma_gain=gain, eps=weights.eps, changes=changes)
    return Update(gain=gain, changes=changes)


@dataclass(frozen=True, eq=False)
class _ByToken:
    """ΔW of every token: scale · B Σ_i s_i A_i, with s (B, L, n), A (n, r, k) and B (d, r)."""

    s: Tensor
    A: Tensor
    B: Tensor
    scale: float
    folds = False

    def beside(self, out: Tensor, x: Tensor, host: HostLayer, owned: bool) -> Tensor:
        compiled = torch.compiler.is_compiling()  # which finds for itself what to keep
        low = (_mixed if compiled or not torch.is_grad_enabled() else _Mixed.apply)(x, self.A, self.s)
        return raised(out, low, self.B, self.scale, owned)

    def onto(self, weight: Tensor, owned: bool) -> Tensor:
        raise TypeError("a change that differs by token has no single weight")


def _every(x: Tensor, A: Tensor) -> Tensor:
    """A_i(x) of every style, (B, L, n, r)."""
    return F.linear(x, A.flatten(0, 1)).unflatten(-1, A.shape[:2])


def _mixed(x: Tensor, A: Tensor, s: Tensor) -> Tensor:
    """Σ_i s_i A_i(x) of every token, (B, L, r), with x (B, L, k), A (n, r, k) and s (B, L, n)."""
    return torch.einsum("bln,blnr->blr", s, _every(x, A))


class _Mixed(torch.autograd.Function):
    """`_mixed`, which keeps x and s for the backward pass; A_i(x), n·r numbers a token, are worked out again there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(x, A, s)
        return _mixed(x, A, s)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, A, s = ctx.saved_tensors
        of_x = of_A = of_s = None
        spread = torch.einsum("bln,blr->blnr", s, gradient).flatten(2)  # the gradient of A_i(x)
        if ctx.needs_input_grad[0]:
            of_x = spread @ A.flatten(0, 1)
        if ctx.needs_input_grad[1]:
            of_A = (spread.flatten(0, 1).mT @ x.flatten(0, 1)).view(A.shape)
        if ctx.needs_input_grad[2]:
            of_s = torch.einsum("blr,blnr->bln", gradient, _every(x, A))
        return of_x, of_A, of_s
