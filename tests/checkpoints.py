"""A small Stable Diffusion 1.5 checkpoint with random weights, for tests that must download nothing.

    python tests/checkpoints.py [FILE]

It is a whole checkpoint: a U-Net of 320 channels with two levels and one residual block per level (44 M
parameters), CLIP-L, and an autoencoder of TAESD's shape; 340 MB in half precision. ComfyUI detects it as SD 1.5.
The names and shapes are written down here, so neither ComfyUI nor a model file is needed; a test of the
server checks that ComfyUI finds none missing.
"""

from __future__ import annotations

import math
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from comfyui import cache_folder
from safetensors.torch import save_file

VERSION = 1  # raise when a name, a shape or a value changes
SEED = 2025
CHANNELS, TIME, CONTEXT = 320, 1280, 768
UNET = "model.diffusion_model."
CLIP = "cond_stage_model.transformer.text_model."
VAE = "first_stage_model."

Shape = tuple[int, ...]


def layer(name: str, weight: Shape, bias: bool = True) -> Iterator[tuple[str, Shape]]:
    """The parameters of a linear, convolution or norm layer."""
    yield f"{name}.weight", weight
    if bias:
        yield f"{name}.bias", weight[:1]


def resblock(name: str, channels_in: int) -> Iterator[tuple[str, Shape]]:
    """A residual block of the U-Net, from ``channels_in`` to CHANNELS."""
    yield from layer(f"{name}.in_layers.0", (channels_in,))
    yield from layer(f"{name}.in_layers.2", (CHANNELS, channels_in, 3, 3))
    yield from layer(f"{name}.emb_layers.1", (CHANNELS, TIME))
    yield from layer(f"{name}.out_layers.0", (CHANNELS,))
    yield from layer(f"{name}.out_layers.3", (CHANNELS, CHANNELS, 3, 3))
    if channels_in != CHANNELS:
        yield from layer(f"{name}.skip_connection", (CHANNELS, channels_in, 1, 1))


def transformer(name: str) -> Iterator[tuple[str, Shape]]:
    """A spatial transformer with one block: self attention, cross attention, gated feed-forward."""
    yield from layer(f"{name}.norm", (CHANNELS,))
    yield from layer(f"{name}.proj_in", (CHANNELS, CHANNELS, 1, 1))
    block = f"{name}.transformer_blocks.0"
    for attention, context in (("attn1", CHANNELS), ("attn2", CONTEXT)):
        yield from layer(f"{block}.{attention}.to_q", (CHANNELS, CHANNELS), bias=False)
        yield from layer(f"{block}.{attention}.to_k", (CHANNELS, context), bias=False)
        yield from layer(f"{block}.{attention}.to_v", (CHANNELS, context), bias=False)
        yield from layer(f"{block}.{attention}.to_out.0", (CHANNELS, CHANNELS))
    yield from layer(f"{block}.ff.net.0.proj", (CHANNELS * 8, CHANNELS))
    yield from layer(f"{block}.ff.net.2", (CHANNELS, CHANNELS * 4))
    for norm in ("norm1", "norm2", "norm3"):
        yield from layer(f"{block}.{norm}", (CHANNELS,))
    yield from layer(f"{name}.proj_out", (CHANNELS, CHANNELS, 1, 1))


def unet() -> Iterator[tuple[str, Shape]]:
    """The U-Net: channel_mult (1, 1), one residual block and one transformer per level."""
    yield from layer("time_embed.0", (TIME, CHANNELS))
    yield from layer("time_embed.2", (TIME, TIME))
    yield from layer("input_blocks.0.0", (CHANNELS, 4, 3, 3))
    for block in (1, 3):
        yield from resblock(f"input_blocks.{block}.0", CHANNELS)
        yield from transformer(f"input_blocks.{block}.1")
    yield from layer("input_blocks.2.0.op", (CHANNELS, CHANNELS, 3, 3))
    yield from resblock("middle_block.0", CHANNELS)
    yield from transformer("middle_block.1")
    yield from resblock("middle_block.2", CHANNELS)
    for block in range(4):
        yield from resblock(f"output_blocks.{block}.0", 2 * CHANNELS)
        yield from transformer(f"output_blocks.{block}.1")
    yield from layer("output_blocks.1.2.conv", (CHANNELS, CHANNELS, 3, 3))
    yield from layer("out.0", (CHANNELS,))
    yield from layer("out.2", (4, CHANNELS, 3, 3))


def clip() -> Iterator[tuple[str, Shape]]:
    """The text encoder CLIP-L."""
    yield "embeddings.token_embedding.weight", (49408, CONTEXT)
    yield "embeddings.position_embedding.weight", (77, CONTEXT)
    for n in range(12):
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from layer(f"encoder.layers.{n}.self_attn.{projection}", (CONTEXT, CONTEXT))
        yield from layer(f"encoder.layers.{n}.mlp.fc1", (4 * CONTEXT, CONTEXT))
        yield from layer(f"encoder.layers.{n}.mlp.fc2", (CONTEXT, 4 * CONTEXT))
        yield from layer(f"encoder.layers.{n}.layer_norm1", (CONTEXT,))
        yield from layer(f"encoder.layers.{n}.layer_norm2", (CONTEXT,))
    yield from layer("final_layer_norm", (CONTEXT,))


def autoencoder() -> Iterator[tuple[str, Shape]]:
    """The autoencoder, of TAESD's shape: blocks of three convolutions, strided or upsampled between."""

    def blocks(name: str, numbers: tuple[int, ...]) -> Iterator[tuple[str, Shape]]:
        for n in numbers:
            for convolution in (0, 2, 4):
                yield from layer(f"{name}.{n}.conv.{convolution}", (64, 64, 3, 3))

    yield from layer("taesd_encoder.0", (64, 3, 3, 3))
    yield from blocks("taesd_encoder", (1, 3, 4, 5, 7, 8, 9, 11, 12, 13))
    for n in (2, 6, 10):
        yield from layer(f"taesd_encoder.{n}", (64, 64, 3, 3), bias=False)
    yield from layer("taesd_encoder.14", (4, 64, 3, 3))
    yield from layer("taesd_decoder.1", (64, 4, 3, 3))
    yield from blocks("taesd_decoder", (3, 4, 5, 8, 9, 10, 13, 14, 15, 18))
    for n in (7, 12, 17):
        yield from layer(f"taesd_decoder.{n}", (64, 64, 3, 3), bias=False)
    yield from layer("taesd_decoder.19", (3, 64, 3, 3))
    yield "vae_scale", ()
    yield "vae_shift", ()


def shapes() -> dict[str, Shape]:
    """Every key of the checkpoint and its shape."""
    parts = ((UNET, unet()), (CLIP, clip()), (VAE, autoencoder()))
    return {prefix + name: shape for prefix, part in parts for name, shape in part}


def random_tensor(name: str, shape: Shape) -> torch.Tensor:
    """The value of one parameter; it depends on its name alone, not on the order of the file."""
    if name.endswith("vae_scale"):
        return torch.ones(shape)
    if name.endswith(("bias", "vae_shift")):
        return torch.zeros(shape)
    if len(shape) == 1:  # a norm's scale
        return torch.ones(shape)
    std = 0.02 if "embeddings" in name else 1 / math.sqrt(math.prod(shape[1:]))
    if name.startswith(VAE):  # behind a ReLU; small on the residual branch, or ten blocks saturate the image
        std *= 0.3 if name.endswith("conv.4.weight") else math.sqrt(2)
    generator = torch.Generator().manual_seed(SEED + zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator) * std


def write_checkpoint(path: Path) -> Path:
    """Write the checkpoint under a temporary name and rename it to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: random_tensor(name, shape).half() for name, shape in shapes().items()}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="checkpoint-") as folder:
        temporary = Path(folder) / path.name
        save_file(tensors, temporary)
        temporary.replace(path)
    return path


def small_checkpoint() -> Path:
    """The small checkpoint in the cache folder, written the first time it is asked for."""
    path = cache_folder() / f"small-sd15-v{VERSION}.safetensors"
    return path if path.is_file() else write_checkpoint(path)


if __name__ == "__main__":
    print(write_checkpoint(Path(sys.argv[1])) if len(sys.argv) > 1 else small_checkpoint())
