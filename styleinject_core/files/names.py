"""Module names: every spelling a file may use, turned into the diffusers one that adapters keep.

    diffusers     down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q     (also after "unet.")
    PEFT          base_model.model.down_blocks.0. ...
    LDM, ComfyUI  [model.]diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q
    kohya         lora_unet_down_blocks_0_attentions_0_... or lora_unet_input_blocks_1_1_...

Names of other architectures (DiTs) pass through with the prefix taken off; in kohya's spelling, as they are.
"""

from __future__ import annotations

import re

from ..layer_names import dotted
from ..layer_vocabulary import PREFIXES

_KOHYA_PREFIX = "lora_unet_"
_OTHER_PARTS = ("lora_te", "text_encoder", "text_model", "conditioner.", "cond_stage_model.", "first_stage_model.")

_UNET_ROOTS = (  # how a U-Net's names begin in kohya's spelling
    *("down_blocks_", "up_blocks_", "mid_block_", "conv_in", "conv_out"),
    *("time_embedding_", "add_embedding_", "class_embedding_"),
    *("input_blocks_", "middle_block_", "output_blocks_", "out_2", "time_embed_", "label_emb_"),
)
_RESNET_PARTS = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "emb_layers.1": "time_emb_proj",
}
_TOP = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}


def is_other_model_part(name: str) -> bool:
    """Whether a name in a file belongs to a text encoder or VAE rather than to the diffusion model."""
    return name.startswith(_OTHER_PARTS)


def diffusers_name(name: str, layers_per_block: int = 2) -> str:
    """The diffusers spelling of a module name in any spelling; unknown names come back with their prefix taken off.

    Args:
        layers_per_block: residual blocks per U-Net level, which LDM names are numbered by (2 in every Stable Diffusion).
    """
    if name.startswith(_KOHYA_PREFIX):
        own = name[len(_KOHYA_PREFIX) :]
        if not own.startswith(_UNET_ROOTS):
            return name  # a DiT, whose names only its program can tell: ComfyUI's table has them in this spelling
        name = dotted(own)
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return _from_ldm(name, layers_per_block)


def lora_name(name: str) -> str:
    """A diffusers name as LoRA files spell it: "lora_unet_down_blocks_0_..." in a U-Net, else "transformer.<name>"."""
    kohya = _KOHYA_PREFIX + name.replace(".", "_")
    return kohya if diffusers_name(kohya) == name else f"transformer.{name}"


def _from_ldm(name: str, layers_per_block: int) -> str:
    if name in _TOP:
        return _TOP[name]
    if match := re.fullmatch(r"middle_block\.([012])\.(.+)", name):
        kind, index = ("attentions", 0) if match[1] == "1" else ("resnets", int(match[1]) // 2)
        return f"mid_block.{kind}.{index}.{_block_part(match[2])}"
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)", name)
    if not match:
        return name
    side, block, position, rest = match[1], int(match[2]), int(match[3]), match[4]
    if side == "input":
        level, index = divmod(block - 1, layers_per_block + 1)
        if index == layers_per_block:
            return f"down_blocks.{level}.downsamplers.0.conv"  # input_blocks.N.0.op
        block_name = f"down_blocks.{level}"
    else:
        level, index = divmod(block, layers_per_block + 1)
        block_name = f"up_blocks.{level}"
        if rest == "conv":
            return f"{block_name}.upsamplers.0.conv"
    kind = "resnets" if position == 0 else "attentions"
    return f"{block_name}.{kind}.{index}.{_block_part(rest)}"


def _block_part(rest: str) -> str:
    return _RESNET_PARTS.get(rest, rest)
