"""DEADiffs with random weights for tests: a narrow one for the tiny MODEL, and a checkpoint with the real one's keys.

The checkpoint's keys and shapes are written down here after the authors' file, not taken from the converter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

# The cross-attentions of tests/tiny_model.py's U-Net (32 and 64 channels, a context of 64) by their diffusers names.
TINY_LAYERS = (
    ("down_blocks.0.attentions.0.transformer_blocks.0.attn2", 32),
    ("down_blocks.1.attentions.0.transformer_blocks.0.attn2", 64),
    ("mid_block.attentions.0.transformer_blocks.0.attn2", 64),
    ("up_blocks.0.attentions.0.transformer_blocks.0.attn2", 64),
    ("up_blocks.0.attentions.1.transformer_blocks.0.attn2", 64),
    ("up_blocks.1.attentions.0.transformer_blocks.0.attn2", 32),
    ("up_blocks.1.attentions.1.transformer_blocks.0.attn2", 32),
)


def tiny_config(core: Any, **fields: Any) -> Any:
    """A config for the tiny MODEL; `core` is the package styleinject_core.deadiff to take it from."""
    values = {
        "width": 24, "depth": 2, "heads": 4, "feed_forward": 48, "queries": 4, "context": 64, "layers": TINY_LAYERS,
        "content_layers": (1, 2), **fields,
    }  # fmt: skip
    return replace(core.SD15, **values)


def random_model(core: Any, config: Any, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Any:
    """A Deadiff whose every parameter is random, norms too, so that a part left out cannot go unnoticed."""
    model = core.Deadiff(config, name=f"random{seed}")
    randomize(model, seed)
    with torch.no_grad():
        for weights in model.to_kv:
            for part in ("i_to_k", "i_to_v"):
                weights[part].mul_(scale)
    return model.to(dtype).requires_grad_(False).eval()


@torch.no_grad()
def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights N(0, 1/fan_in), norms' scales 1 + N(0, 0.1), everything else N(0, 0.1)."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in sorted(module.state_dict().items()):
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            value.copy_(noise / value[0].numel() ** 0.5)
        else:
            value.copy_(0.1 * noise + (1 if "norm" in name and name.endswith("weight") else 0))
    return module


def checkpoint_shapes(vision: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every key of deadiff_v1.ckpt that a converter may need, with its shape, and a few it must leave out."""
    for stream in ("style", "content"):
        blip = f"{stream}_blip"
        yield f"{blip}.query_tokens", (1, 16, 768)
        yield from _pair(f"{blip}.ln_vision", 1024)
        if vision:
            yield from _vision(f"{blip}.visual_encoder")
        else:
            yield f"{blip}.visual_encoder.class_embedding", (1024,)
        yield f"{blip}.Qformer.bert.embeddings.word_embeddings.weight", (30523, 768)
        yield f"{blip}.Qformer.bert.embeddings.position_embeddings.weight", (512, 768)
        yield from _pair(f"{blip}.Qformer.bert.embeddings.LayerNorm", 768)
        for n in range(12):
            layer = f"{blip}.Qformer.bert.encoder.layer.{n}"
            for kind, source in (("attention", 768), ("crossattention", 1024)):
                yield from _pair(f"{layer}.{kind}.self.query", 768, 768)
                yield from _pair(f"{layer}.{kind}.self.key", 768, source)
                yield from _pair(f"{layer}.{kind}.self.value", 768, source)
                yield from _pair(f"{layer}.{kind}.output.dense", 768, 768)
                yield from _pair(f"{layer}.{kind}.output.LayerNorm", 768)
            for rise, fall in (("intermediate", "output"), ("intermediate_query", "output_query")):
                yield from _pair(f"{layer}.{rise}.dense", 3072, 768)
                yield from _pair(f"{layer}.{fall}.dense", 768, 3072)
                yield from _pair(f"{layer}.{fall}.LayerNorm", 768)
        yield from _pair(f"{blip}.Qformer.cls.predictions.transform.dense", 768, 768)  # unused
        yield f"{blip}.temp", ()
        yield from _pair(f"{stream}_proj_layer.dense1", 3072, 768)
        yield from _pair(f"{stream}_proj_layer.dense2", 768, 3072)
        yield from _pair(f"{stream}_proj_layer.LayerNorm", 768)
    blocks = {"input_blocks": (1, 2, 4, 5, 7, 8), "middle_block": (1,), "output_blocks": range(3, 12)}
    widths = {
        "input_blocks": {1: 320, 2: 320, 4: 640, 5: 640},
        "output_blocks": dict.fromkeys(range(6, 9), 640) | dict.fromkeys(range(9, 12), 320),
    }
    for side, places in blocks.items():
        for n in places:
            width = widths.get(side, {}).get(n, 1280)
            block = f"{side}.{n}" if side == "middle_block" else f"{side}.{n}.1"
            attention = f"model.diffusion_model.{block}.transformer_blocks.0.attn2"
            yield f"{attention}.i_to_k.weight", (width, 768)
            yield f"{attention}.i_to_v.weight", (width, 768)
            yield f"{attention}.to_q.weight", (width, 1)  # Stable Diffusion's own, left out
    yield "betas", (1000,)


def _pair(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _vision(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.class_embedding", (1024,)
    yield f"{name}.positional_embedding", (257, 1024)
    yield f"{name}.conv1.weight", (1024, 3, 14, 14)
    yield from _pair(f"{name}.ln_pre", 1024)
    for n in range(23):
        block = f"{name}.transformer.resblocks.{n}"
        yield f"{block}.attn.in_proj_weight", (3072, 1024)
        yield f"{block}.attn.in_proj_bias", (3072,)
        yield from _pair(f"{block}.attn.out_proj", 1024, 1024)
        yield from _pair(f"{block}.ln_1", 1024)
        yield from _pair(f"{block}.ln_2", 1024)
        yield from _pair(f"{block}.mlp.c_fc", 4096, 1024)
        yield from _pair(f"{block}.mlp.c_proj", 1024, 4096)


def write_checkpoint(path: Path, vision: bool = False) -> dict[str, torch.Tensor]:
    """A checkpoint as Lightning writes it, float16, the streams' vision encoders one and the same. Returns its tensors."""
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).half() * 0.02
    state: dict[str, torch.Tensor] = {}
    for k, (name, shape) in enumerate(checkpoint_shapes(vision)):
        twin = name.replace("content_blip.visual_encoder", "style_blip.visual_encoder")
        size = torch.Size(shape).numel()
        first = 7919 * k % 4096  # a different stretch of the noise for each tensor
        state[name] = state[twin] if twin != name else block[first : first + 1024].repeat(size // 1024 + 1)[:size].view(shape)
    for name, value in state.items():  # ln_vision keeps its pretrained value in both streams
        if name.startswith("content_blip.ln_vision"):
            state[name] = state[name.replace("content", "style")]
        elif name.endswith("word_embeddings.weight"):
            value += torch.linspace(0, 1, len(value)).half().unsqueeze(1)  # each row its own
    torch.save({"state_dict": state, "global_step": 1}, path)
    return state
