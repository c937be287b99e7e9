"""The rows of the tables: what is trained on top of the base model, or instead of it."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from styleinject_core import Adapter, AdapterConfig
from styleinject_core.config import LayerConfig
from styleinject_core.demo.training import DemoTrainingModel
from styleinject_core.hosts.architectures import ARCHITECTURES
from styleinject_core.methods.kronecker import KroneckerConfig

PROJECTIONS = KroneckerConfig.default_targets()
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


@dataclass(frozen=True)
class Method:
    """A row.

    Args:
        n: styles; 0 trains no adapter.
        sta: with the AdaIN step; n = 1 without it is a LoRA.
        equal: its rank is raised until it has as many parameters as this row.
        factors: of a DiffuseKronA adapter.
        four: adapts all four attention projections, as DiffuseKronA's paper does; a LoRA then has half the rank.
        root: the increment is scaled by alpha / sqrt(r) with alpha = r (rsLoRA, arXiv 2312.03732), not by alpha / r = 1.
        wide: A starts with values so many times as large.
        plain_values: to_v of cross-attention has a plain LoRA of the same rank, as one sentence of the paper can be read.
        rate: the learning rate, one of RATES, from which the best is looked for; 0 trains nothing.
        pool: how its router sees an image.
        reads: what its router reads.
        given: s is the style's own label; for tasks of several styles.
        taught: it is in training alone, and the router, which learns from it, chooses in drawing.
    """

    label: str
    n: int = 0
    sta: bool = False
    equal: str = ""
    rate: float = 1e-2
    factors: tuple[int, int] | None = None
    four: bool = False
    root: bool = False
    wide: float = 1.0
    plain_values: bool = False
    pool: str = "mean"
    given: bool = False
    taught: bool = False
    reads: str = "layer"

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained, rather than the U-Net or nothing."""
        return bool(self.n or self.factors)


METHODS = {
    "base": Method("base model", rate=0.0),
    "full": Method("U-Net tune", rate=3e-4),
    "lora": Method("LoRA, rank r", 1),
    "lora_equal": Method("LoRA, parameters of n = 16", 1, equal="n16"),
    "lora_small": Method("LoRA, parameters of n = 4", 1, equal="n4"),
    "lora_root": Method("LoRA, parameters of n = 16, alpha / sqrt(r)", 1, equal="n16", root=True),
    "lora_wide": Method("LoRA, parameters of n = 16, A starts 4 times as large", 1, equal="n16", wide=4.0),
    "dma": Method("DMA only, n = 16", 16),
    "n1": Method("STA only (StyleInject, n = 1)", 1, sta=True),
    "n4": Method("StyleInject, n = 4", 4, sta=True),
    "n16": Method("StyleInject, n = 16", 16, sta=True),
    "n16_plain_values": Method("StyleInject, n = 16, cross-attention's to_v as LoRA", 16, sta=True, plain_values=True),
    "n16_paper": Method("StyleInject, n = 16, routed by token", 16, sta=True, pool="paper"),
    "n4_prompt": Method("StyleInject, n = 4, the router reads the prompt", 4, sta=True, reads="prompt"),
    "n4_given": Method("StyleInject, n = 4, s given by the style", 4, sta=True, given=True),
    "n4_taught": Method("StyleInject, n = 4, taught the styles by label", 4, sta=True, taught=True),
    "n4_prompt_taught": Method(
        "StyleInject, n = 4, the router reads the prompt, taught by label", 4, sta=True, reads="prompt", taught=True
    ),
    "n16_paper_taught": Method(
        "StyleInject, n = 16, routed by token, taught by label", 16, sta=True, pool="paper", taught=True
    ),
    "krona": Method("DiffuseKronA, factors 4, 3", factors=(4, 3)),
    "krona_small": Method("DiffuseKronA, factors 8, 2", factors=(8, 2)),
    "lora_four": Method("LoRA, rank r / 2, four projections", 1, four=True),
    "krona_four": Method("DiffuseKronA, factors 8, 3, four projections", factors=(8, 3), four=True),
}


class TunedModel(DemoTrainingModel):
    """The model with a U-Net of its own, every parameter of which is trained; there is nothing to attach."""

    def attachment(self, adapter: Any) -> AbstractContextManager[None]:
        return nullcontext()


def trainee(key: str, base: DemoTrainingModel, rank: int, targets: tuple[str, ...], seed: int) -> tuple[DemoTrainingModel, Any]:
    """A row before training.

    Args:
        rank: of StyleInject and of the plain LoRA.
        targets: the layers that are adapted.

    Returns:
        (the model to train and to sample with, the module whose parameters are trained: an Adapter or a U-Net).
    """
    if METHODS[key].adapts:
        torch.manual_seed(seed)
        adapter = Adapter.create(ARCHITECTURES["demo"].shapes(), config(key, rank, targets), key)
        if METHODS[key].wide != 1:
            for layer in adapter.layers.values():
                layer.A.data.mul_(METHODS[key].wide)
        return base, adapter
    unet = copy.deepcopy(base.denoiser).requires_grad_(key == "full")
    return TunedModel(unet, base.text_encoder, base.autoencoder, base.name), unet


def config(key: str, rank: int, targets: tuple[str, ...]) -> LayerConfig:
    """The adapter of a row."""
    method = METHODS[key]
    if method.four:
        rank, targets = rank // 2, PROJECTIONS
    if method.factors:
        return KroneckerConfig(method.factors, target_modules=targets)
    if method.equal:
        rank = _equal_rank(method.equal, rank, targets)
    sta = "multiplicative" if method.sta else "none"
    fields = {"router_pool": method.pool, "router_input": method.reads, "sta": sta, "target_modules": targets}
    if method.root:
        fields["alpha"] = rank * math.sqrt(rank)  # of which alpha / r is what alpha / sqrt(r) is with alpha = r
    if method.plain_values:
        values = [name for name in ARCHITECTURES["demo"].shapes() if name.endswith("attn2.to_v")]
        fields["layers"] = {name: {"n_styles": 1, "sta": "none"} for name in values}
    return AdapterConfig(r=rank, n_styles=method.n, **fields)  # type: ignore[arg-type]


@cache
def _equal_rank(row: str, rank: int, targets: tuple[str, ...]) -> int:
    """The rank at which a LoRA is as large as a row; a LoRA's size is proportional to its rank."""
    return round(_size(config(row, rank, targets)) / _size(config("lora", 1, targets)))


def _size(adapter: LayerConfig) -> int:
    with torch.device("meta"):
        return Adapter.create(ARCHITECTURES["demo"].shapes(), adapter).parameter_count()


def trained_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
