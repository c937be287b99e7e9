"""The reference image -> pixels -> CLIP ViT-L/14 features, as the authors compute them.

In ComfyUI the vision encoder is a CLIP_VISION; this one is for files that were converted `--with-vision` and for
diffusers. transformers' `CLIPVisionModel` gives the same features as `hidden_states[-2]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ops import CASTING, LayerOps
from .tokens import TokensError

SIZE = 224
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
WIDTH, HEADS, PATCH, BLOCKS = 1024, 16, 14, 23


def check_image(images: Tensor) -> None:
    """Whether this is an image.

    Raises:
        TokensError: not (R, H, W, 3 or more channels), or NaN or Inf values.
    """
    if images.ndim != 4 or images.shape[-1] < 3 or 0 in images.shape:
        raise TokensError(f"the reference image has shape {tuple(images.shape)}, expected (images, height, width, 3)")
    if not torch.isfinite(images[..., :3]).all():
        raise TokensError("the reference image has NaN or Inf values")


def masked_pixels(images: Tensor, mask: Tensor | None, outside: Tensor) -> Tensor:
    """Images with one color wherever a mask is 0.

    Args:
        images: (R, H, W, 3) in [0, 1].
        mask: (R or 1, h, w) in [0, 1]; None leaves the images as they are.
        outside: the color (3,) in [0, 1].

    Returns:
        (R, 3, H, W) in [0, 1], float32 on the CPU.

    Raises:
        TokensError: no image, a mask that is empty or has NaN values, or masks for another number of images.
    """
    check_image(images)
    pixels = images[..., :3].detach().float().cpu().movedim(-1, 1).clamp(0, 1)
    if mask is None:
        return pixels
    mask = mask.detach().float().cpu()
    mask = mask if mask.ndim == 3 else mask.unsqueeze(0)
    if not torch.isfinite(mask).all() or not (mask > 0).any():
        raise TokensError("the reference mask is empty or has NaN values: nothing of the image would be seen")
    if mask.shape[0] not in (1, pixels.shape[0]):
        raise TokensError(f"{mask.shape[0]} masks for {pixels.shape[0]} reference images, expected one or as many")
    inside = F.interpolate(mask.unsqueeze(1), pixels.shape[2:], mode="bilinear", antialias=True).clamp(0, 1)
    return torch.lerp(outside.view(3, 1, 1).expand_as(pixels), pixels, inside.expand_as(pixels))


def squash(images: Tensor, mask: Tensor | None = None, size: int = SIZE) -> Tensor:
    """Images in the size of the encoder: squashed, not cropped, by Pillow's antialiased bicubic filter in 8 bits.

    Args:
        images: (R, H, W, 3) in [0, 1].
        mask: (R or 1, h, w) in [0, 1]; what is outside of it becomes the mean color, which CLIP sees as nothing.

    Returns:
        (R, size, size, 3) in [0, 1].

    Raises:
        TokensError: see `masked_pixels`.
    """
    levels = (masked_pixels(images, mask, torch.tensor(MEAN)) * 255).round().to(torch.uint8)
    if levels.shape[2:] != (size, size):
        levels = F.interpolate(levels, (size, size), mode="bicubic", antialias=True)
    return (levels.float() / 255).movedim(1, -1)


def normalized(images: Tensor) -> Tensor:
    """(R, H, W, 3) in [0, 1] -> (R, 3, H, W) with CLIP's mean and standard deviation."""
    return (images.movedim(-1, 1) - images.new_tensor(MEAN).view(3, 1, 1)) / images.new_tensor(STD).view(3, 1, 1)


class _Attention(nn.Module):
    def __init__(self, ops: LayerOps, **factory: Any):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * WIDTH, WIDTH, **factory))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * WIDTH, **factory))
        self.out_proj = ops.linear(WIDTH, WIDTH, **factory)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight.to(x), self.in_proj_bias.to(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in qkv)  # (R, heads, N, 64)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, ops: LayerOps, **factory: Any):
        super().__init__()
        self.c_fc = ops.linear(WIDTH, 4 * WIDTH, **factory)
        self.c_proj = ops.linear(4 * WIDTH, WIDTH, **factory)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.c_fc(x)
        return self.c_proj(hidden * torch.sigmoid(1.702 * hidden))  # QuickGELU


class _Block(nn.Module):
    def __init__(self, ops: LayerOps, **factory: Any):
        super().__init__()
        self.ln_1, self.attn = ops.layer_norm(WIDTH, **factory), _Attention(ops, **factory)
        self.ln_2, self.mlp = ops.layer_norm(WIDTH, **factory), _Mlp(ops, **factory)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisionTower(nn.Module):
    """CLIP ViT-L/14 without its last block, post-norm and pooling; names as OpenCLIP and LAVIS have them.

    pixels (R, 3, 224, 224), `normalized` -> (R, 257, 1024), the class token first.
    """

    def __init__(self, ops: LayerOps = CASTING, **factory: Any):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(WIDTH, **factory))
        self.positional_embedding = nn.Parameter(torch.empty((SIZE // PATCH) ** 2 + 1, WIDTH, **factory))
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False, **factory)
        self.ln_pre = ops.layer_norm(WIDTH, **factory)
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*(_Block(ops, **factory) for _ in range(BLOCKS)))})

    def forward(self, pixels: Tensor) -> Tensor:
        patches = F.conv2d(pixels, self.conv1.weight.to(pixels), stride=PATCH).flatten(2).transpose(1, 2)  # (R, 256, 1024)
        first = self.class_embedding.to(patches).expand(patches.shape[0], 1, -1)
        x = self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding.to(patches))
        return self.transformer["resblocks"](x)

    @torch.no_grad()
    def features(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """(R, H, W, 3) in [0, 1] of any size -> (R, 257, 1024), float32."""
        return self(normalized(squash(images, mask)).to(self.class_embedding.device))
