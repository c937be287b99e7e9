"""The words of which the names of layers are made, model by model; `layer_names` reads names by these tables.

Words are diffusers', and ComfyUI's where its modules have other names: `comfy/ldm` has the models, `comfy/utils.py` the tables
from one spelling to the other (`unet_to_diffusers`, `mmdit_to_diffusers`, `flux_to_diffusers`, `z_image_to_diffusers` ...).
A new family of models is a line or two here, and a row in tests/core/test_layer_names.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# --- U-Nets ---

SIDES = {
    "down_blocks": "down",
    "mid_block": "mid",
    "up_blocks": "up",
    "input_blocks": "down",  # LDM's
    "middle_block": "mid",
    "output_blocks": "up",
}
LISTS = ("attentions", "resnets", "motion_modules", "transformer_blocks")  # inside of a U-Net's level, numbered
# Words that labels say in another way; the first that a name has.
ROLES = {"attn1": "self", "attn2": "cross", "ff": "ff", "resnets": "res", "downsamplers": "shrink", "upsamplers": "grow"}
# What runs as one: the parts of its levels. (Stable Cascade's, and LDM's, are numbered only.)
UNET_BLOCK = re.compile(
    r"(down_blocks|up_blocks)\.\d+\.(resnets|attentions|motion_modules|downsamplers|upsamplers)\.\d+"
    r"|mid_block\.(resnets|attentions)\.\d+"
    r"|(down_blocks|up_blocks|input_blocks|output_blocks)\.\d+\.\d+|middle_block\.\d+"
)

# --- Blocks of transformers ---


@dataclass(frozen=True)
class Stack:
    """A list of blocks: which it is, whose tokens go through it, and what a plain "attn" in it is (see `LayerName`)."""

    name: str
    stream: str
    attn: str


_TWO_STREAMS = Stack("block", "image", "joint")  # the prompt's side of them has words of its own: TEXT
_ONE_STREAM = Stack("single", "both", "joint")
STACKS = {
    "transformer_blocks": _TWO_STREAMS,  # of Flux, SD 3, Qwen-Image, and of models with attn1 and attn2
    "joint_transformer_blocks": _TWO_STREAMS,  # AuraFlow
    "joint_blocks": _TWO_STREAMS,  # SD 3 in ComfyUI
    "double_blocks": _TWO_STREAMS,  # Flux, Chroma, HunyuanVideo in ComfyUI
    "double_layers": _TWO_STREAMS,
    "double_stream_blocks": _TWO_STREAMS,  # HiDream
    "double_stream_layers": _TWO_STREAMS,
    "single_transformer_blocks": _ONE_STREAM,
    "single_blocks": _ONE_STREAM,
    "single_layers": _ONE_STREAM,
    "single_stream_blocks": _ONE_STREAM,
    "single_stream_layers": _ONE_STREAM,
    "layers": Stack("block", "both", "joint"),  # Z-Image, Lumina2
    "blocks": Stack("block", "image", "self"),  # Wan, Cosmos, PixArt in ComfyUI
    "visual_transformer_blocks": Stack("block", "image", "self"),  # Kandinsky 5
    "text_transformer_blocks": Stack("refiner", "text", "self"),
    "patch_blocks": _TWO_STREAMS,  # PixelDiT, and then its pixels
    "pixel_blocks": Stack("pixel", "image", "self"),
    "noise_refiner": Stack("refiner", "image", "self"),  # Z-Image, Lumina2
    "context_refiner": Stack("refiner", "text", "self"),
    "ref_image_refiner": Stack("refiner", "reference", "self"),
    "refiner_blocks": Stack("refiner", "text", "self"),  # HunyuanVideo, Krea 2
    "layerwise_blocks": Stack("refiner", "text", "self"),
}
# Modules that hold a model's blocks: HiDream-O1's is a language model.
HOLDERS = {"language_model"}
# Modules whose blocks refine the prompt, in whatever list they are.
TEXT_REFINERS = {"txt_in", "individual_token_refiner", "context_embedder", "token_refiner", "txtfusion", "text_fusion"}

# Module -> what attention it is; "" for what the stack says.
ATTENTIONS = {
    **dict.fromkeys(("attn", "attention", "img_attn", "txt_attn"), ""),
    **dict.fromkeys(("attn1", "self_attn", "self_attention"), "self"),
    **dict.fromkeys(("attn2", "cross_attn", "cross_attention"), "cross"),
}
FEED_FORWARDS = {
    *("ff", "ffn", "mlp", "feed_forward", "img_mlp", "txt_mlp", "ff_context", "ff_i", "ff_t", "mlpX", "mlpC", "mlp_x", "mlp_y"),
    "proj_mlp",
}
# Words of the prompt's side in blocks of two streams; the other side needs none.
TEXT = {
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context", "norm1_context", "norm_added_q", "norm_added_k"),
    *("context_block", "txt_attn", "txt_mlp", "txt_mod"),  # SD 3, Flux in ComfyUI
    *("to_q_t", "to_k_t", "to_v_t", "to_out_t", "ff_t"),  # HiDream
    *("w1q", "w1k", "w1v", "w1o", "mlpC", "modC"),  # AuraFlow
    *("qkv_y", "proj_y", "mlp_y", "mod_y"),  # Mochi, PixelDiT
    *("txt_qkv", "txt"),  # Lens, SeedVR2
}
REFERENCE = {"k_img", "v_img", "add_k_proj", "add_v_proj"}  # of cross-attention to a picture: Wan
# Layers of single-stream blocks that are attention's and feed-forward's at once -> the attention's part.
FUSED = {"linear1": "qkv", "linear2": "out", "to_qkv_mlp_proj": "qkv", "proj_out": "out"}
# The ends of layers of models whose "blocks" have a single stream: Krea 2's, and CogVideoX's with what they belong to.
KREA = {"wq", "wk", "wv", "wo", "gate", "up", "down"}
COGVIDEO = {**dict.fromkeys(("q", "k", "v", "attn_out"), "attention"), **dict.fromkeys(("ff_proj", "ff_out"), "feed-forward")}
STREAMS = {"vid": "image", "txt": "text", "all": "both"}  # SeedVR2's last word: whose tokens a layer is for
PROJECTION = re.compile(
    r"(?:to_|add_|linear_|proj_|img_|txt_|w[12]?|W)?(qkv|kv|q|k|v|query|key|value)(?:_proj|_linear|_img|_[txy])?"
)
OUTPUTS = {
    *("to_out", "to_add_out", "to_out_t", "out", "o", "o_proj", "out_proj", "output_proj", "proj", "proj_x", "proj_y"),
    *("wo", "w1o", "w2o", "out_layer", "linear_out", "attn_out", "proj_out"),
}
NORM = re.compile(r"\w*norm\w*|ln_[qk]")
MODULATION = re.compile(
    r"(^|\.)(adaln\w*|(\w+_)?modulation(_\w+)?|(\w+_)?mod(_[xy])?|mod[CX]+|modF|(\w+_)?norm\w*\.linear\w*)(\.|$)", re.IGNORECASE
)

# --- Outside of blocks: the last module in a name that is one of these says what a layer is ---

TIME = re.compile(
    r"time\w*|t_embedder|t_block|tmlp|tproj|\w*guidance\w*|vector_in|p_embedder|pooled\w*|pooler|y_embedder"
    r"|(add|class)_embedding|label_emb|(resolution|aspect_ratio|csize|ar|extra|c)_embedder"
)
EMBEDDINGS = {  # whose tokens they embed
    **dict.fromkeys(("context_embedder", "txt_in", "cap_embedder", "caption_projection", "caption_embedder"), "text"),
    **dict.fromkeys(("text_embedder", "text_embedding", "text_embeddings", "text_proj", "txtmlp", "y_proj"), "text"),
    "cond_seq_linear": "text",
    **dict.fromkeys(("x_embedder", "all_x_embedder", "img_in", "pos_embed", "patch_embed", "patch_embedding"), "image"),
    **dict.fromkeys(("patchify_proj", "visual_embeddings", "init_x_linear", "first", "conv_in"), "image"),
    **dict.fromkeys(("img_emb", "image_embedder", "ref_image_patch_embedder"), "reference"),
}
OUTPUT = {"proj_out", "final_layer", "all_final_layer", "final_linear", "head", "conv_out", "last"}

# --- Spellings ---

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "unet.", "transformer.")
KOHYA_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")  # names after these have "_" for "."
_WITH_UNDERSCORE = {  # further words with an underscore of their own
    *("proj_in", "conv_shortcut", "conv_norm_out", "time_emb_proj", "linear_1", "linear_2", "linear_3", "linear_in"),
    *("time_embedding", "add_embedding", "class_embedding", "time_embed", "label_emb", "in_layers", "out_layers", "emb_layers"),
    *("skip_connection", "in_layer", "time_in", "guidance_in", "vector_in", "t_embedder", "y_embedder", "to_q", "to_k", "to_v"),
    *(
        "adaLN_modulation",
        "time_text_embed",
        "timestep_embedder",
        "guidance_embedder",
        "norm_out",
        "time_projection",
        "x_block",
    ),
    *("condition_embedder", "time_embedder", "time_proj", "distilled_guidance_layer", "in_proj", "img_mod", "to_qkv", "to_kv"),
}
_WORDS = {
    *(SIDES | STACKS | ATTENTIONS | FUSED | EMBEDDINGS),
    *(TEXT_REFINERS | FEED_FORWARDS | TEXT | REFERENCE | OUTPUTS | OUTPUT | _WITH_UNDERSCORE),
}
_LONGEST_FIRST = sorted({word for word in _WORDS if "_" in word}, key=lambda word: (-len(word), word))
KOHYA_WORD = re.compile("(" + "|".join(_LONGEST_FIRST) + r"|[^_]+)(?:_|$)")
