"""Adapter files as people have them, with random numbers: every kind, in every spelling.

    tensors = file_of(layers, "LoKr, both factored", "kohya", seed=3)

A *kind* is what is in a module ("LoRA", "LoHa, Tucker", ...): a function of the layer's weight shape that gives tensors by
part. A *spelling* turns a module's name and a part into a key. Every kind's increment is about as large as `SCALE` times
a weight of deviation 1/sqrt(fan-in), so that no adapter is lost in rounding and none blows a model up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

SCALE = 0.3
Shape = tuple[int, ...]  # of a layer's weight: (d, k) or (d, k, kh, kw)
Parts = dict[str, Tensor]
RANK = 3


class Draw:
    """Random matrices whose products have a known deviation."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator) * std


def _goal(shape: Shape) -> float:
    return SCALE / math.sqrt(math.prod(shape[1:]))


def lora(shape: Shape, draw: Draw, alpha: float | None = None, rank: int = RANK) -> Parts:
    """As kohya has it: a convolution's down matrix has its kernel, its up matrix is a 1x1 convolution."""
    d, k, *kernel = shape
    factor = 1.0 if alpha is None else alpha / rank
    parts = {
        "lora_down": draw(rank, k, *kernel, std=_goal(shape) / factor / math.sqrt(rank)),
        "lora_up": draw(d, rank, *(1 for _ in kernel)),
    }
    return parts if alpha is None else {**parts, "alpha": torch.tensor(alpha)}


def lora_flat(shape: Shape, draw: Draw) -> Parts:
    """Convolutions as matrices, as TrainLoraNode and others write them."""
    parts = lora(shape, draw, alpha=1.0)
    return {part: value.flatten(1) if value.ndim == 4 else value for part, value in parts.items()}


def lora_as_convolution(shape: Shape, draw: Draw) -> Parts:
    """Matrices as 1x1 convolutions."""
    parts = lora(shape, draw)
    return {part: value[:, :, None, None] if value.ndim == 2 else value for part, value in parts.items()}


def lora_mid(shape: Shape, draw: Draw) -> Parts:
    """LoCon with a mid matrix (CP decomposition); for a Linear layer a plain one."""
    if len(shape) == 2:
        return lora(shape, draw, alpha=2.0)
    d, k, *kernel = shape
    return {
        "lora_down": draw(RANK, k, 1, 1),
        "lora_mid": draw(RANK, RANK, *kernel, std=_goal(shape)),
        "lora_up": draw(d, RANK, 1, 1),
        "alpha": torch.tensor(1.0),
    }


def loha(shape: Shape, draw: Draw) -> Parts:
    d, rest = shape[0], math.prod(shape[1:])
    return {
        "hada_w1_a": draw(d, RANK), "hada_w1_b": draw(RANK, rest, std=_goal(shape)),
        "hada_w2_a": draw(d, RANK), "hada_w2_b": draw(RANK, rest), "alpha": torch.tensor(2.0),
    }  # fmt: skip


def loha_tucker(shape: Shape, draw: Draw) -> Parts:
    if len(shape) == 2:
        return loha(shape, draw)
    d, k, *kernel = shape
    parts: Parts = {"alpha": torch.tensor(1.0)}
    for n, std in ((1, _goal(shape) / RANK), (2, 1.0)):
        parts |= {
            f"hada_t{n}": draw(RANK, RANK, *kernel),
            f"hada_w{n}_a": draw(RANK, d),
            f"hada_w{n}_b": draw(RANK, k, std=std),
        }
    return parts


def lokr(shape: Shape, draw: Draw, first: bool = False, second: bool = False, tucker: bool = False) -> Parts:
    """LoKr; `first` and `second` say which of the two factors is a product itself."""
    d, k, *kernel = shape
    a1, a2 = divisor(d), divisor(k)
    b1, b2 = d // a1, k // a2
    parts: Parts = {}
    if first:
        parts |= {"lokr_w1_a": draw(a1, 2), "lokr_w1_b": draw(2, a2)}
    else:
        parts |= {"lokr_w1": draw(a1, a2)}
    if tucker and kernel:
        parts |= {"lokr_t2": draw(2, 2, *kernel), "lokr_w2_a": draw(2, b1), "lokr_w2_b": draw(2, b2, std=_goal(shape))}
    elif second or tucker:
        parts |= {"lokr_w2_a": draw(b1, 2), "lokr_w2_b": draw(2, b2 * math.prod(kernel), std=_goal(shape))}
    else:
        parts |= {"lokr_w2": draw(b1, b2, *kernel, std=_goal(shape))}
    return {**parts, "alpha": torch.tensor(1.0)}


def divisor(n: int) -> int:
    """The largest divisor of n that is at most its root, not 1 where there is another."""
    return max((m for m in range(1, math.isqrt(n) + 1) if n % m == 0), default=1)


def dora(shape: Shape, draw: Draw, axis: int = 0, kind: Callable[..., Parts] = lora) -> Parts:
    """A decomposed kind; the magnitudes stand along the output axis (0) or the input axis (1)."""
    d, k, *kernel = shape
    sizes = [d, 1] if axis == 0 else [1, k]
    norm = math.sqrt(1.0 if axis == 0 else d / math.prod(shape[1:]) * math.prod(kernel))
    return {**kind(shape, draw), "dora_scale": (1 + draw(*sizes, *(1 for _ in kernel), std=0.2)) * norm}


def difference(shape: Shape, draw: Draw) -> Parts:
    return {"diff": draw(*shape, std=_goal(shape))}


def difference_and_bias(shape: Shape, draw: Draw) -> Parts:
    return {**difference(shape, draw), "diff_b": draw(shape[0], std=0.1)}


def lora_and_bias(shape: Shape, draw: Draw) -> Parts:
    """A LoRA and the difference of the bias, as TrainLoraNode and Extract and Save write it."""
    return {**lora_flat(shape, draw), "diff_b": draw(shape[0], std=0.1)}


def multiplied_out(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file of LoKr with Tucker cores, as full factors: ComfyUI's loader trips over the strides of the former and leaves
    the layer as it is ("ERROR lokr ... view size is not compatible")."""
    out = dict(tensors)
    for key in tensors:
        if key.endswith(".lokr_t2"):
            module = key.removesuffix(".lokr_t2")
            core, up, down = (out.pop(f"{module}.{part}") for part in ("lokr_t2", "lokr_w2_a", "lokr_w2_b"))
            scale = float(out.pop(f"{module}.alpha")) / down.shape[0]
            out[f"{module}.lokr_w2"] = torch.einsum("ijkl,jr,ip->prkl", core, down, up).contiguous() * scale
    return out


KINDS: dict[str, Callable[[Shape, Draw], Parts]] = {
    "LoRA": lora,
    "LoRA, alpha": lambda shape, draw: lora(shape, draw, alpha=1.5),
    "LoRA, alphas by layer": lambda shape, draw: lora(shape, draw, alpha=float(1 + math.prod(shape) % 5)),
    "LoRA, ranks by layer": lambda shape, draw: lora(shape, draw, alpha=2.0, rank=1 + math.prod(shape) % 4),
    "LoRA, convolutions as matrices": lora_flat,
    "LoRA, matrices as convolutions": lora_as_convolution,
    "LoRA, mid matrix": lora_mid,
    "LoRA and biases": lora_and_bias,
    "LoHa": loha,
    "LoHa, Tucker": loha_tucker,
    "LoKr": lokr,
    "LoKr, first factored": lambda shape, draw: lokr(shape, draw, first=True),
    "LoKr, second factored": lambda shape, draw: lokr(shape, draw, second=True),
    "LoKr, both factored": lambda shape, draw: lokr(shape, draw, first=True, second=True),
    "LoKr, Tucker": lambda shape, draw: lokr(shape, draw, tucker=True),
    "DoRA, output axis": dora,
    "DoRA, input axis": lambda shape, draw: dora(shape, draw, axis=1),
    "DoRA of LoHa": lambda shape, draw: dora(shape, draw, kind=loha),
    "DoRA of LoKr": lambda shape, draw: dora(shape, draw, kind=lokr),
    "difference": difference,
    "difference and biases": difference_and_bias,
}

# Module names: (diffusers name, LDM name) -> what stands before the part.
SPELLINGS: dict[str, Callable[[str, str], str]] = {
    "kohya": lambda name, ldm: "lora_unet_" + name.replace(".", "_"),
    "kohya, LDM names": lambda name, ldm: "lora_unet_" + ldm.replace(".", "_"),
    "LyCORIS": lambda name, ldm: "lycoris_" + name.replace(".", "_"),
    "ComfyUI": lambda name, ldm: "diffusion_model." + ldm,
    "diffusers": lambda name, ldm: "unet." + name,
    "PEFT": lambda name, ldm: "base_model.model." + name,
    "processors": lambda name, ldm: "unet." + name.replace(".to_", ".processor.to_").removesuffix(".0"),
}
LOADED_BY_COMFYUI = ("kohya", "kohya, LDM names", "LyCORIS", "ComfyUI")

# Part names of LoRA: kohya's -> others'.
LORA_PARTS: dict[str, dict[str, str]] = {
    "kohya": {"lora_down": ".lora_down.weight", "lora_up": ".lora_up.weight", "lora_mid": ".lora_mid.weight"},
    "PEFT": {"lora_down": ".lora_A.weight", "lora_up": ".lora_B.weight"},
    "PEFT, adapter name": {"lora_down": ".lora_A.default.weight", "lora_up": ".lora_B.default.weight"},
    "diffusers, older": {"lora_down": ".lora.down.weight", "lora_up": ".lora.up.weight"},
    "diffusers, oldest": {"lora_down": "_lora.down.weight", "lora_up": "_lora.up.weight"},
    "transformers": {"lora_down": ".lora_linear_layer.down.weight", "lora_up": ".lora_linear_layer.up.weight"},
    "Mochi": {"lora_down": ".lora_A", "lora_up": ".lora_B"},
}


def file_of(
    layers: Mapping[str, tuple[str, Shape]],
    kind: str | Callable[[Shape, Draw], Parts],
    spelling: str = "kohya",
    parts: str = "kohya",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The tensors of a file.

    Args:
        layers: diffusers name -> (LDM name, shape of the weight).
        kind: one of KINDS, or such a function.
        spelling: one of SPELLINGS; parts: one of LORA_PARTS.
        dtype: what the file stores; alphas stay as they are.
    """
    make = KINDS[kind] if isinstance(kind, str) else kind
    draw, tensors = Draw(seed), {}
    for name, (ldm, shape) in layers.items():
        module = SPELLINGS[spelling](name, ldm)
        for part, value in make(shape, draw).items():
            stored = value if part == "alpha" else value.to(dtype)
            tensors[module + LORA_PARTS[parts].get(part, f".{part}")] = stored.contiguous()
    return tensors


def text_encoder_part(
    kind: str = "LoRA", modules: int = 2, width: int = 768, seed: int = 9, number: str = ""
) -> dict[str, Tensor]:
    """A text encoder's part as kohya writes it: CLIP-L's first blocks."""
    draw, tensors = Draw(seed), {}
    for block in range(modules):
        for module in ("self_attn_q_proj", "self_attn_v_proj"):
            key = f"lora_te{number}_text_model_encoder_layers_{block}_{module}"
            for part, value in KINDS[kind]((width, width), draw).items():
                tensors[key + LORA_PARTS["kohya"].get(part, f".{part}")] = value
    return tensors


def unet_layers(model: Any, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, tuple[str, Shape]]:
    """Every Linear and convolution of a MODEL's U-Net: diffusers name -> (LDM name, shape of its weight), sorted."""
    import comfy.utils

    shapes = {key: tuple(value.shape) for key, value in model.model.diffusion_model.state_dict().items()}
    table = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    return {
        name.removesuffix(".weight"): (ldm.removesuffix(".weight"), shapes[ldm])
        for name, ldm in sorted(table.items())
        if name.endswith(".weight") and len(shapes.get(ldm, ())) >= 2 and wanted(name)
    }


def norms(model: Any) -> dict[str, tuple[str, Shape]]:
    """Every norm of a MODEL's U-Net by its LDM name, with (LDM name, shape)."""
    shapes = {key: tuple(value.shape) for key, value in model.model.diffusion_model.state_dict().items()}
    return {
        key.removesuffix(".weight"): (key.removesuffix(".weight"), shape)
        for key, shape in sorted(shapes.items())
        if key.endswith(".weight") and len(shape) == 1
    }
