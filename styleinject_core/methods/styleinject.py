"""StyleInject (arXiv 2401.13942): n down-projections mixed by a style router, one up-projection, and an AdaIN step.

    s      = softmax( pool_over_positions( router(x) ) )          the style router
    Δh     = (alpha / r) · B Σ_i s_i A_i(x)                       eq. 2, dynamic multi-style adaptation (DMA)
    h*     = (h - μ) / σ · f_s(σ) + μ + Δh                        eq. 3 and 4, style transfer by AdaIN (STA)
    f_s(σ) = σ · (1 + hyper(s))

Beyond the paper, a router may read the prompt, in the place of x or beside it (`router_input`): P t is added to its logits,
with t the text conditioning averaged over its tokens.

Here are its parameters, these equations written plainly (`StyleInjectWeights.increment`) and its file; `styleinject_calls.py`
is the same made fast. A layer with one style, no router and no hypernetwork is a LoRA: `lora.py` gives it that file format.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import AdapterConfig
from ..functional.host import HostLayer
from ..functional.update import Hear, Prepared
from ..layers import LayerShape, UnsupportedLayerError
from . import low_rank
from .method import AdapterLayer, AdapterSettings, Cast, Method, Problem
from .styleinject_calls import prepare

PARTS = ("A", "B", "router_weight", "router_bias", "hyper_weight", "hyper_bias", "router_prompt")


class StyleInjectLayer(AdapterLayer):
    """One layer of StyleInject, or of a LoRA; new, B and hyper are 0 (method, section 1).

    Shapes: A (n, r, k[, kh, kw]), B (d, r), router_weight (n, k), router_bias (n,), hyper_weight (d, n), hyper_bias (d,),
    router_prompt (n, c) with c the width of the text conditioning.

    Raises:
        UnsupportedLayerError: router_pool "token" on a convolution.
    """

    PARTS = PARTS
    PRECISE = frozenset(PARTS[2:])
    config: AdapterConfig
    A: Tensor
    B: Tensor
    router_weight: Tensor | None
    router_bias: Tensor | None
    hyper_weight: Tensor | None
    hyper_bias: Tensor | None
    router_prompt: Tensor | None

    def check(self) -> None:
        if self.shape.is_conv and self.config.router_pool == "token" and self.config.has_router:
            raise UnsupportedLayerError(f"router_pool 'token' needs a Linear layer, found {self.shape}")
        if self.config.reads_prompt and self.config.has_router and not self.config.prompt_features:
            raise UnsupportedLayerError(f"router_input {self.config.router_input!r} needs prompt_features, found 0")

    def initial(self) -> dict[str, Tensor]:
        config, shape = self.config, self.shape
        n, r, k, d = config.n_styles, config.r, shape.in_features, shape.out_features
        A = torch.empty(n, r, k, *(shape.kernel or ()))
        for style in A:
            torch.nn.init.kaiming_uniform_(style, a=math.sqrt(5))  # as LoRA's A
        parts = {"A": A, "B": torch.zeros(d, r)}
        if config.has_router:
            parts["router_bias"] = torch.zeros(n)
            if config.router_input != "prompt":
                parts["router_weight"] = torch.zeros(n, k)
            if config.reads_prompt:
                parts["router_prompt"] = torch.zeros(n, config.prompt_features)
        if config.sta != "none":
            parts |= {"hyper_weight": torch.zeros(d, n), "hyper_bias": torch.zeros(d)}
        return parts

    @property
    def fixed(self) -> bool:
        return self.router_bias is None and self.hyper_weight is None

    def fitted(self, shape: LayerShape) -> AdapterLayer | None:
        """A LoRA whose convolution is stored as a matrix, or the other way round, or that is for another kind of layer."""
        rows, inputs = self.B.shape[0], self.A[0, 0].numel()
        if not self.fixed or (rows, inputs) != (shape.out_features, math.prod(shape.weight[1:])):
            return None
        A = self.A.detach().reshape(*self.A.shape[:2], *shape.weight[1:])
        if shape.other:
            return low_rank.plain(shape, A[0], self.B.detach(), self.config.alpha)
        return StyleInjectLayer(shape, self.config, {"A": A, "B": self.B.detach()})

    @property
    def tokens(self) -> str:
        return "all" if self.fixed else self.config.tokens

    @property
    def styles(self) -> int:
        return 0 if self.router_bias is None else self.config.n_styles

    @property
    def prompt_features(self) -> int:
        return 0 if self.router_prompt is None else self.router_prompt.shape[1]

    def delta(self) -> Tensor:
        A, B = self.A[0].flatten(1).float(), self.B.float()
        return (self.config.scale * (B @ A)).view(self.shape.weight)

    def weights(
        self, cast: Cast, *, dma: float, sta: float, owner: Hashable = None, precise: Cast | None = None
    ) -> StyleInjectWeights:
        c = self.config
        pool = c.router_pool if c.router_pool != "paper" else "sum" if self.shape.is_conv else "token"
        casts = {part: cast if precise is None or part not in self.PRECISE else precise for part in PARTS}
        parts: dict[str, Any] = {part: None if (p := getattr(self, part)) is None else casts[part](p) for part in PARTS}
        return StyleInjectWeights(**parts, router_pool=pool, sta_form=c.sta, eps=c.eps, dma=dma * c.scale, sta=sta, owner=owner)


@dataclass(frozen=True, eq=False)
class StyleInjectWeights:
    """One layer's tensors cast for calls, with its strengths; shapes as in `StyleInjectLayer`.

    No router_bias means no router, and one style; no hypernetwork means no AdaIN step. `dma` already holds the factor
    alpha / r; `sta` is the strength of the AdaIN step.
    """

    A: Tensor
    B: Tensor
    router_weight: Tensor | None
    router_bias: Tensor | None
    hyper_weight: Tensor | None
    hyper_bias: Tensor | None
    router_prompt: Tensor | None
    router_pool: str
    sta_form: str
    eps: float
    dma: float
    sta: float
    owner: Hashable = None

    @property
    def by_token(self) -> bool:
        return self.router_pool == "token" and self.router_weight is not None

    @property
    def adapts_statistics(self) -> bool:
        return self.hyper_weight is not None and self.sta != 0

    @property
    def needs_sigma(self) -> bool:
        return self.adapts_statistics and self.sta_form == "additive"

    @property
    def active(self) -> bool:
        return self.dma != 0 or self.adapts_statistics

    def cast(self, dtype: torch.dtype) -> StyleInjectWeights:
        return replace(self, **{part: t.to(dtype) for part in PARTS if (t := getattr(self, part)) is not None})

    @classmethod
    def prepare(cls, several: Sequence[StyleInjectWeights]) -> Sequence[Prepared]:
        return prepare(several)

    def increment(self, x: Tensor, h: Tensor, host: HostLayer, hear: Hear | None) -> Tensor:
        """The paper's equations 2 to 4, as increments on h. Tokens that are not the image's get Δh alone."""
        image = host.seen(h)
        mean = image.mean(host.positions, keepdim=True)  # μ, eq. 3
        std = image.std(host.positions, correction=0, keepdim=True)  # σ, eq. 3
        s = self.plain_route(x, host)
        if hear is not None and self.router_bias is not None:
            s = hear(self, s)
        out: Any = 0.0
        if self.adapts_statistics:
            sigma = std.clamp(min=self.eps)
            hyper = host.per_channel(s @ self.hyper_weight.mT + self.hyper_bias)
            f_s = sigma * (1 + hyper) if self.sta_form == "multiplicative" else sigma + hyper
            normalized = (h - mean) / sigma  # ĥ
            stylized = normalized * f_s + mean  # eq. 4 without Δh
            out = self.sta * (stylized - h)
            if host.tokens is not None:
                is_image = torch.zeros(h.shape[1], 1, dtype=torch.bool, device=h.device)
                is_image[host.tokens] = True
                out = torch.where(is_image, out, 0)
        if self.dma != 0:
            delta: Any = 0.0  # Δh, eq. 2
            for i in range(self.A.shape[0]):
                share = host.per_channel(s[..., i : i + 1])  # (B, 1, 1), (B, L, 1) or (B, 1, 1, 1)
                delta = delta + share * host.up(host.down(x, self.A[i]), self.B)
            out = out + self.dma * delta
        return out

    def plain_route(self, x: Tensor, host: HostLayer) -> Tensor:
        """s = softmax(pool(router(x))): logits at every position first, pooled after. Returns (B, n), or (B, L, n) by token."""
        if self.router_bias is None:
            return x.new_ones(x.shape[0], 1)
        logits = self.router_bias
        if self.router_weight is not None:
            tokens = x.flatten(2).mT if host.shape.is_conv else x  # (B, positions, k)
            logits = tokens @ self.router_weight.mT + self.router_bias  # (B, positions, n)
            if self.router_pool == "mean":
                logits = host.seen(logits).mean(1)
            elif self.router_pool == "sum":
                logits = host.seen(logits).sum(1)
        if self.router_prompt is not None:
            of_prompt = host.prompt_of(x).to(x.dtype) @ self.router_prompt.mT  # (B, n)
            logits = logits + (of_prompt[:, None] if self.by_token else of_prompt)
        return torch.softmax(logits, -1)


def configure(settings: AdapterSettings, special: Mapping[str, Any]) -> AdapterConfig:
    """The config of a new adapter; `special` replaces what the settings say."""
    values = {"r": settings.rank, "n_styles": settings.styles, "router_pool": settings.router_pool, "sta": settings.sta,
              "tokens": settings.tokens, "router_input": settings.router_input}  # fmt: skip
    targets = settings.targets or AdapterConfig.default_targets()
    return AdapterConfig(**{**values, **special}, alpha=settings.alpha or None, target_modules=targets)


def read(parts: dict[str, Tensor], stated: AdapterConfig | None, problem: Problem) -> StyleInjectLayer:
    """A layer from a file's tensors. Their shapes are the truth; a config that contradicts them is an error."""
    for part in ("A", "B"):
        if part not in parts:
            raise problem(f"styleinject_{part} is missing")
    A, B = parts["A"], parts["B"]
    if A.ndim not in (3, 5) or B.ndim != 2 or 0 in A.shape or 0 in B.shape:
        raise problem(f"A has shape {tuple(A.shape)} and B {tuple(B.shape)}, expected (n, r, k[, kh, kw]) and (d, r)")
    n, r, k = A.shape[:3]
    d = B.shape[0]
    expected = {"B": (d, r), "router_weight": (n, k), "router_bias": (n,), "hyper_weight": (d, n), "hyper_bias": (d,)}
    if (prompt := parts.get("router_prompt")) is not None:
        expected["router_prompt"] = (n, prompt.shape[-1] if prompt.ndim and 0 not in prompt.shape else 1)
    for part, shape in expected.items():
        if part in parts and tuple(parts[part].shape) != shape:
            raise problem(
                f"{SUFFIXES[part].removeprefix('.styleinject_')} has shape {tuple(parts[part].shape)}, expected {shape} beside "
                f"A of {tuple(A.shape)}"
            )
    weight = "router_weight" if "router_prompt" not in parts or "router_weight" in parts else "router_prompt"
    for pair in ((weight, "router_bias"), ("hyper_weight", "hyper_bias")):
        if (pair[0] in parts) != (pair[1] in parts):
            raise problem(f"{pair[0]} and {pair[1]} must both be there or both be absent")
    if n > 1 and "router_bias" not in parts:
        raise problem(f"{n} styles but no router")
    reads = ("both" if "router_weight" in parts else "prompt") if "router_prompt" in parts else "layer"
    features = parts["router_prompt"].shape[1] if "router_prompt" in parts else 0
    for field, value in (("router_input", reads), ("prompt_features", features)):
        if stated is not None and stated.has_router and getattr(stated, field) != value:
            raise problem(f"file has a router of {field} {value!r}, config says {getattr(stated, field)!r}")
    for label, found, field in (("rank", r, "r"), ("n_styles", n, "n_styles")):
        if stated is not None and getattr(stated, field) != found:
            raise problem(f"file has {label} {found}, config says {getattr(stated, field)}")
    has_hyper = "hyper_weight" in parts
    if stated is not None and has_hyper != (stated.sta != "none"):
        raise problem(f"file has {'a' if has_hyper else 'no'} hypernetwork, config says sta = {stated.sta!r}")
    kernel = (A.shape[3], A.shape[4]) if A.ndim == 5 else None
    try:
        sta = "multiplicative" if has_hyper else "none"
        config = stated or AdapterConfig(r=r, n_styles=n, sta=sta, router_input=reads, prompt_features=features)
        return StyleInjectLayer(LayerShape(k, d, kernel), config, parts)
    except ValueError as error:
        raise problem(str(error)) from None


def describe(layers: Sequence[StyleInjectLayer]) -> dict[str, str]:
    """Rank and styles, for people."""
    config = layers[0].config
    ranks, styles = (sorted({getattr(layer.config, field) for layer in layers}) for field in ("r", "n_styles"))
    lines = {"rank": f"{_list(ranks)}, alpha {'= rank' if config.alpha is None else config.alpha}"}
    if any(layer.styles for layer in layers):
        reads = (
            f", reads the {'prompt' if config.router_input == 'prompt' else 'layer and the prompt'}"
            if config.reads_prompt
            else ""
        )
        lines["styles"] = f"{_list(styles)}, router pool {config.router_pool}{reads}, STA {config.sta}"
    return lines


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


SUFFIXES = {
    "A": ".styleinject_A",
    "B": ".styleinject_B",
    "router_weight": ".styleinject_router.weight",
    "router_bias": ".styleinject_router.bias",
    "hyper_weight": ".styleinject_hyper.weight",
    "hyper_bias": ".styleinject_hyper.bias",
    "router_prompt": ".styleinject_router.prompt",
}
METHOD = Method(
    name="styleinject",
    title="StyleInject",
    layer=StyleInjectLayer,
    config=AdapterConfig,
    choices={
        "styleinject": {},
        "dma-only": {"sta": "none"},
        "sta-only": {"n_styles": 1, "router_pool": "mean", "router_input": "layer"},
    },
    configure=configure,
    suffixes=SUFFIXES,
    read=read,
    describe=describe,
    paper="https://arxiv.org/abs/2401.13942",
)
