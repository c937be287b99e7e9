"""What a training is asked for, by a config file or by a node: one value that both of them build, with one set of defaults."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..adapter import Adapter
from ..config import AdapterConfig, LayerConfig
from ..layers import LayerShape
from ..methods import configure, kronecker
from .settings import TrainSettings, about, check_choice

SIZES = ((32, 16), (16, 8), (16, 4), (8, 4))  # (rank, styles) to choose from by memory; the first are the paper's
DTYPES = ("float32", "bfloat16", "float16")
AUTO = "auto"


# The run's own files, ComfyUI's folder of drawn images, and what Windows lets nobody call a file, whatever its suffix.
_TAKEN = re.compile(r"best|step-\d+|drawn", re.IGNORECASE)
_DEVICES = re.compile(r"con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3]", re.IGNORECASE)
_SUFFIX = ".safetensors"


def check_name(name: str) -> str:
    """A run's name, which becomes a file and, in ComfyUI, a folder; without blanks around it, and without the file's suffix.

    Raises:
        ValueError: no such file or folder can be.
    """
    name = name.strip()
    if name.lower().endswith(_SUFFIX):
        name = name[: -len(_SUFFIX)].strip()
    if not re.fullmatch(r'[^/\\:*?"<>|\x00-\x1f\x7f-\x9f\ud800-\udfff]+', name) or name.startswith(".") or name.endswith("."):
        raise ValueError(f"name: expected the name of a file, without folders, found {name!r}")
    if _TAKEN.fullmatch(name) or _DEVICES.fullmatch(name.partition(".")[0].strip()):
        raise ValueError(f"name: {name!r} is what other files of a run, or of the system, are called: choose another")
    return name


@dataclass(frozen=True)
class AdapterRequest:
    """The adapter's size. The defaults are the paper's for fine-tuning; to distil it adapts convolutions too.

    Raises:
        ValueError: a value out of its range; names it.
    """

    method: str = field(
        default="styleinject",
        metadata=about(
            '"styleinject"; "dma-only" (no AdaIN); "sta-only" (one style); "lora" (one style, no router, no AdaIN);\n'
            '"kronecker" (DiffuseKronA: rank, styles, alpha and all below factors mean nothing to it).'
        ),
    )
    rank: int = field(default=0, metadata=about(f"r; 0: {SIZES[0][0]}, or what fits train.memory."))
    styles: int = field(
        default=0,
        metadata=about(
            f"n, parallel down-projections; 0: {SIZES[0][1]}, or what fits train.memory. Of lora and sta-only always 1."
        ),
    )
    alpha: float = field(default=0.0, metadata=about("the low-rank part is scaled by alpha / rank; 0 means alpha = rank."))
    targets: tuple[str, ...] = field(
        default=(),
        metadata=about(
            'a layer selector, as in ["attention", "conv"]; empty for what the method\'s paper adapts: "default", queries and\n'
            "values of attention, in a U-Net to_q and to_v; for kronecker to_q, to_k, to_v and to_out.0."
        ),
    )
    factors: tuple[int, ...] = field(
        default=kronecker.FACTORS,
        metadata=about(
            "of kronecker: the sizes of A, (a1, a2); fewer numbers the nearer their product is to the root of the layer's."
        ),
    )
    router_pool: str = field(default="mean", metadata=about('"mean", "sum", "token" or "paper".'))
    router_input: str = field(
        default=AUTO,
        metadata=about(
            'what the router reads: "layer", the layer\'s input, as in the paper; "prompt", the prompt, so that "in the\n'
            'style of X" can choose style X; "both"; "auto": "prompt" where images have styles of their own, else "layer".'
        ),
    )
    sta: str = field(default="multiplicative", metadata=about('the AdaIN step: "multiplicative" or "additive".'))
    tokens: str = field(
        default=AdapterConfig.tokens,
        metadata=about(
            "what router and statistics look at where prompt and image are one sequence, as in many transformers:\n"
            '"image", the image\'s tokens (of a clip those of all frames); "frame", each frame of a clip by itself; "all".'
        ),
    )

    def __post_init__(self) -> None:
        config = self.config()  # its own checks
        if not self.targets:
            object.__setattr__(self, "targets", config.target_modules)

    def config(self) -> LayerConfig:
        """The adapter's config."""
        if self.router_input == AUTO:
            return replace(self, router_input=AdapterConfig.router_input).config()
        return configure(self if self.rank and self.styles else self.sized(*SIZES[0]))

    def labeled(self, names: Sequence[str], field: str = "styles") -> AdapterRequest:
        """The same for images that have these styles of their own: a place for each, and a router that reads the prompt.

        Args:
            field: what the user calls the names, for the error.

        Raises:
            ValueError: a method without styles to choose from, or with fewer.
        """
        reads = "prompt" if self.router_input == AUTO else self.router_input
        request = replace(self, styles=self.styles or max(2, len(names)), router_input=reads)
        places = getattr(request.config(), "n_styles", 1)
        if places == 1:
            raise ValueError(f"{field}: an adapter of the method {self.method!r} has no styles to choose from")
        if len(names) > places:
            raise ValueError(f"{field}: {len(names)} names, but the adapter has {places} styles")
        return request

    def sized(self, rank: int, styles: int) -> AdapterRequest:
        """The same, with these in the place of a rank or styles of 0."""
        return replace(self, rank=self.rank or rank, styles=self.styles or styles)


@dataclass(frozen=True)
class Drawing:
    """How a model draws the images that it is then trained on, or shown by.

    Args:
        steps: of sampling.
        guidance: classifier-free guidance.
    """

    steps: int = 20
    guidance: float = 5.0


@dataclass(frozen=True)
class TrainingRequest:
    """A training run, but for its model, data and objective.

    Args:
        name: the adapter's.
        held_out: so many of the images are never trained on, only measured.
        dtype: what adapter files are stored in, one of DTYPES.

    Raises:
        ValueError: another dtype.
    """

    name: str
    adapter: AdapterRequest = field(default_factory=AdapterRequest)
    settings: TrainSettings = field(default_factory=TrainSettings)
    held_out: int = 0
    dtype: str = "float16"

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def new_adapter(self, host: nn.Module | Mapping[str, LayerShape], prompt_features: int = 0) -> Adapter:
        """An untrained adapter, the same for the same seed; the program's own random numbers go on as if there had been none.

        Args:
            prompt_features: the width of the model's text conditioning, for routers that read it; 0: what its layers say.

        Raises:
            SelectorError, UnsupportedLayerError: targets that match nothing, or no layer that can be adapted.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            return Adapter.create(host, self.adapter.config().reading_prompts_of(prompt_features), self.name)

    def split(self, count: int, field: str = "held_out") -> tuple[list[int], list[int]]:
        """Which of `count` images are trained on and which are held out, each in order; the same for the same seed.

        Args:
            field: what the user calls the number of images held out, for the error.

        Raises:
            ValueError: none would be left to train on.
        """
        if self.held_out >= count:
            raise ValueError(f"{field}: {self.held_out} of {count} images leave none to train on")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.settings.seed)).tolist()
        return sorted(order[self.held_out :]), sorted(order[: self.held_out])
