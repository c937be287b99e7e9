"""Module names: every spelling a file may use, turned into the diffusers one that adapters keep.

    diffusers     down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q     (also after "unet.")
    PEFT          base_model.model.down_blocks.0. ...
    LDM, ComfyUI  [model.]diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q
    kohya         lora_unet_down_blocks_0_attentions_0_... or lora_unet_input_blocks_1_1_...

Names of other architectures (DiTs) pass through with the prefix taken off; in kohya's spelling, as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..layer_names import dotted
from ..layer_vocabulary import PREFIXES

_KOHYA_PREFIX = "lora_unet_"
_LYCORIS_PREFIX = "lycoris_"
_TEXT_ENCODER, _VAE, _EMBEDDING = "a text encoder", "a VAE", "an embedding"
_OTHER_PARTS = {
    **dict.fromkeys(("text_encoder", "text_model", "conditioner.", "cond_stage_model."), _TEXT_ENCODER),
    **dict.fromkeys(("lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_te4_", "lora_prior_te_"), _TEXT_ENCODER),
    **dict.fromkeys(("lycoris_te_", "lycoris_te1_", "lycoris_te2_", "lycoris_text_encoder"), _TEXT_ENCODER),
    **dict.fromkeys(("clip_l.", "clip_g.", "clip_h.", "t5xxl.", "te1.", "te2."), _TEXT_ENCODER),
    **dict.fromkeys(("base_model.model.text_model.", "base_model.model.text_encoder"), _TEXT_ENCODER),
    **dict.fromkeys(("first_stage_model.", "vae.", "lora_vae_"), _VAE),
    "bundle_emb.": _EMBEDDING,
}

_UNET_ROOTS = (  # how a U-Net's names begin in kohya's spelling
    *("down_blocks_", "up_blocks_", "mid_block_", "conv_in", "conv_out"),
    *("time_embedding_", "add_embedding_", "class_embedding_"),
    *("input_blocks_", "middle_block_", "output_blocks_", "out_2", "time_embed_", "label_emb_"),
)
_OTHER_PREFIXES = tuple(_OTHER_PARTS)
_LDM_BLOCK = re.compile(r"(?:^|[._])(input|output)_blocks[._](\d{1,4})[._]\d{1,2}[._](\w+)")

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
    """Whether a name in a file belongs to a text encoder, a VAE or an embedding rather than to the diffusion model."""
    return bool(other_model_part(name))


def other_model_part(name: str) -> str:
    """Which other model a name in a file belongs to ("a text encoder"); empty for the diffusion model."""
    if not name.startswith(_OTHER_PREFIXES):
        return ""
    return next(title for prefix, title in _OTHER_PARTS.items() if name.startswith(prefix))


def layer_name(key: str, layers_per_block: int = 2) -> str:
    """The diffusers name of a module as a LoRA file has it, without what only files say: `.processor.`, a bare to_out."""
    name = key.replace(".processor.", ".")
    if name != key and name.endswith(".to_out"):  # attention processors name the output projection without its index
        name += ".0"
    return diffusers_name(name, layers_per_block)


def layers_per_block(keys: Iterable[str]) -> int:
    """How many residual blocks a U-Net's level has, as far as LDM names in a file tell: 2 unless they contradict it.

    Down- and upsamplers are what tells: they stand where a level ends.
    """
    found = []
    for key in keys:
        if match := _LDM_BLOCK.search(key):
            found.append((match[1] == "input", int(match[2]), match[3]))
    for count in (2, 1, 3):
        if all(_is_place(is_input, block, rest, count) for is_input, block, rest in found):
            return count
    return 2


def _is_place(is_input: bool, block: int, rest: str, count: int) -> bool:
    """Whether LDM's numbers can be so in a U-Net with that many residual blocks a level."""
    index = (block - 1 if is_input else block) % (count + 1)
    if is_input:
        return block == 0 or (index == count) == (rest == "op")
    return rest != "conv" or index == count


def diffusers_name(name: str, layers_per_block: int = 2) -> str:
    """The diffusers spelling of a module name in any spelling; unknown names come back with their prefix taken off.

    Args:
        layers_per_block: residual blocks per U-Net level, which LDM names are numbered by (2 in every Stable Diffusion).
    """
    if name.startswith(("lora_unet__", "lora_unet_", "lycoris_")):
        own = name.removeprefix(_LYCORIS_PREFIX).removeprefix(_KOHYA_PREFIX).removeprefix("_")
        if not own.startswith(_UNET_ROOTS):
            return name  # a DiT, whose names only its program can tell: ComfyUI's table has them in this spelling
        name = dotted(own)
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return _from_ldm(name, layers_per_block)


def lora_name(name: str) -> str:
    """A diffusers name as LoRA files spell it: "lora_unet_down_blocks_0_..." in a U-Net, else "transformer.<name>"."""
    if name.startswith((_KOHYA_PREFIX, _LYCORIS_PREFIX, "lora_transformer_")):  # a DiT's, as a file has it
        return name
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
        if rest == "op":
            return f"down_blocks.{level}.downsamplers.0.conv"
        if index == layers_per_block:
            return name  # a family that is numbered otherwise
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
