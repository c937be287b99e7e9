"""Every transformer that ComfyUI 0.33 draws images or video with, small and with random weights: one table.

Beside `dit_models`, whose models are tested at length. Only for tests that run inside ComfyUI.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import dit_models
import tiny_model
import torch

CONTEXT, WIDTH, CHANNELS = tiny_model.CONTEXT, dit_models.WIDTH, dit_models.CHANNELS
IMAGE, CLIP = (CHANNELS, 8, 8), (CHANNELS, 2, 8, 8)


@dataclass(frozen=True)
class Small:
    """A small model of one of ComfyUI's classes.

    Args:
        config: of its network, as `comfy.model_detection` would read it from a file.
        latent: shape of one, without the batch.
        context: width of its prompt's embeddings.
        extras: what the nodes for this model put into a conditioning beside them: name -> shape, or the value itself.
    """

    config: dict[str, Any]
    latent: tuple[int, ...] = IMAGE
    context: int = CONTEXT
    extras: dict[str, Any] = field(default_factory=dict)

    def prompt(self, seed: int = 0) -> list:
        generator = torch.Generator().manual_seed(seed)
        extras = {name: torch.randn(value, generator=generator) if isinstance(value, tuple) else value
                  for name, value in self.extras.items()}  # fmt: skip
        return [[torch.randn(1, 7, self.context, generator=generator), {"pooled_output": torch.ones(1, WIDTH), **extras}]]


_FLUX = {
    "image_model": "flux", "in_channels": CHANNELS, "out_channels": CHANNELS, "patch_size": 2, "vec_in_dim": WIDTH,
    "context_in_dim": CONTEXT, "hidden_size": WIDTH, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
    "axes_dim": [8, 12, 12], "theta": 10000, "qkv_bias": True, "guidance_embed": False, "txt_ids_dims": [],
}  # fmt: skip
_HUNYUAN = {
    "image_model": "hunyuan_video", "in_channels": CHANNELS, "out_channels": CHANNELS, "patch_size": [1, 2, 2],
    "vec_in_dim": WIDTH, "axes_dim": [8, 12, 12], "context_in_dim": CONTEXT, "hidden_size": WIDTH, "mlp_ratio": 4.0, "num_heads": 2,
    "depth": 2, "depth_single_blocks": 2, "theta": 256, "qkv_bias": True, "byt5": False, "meanflow": False,
    "guidance_embed": True, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip
_COSMOS = {
    "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": CHANNELS, "out_channels": CHANNELS, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": WIDTH, "num_blocks": 2, "num_heads": 2, "crossattn_emb_channels": CONTEXT,
    "concat_padding_mask": True, "pos_emb_cls": "rope3d", "pos_emb_learnable": True, "pos_emb_interpolation": "crop",
    "use_adaln_lora": True, "adaln_lora_dim": 16, "extra_per_block_abs_pos_emb": False, "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0, "rope_t_extrapolation_ratio": 1.0,
}  # fmt: skip
_PREDICT2 = {**_COSMOS, "image_model": "cosmos_predict2", "rope_enable_fps_modulation": False}
_COSMOS1 = {
    **_COSMOS, "image_model": "cosmos", "block_config": "FA-CA-MLP", "block_x_format": "THWBD", "affline_emb_norm": True,
    "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable",
}  # fmt: skip
_LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": CHANNELS, "dim": 256, "cap_feat_dim": CONTEXT, "n_layers": 2,
    "n_refiner_layers": 1, "qk_norm": True, "n_heads": 8, "n_kv_heads": 8, "axes_dims": [8, 12, 12], "axes_lens": [64, 64, 64],
    "multiple_of": 16, "ffn_dim_multiplier": 2.0, "z_image_modulation": True, "pad_tokens_multiple": 32, "time_scale": 1000.0,
}  # fmt: skip
_WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": WIDTH, "ffn_dim": 2 * WIDTH, "num_heads": 2, "num_layers": 2,
    "text_dim": CONTEXT, "freq_dim": WIDTH, "in_dim": CHANNELS, "out_dim": CHANNELS, "patch_size": (1, 2, 2), "text_len": 16,
    "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6, "window_size": (-1, -1),
}  # fmt: skip
_PIXART = {
    "num_heads": 2, "patch_size": 2, "hidden_size": WIDTH, "in_channels": 4, "depth": 2, "model_max_length": 16, "input_size": 64,
    "pe_interpolation": 1, "caption_channels": CONTEXT,
}  # fmt: skip
_HYDIT = {
    "depth": 2, "hidden_size": WIDTH, "num_heads": 2, "text_states_dim": CONTEXT, "text_states_dim_t5": 32,
    "text_len": 7, "text_len_t5": 9,
}  # fmt: skip
_CHROMA = {
    "in_channels": CHANNELS * 4, "out_channels": CHANNELS * 4, "patch_size": 2, "context_in_dim": CONTEXT, "hidden_size": WIDTH,
    "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [8, 12, 12], "theta": 10000,
    "qkv_bias": True, "in_dim": 64, "out_dim": WIDTH, "hidden_dim": WIDTH, "n_layers": 2, "txt_ids_dims": [], "vec_in_dim": None,
}  # fmt: skip
_HYDIT_PROMPT = {"conditioning_mt5xl": (1, 9, 32), "attention_mask": torch.ones(1, 7), "attention_mask_mt5xl": torch.ones(1, 9)}
_KANDINSKY = {
    "image_model": "kandinsky5", "model_dim": WIDTH, "axes_dims": (8, 12, 12), "time_dim": 32, "ff_dim": WIDTH,
    "num_text_blocks": 1, "num_visual_blocks": 2, "in_text_dim": CONTEXT, "in_text_dim2": WIDTH,
}  # fmt: skip
_COGVIDEO = {
    "image_model": "cogvideox", "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": CHANNELS, "out_channels": CHANNELS,
    "time_embed_dim": 32, "text_embed_dim": CONTEXT, "num_layers": 2, "patch_size": 2, "max_text_seq_length": 7,
    "use_rotary_positional_embeddings": True,
}  # fmt: skip
_PIXELDIT = {
    "num_groups": 2, "hidden_size": WIDTH, "pixel_hidden_size": 4, "pixel_attn_hidden_size": WIDTH, "pixel_num_groups": 2,
    "patch_depth": 2, "pixel_depth": 1, "patch_size": 16, "txt_embed_dim": CONTEXT, "txt_max_length": 7,
}  # fmt: skip

# The class in comfy.supported_models -> a small one of it.
MODELS = {
    "AuraFlow": Small({"in_channels": 4, "dim": WIDTH, "n_layers": 3, "n_double_layers": 1, "n_heads": 2, "global_conddim": WIDTH,
                       "cond_seq_dim": CONTEXT, "max_seq": 64}, (4, 8, 8)),
    "PixArtAlpha": Small({**_PIXART, "hidden_size": 96, "image_model": "pixart_alpha", "micro_condition": True}, (4, 64, 64),
                         extras={"width": 512, "height": 512}),
    "PixArtSigma": Small({**_PIXART, "image_model": "pixart_sigma", "micro_condition": False}, (4, 64, 64)),
    "HunyuanDiT": Small({**_HYDIT, "image_model": "hydit"}, (4, 8, 8), extras=_HYDIT_PROMPT),
    "HunyuanDiT1": Small({**_HYDIT, "image_model": "hydit1", "size_cond": True, "use_style_cond": True}, (4, 8, 8),
                         extras=_HYDIT_PROMPT),
    "FluxInpaint": Small({**_FLUX, "in_channels": 96}),
    "FluxSchnell": Small(_FLUX),
    "LongCatImage": Small({**_FLUX, "vec_in_dim": None, "txt_ids_dims": [1, 2]}),
    "Lens": Small({"image_model": "lens", "in_channels": 128, "out_channels": 32, "num_layers": 2, "num_attention_heads": 2,
                   "attention_head_dim": 32, "enc_hidden_dim": CONTEXT // 2, "axes_dims_rope": (8, 12, 12),
                   "multi_layer_encoder_feature": True, "selected_layer_index": (0, 1)}, (128, 4, 4)),
    "LTXAV": Small({"image_model": "ltxav", "in_channels": 128, "audio_in_channels": 128, "cross_attention_dim": WIDTH,
                    "audio_cross_attention_dim": 32, "attention_head_dim": 32, "audio_attention_head_dim": 16,
                    "num_attention_heads": 2, "audio_num_attention_heads": 2, "caption_channels": CONTEXT, "num_layers": 2,
                    "connector_attention_head_dim": 32, "connector_num_attention_heads": 2, "connector_num_layers": 1},
                   (128, 2, 4, 4), 2 * CONTEXT, {"frame_rate": 25}),
    "HunyuanVideo": Small(_HUNYUAN, CLIP),
    "HunyuanVideoI2V": Small({**_HUNYUAN, "in_channels": 33}, CLIP),
    "HunyuanVideoSkyreelsI2V": Small({**_HUNYUAN, "in_channels": 32}, CLIP),
    "HunyuanVideo15": Small({**_HUNYUAN, "in_channels": 65, "out_channels": 32, "vec_in_dim": None, "vision_in_dim": 32,
                             "meanflow_sum": True, "use_cond_type_embedding": True, "byt5": True}, (32, 2, 8, 8),
                            extras={"conditioning_byt5small": (1, 5, 1472)}),
    "HunyuanVideo15_SR_Distilled": Small({**_HUNYUAN, "in_channels": 98, "out_channels": 32, "vec_in_dim": None,
                                          "vision_in_dim": 32, "meanflow": True, "meanflow_sum": True,
                                          "use_cond_type_embedding": True}, (32, 2, 8, 8)),
    "HunyuanImage21": Small({**_HUNYUAN, "in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "axes_dim": [16, 16],
                             "vec_in_dim": None, "byt5": True, "meanflow": True}, (64, 4, 4),
                            extras={"conditioning_byt5small": (1, 5, 1472)}),
    "HunyuanImage21Refiner": Small({**_HUNYUAN, "in_channels": 128, "out_channels": 64, "patch_size": [1, 1, 1],
                                    "vec_in_dim": None}, (64, 1, 4, 4)),
    "CosmosT2V": Small(_COSMOS1, CLIP),
    "CosmosI2V": Small({**_COSMOS1, "in_channels": 17}, CLIP),
    "CosmosI2VPredict2": Small({**_PREDICT2, "in_channels": 17}, CLIP),
    "Anima": Small({**_PREDICT2, "image_model": "anima", "crossattn_emb_channels": 1024}, (CHANNELS, 1, 8, 8), 1024),
    "ZImage": Small(_LUMINA),
    "ZImagePixelSpace": Small({**_LUMINA, "image_model": "zimage_pixel", "in_channels": 3, "patch_size": 16,
                               "decoder_hidden_size": 32, "decoder_num_res_blocks": 1}, (3, 64, 64)),
    "PixelDiTT2I": Small({**_PIXELDIT, "image_model": "pixeldit_t2i"}, (3, 64, 64)),
    "PiD": Small({**_PIXELDIT, "image_model": "pid", "lq_hidden_dim": 32, "lq_num_res_blocks": 1}, (3, 64, 64),
                 extras={"lq_latent": (1, CHANNELS, 2, 2), "degrade_sigma": torch.zeros(1)}),
    "WAN21_CausalAR_T2V": Small(_WAN, CLIP),
    "WAN21_I2V": Small({**_WAN, "model_type": "i2v", "in_dim": 36}, CLIP),
    "WAN21_FunControl2V": Small({**_WAN, "model_type": "i2v", "in_dim": 48}, CLIP),
    "WAN21_Camera": Small({**_WAN, "model_type": "camera", "in_dim": 32}, CLIP),
    "WAN22_Camera": Small({**_WAN, "model_type": "camera_2.2", "in_dim": 36}, CLIP),
    "WAN21_Vace": Small({**_WAN, "model_type": "vace", "vace_layers": 1, "vace_in_dim": 96}, CLIP),
    "WAN21_HuMo": Small({**_WAN, "model_type": "humo", "in_dim": 36, "num_layers": 2}, CLIP),
    "WAN22_S2V": Small({**_WAN, "model_type": "s2v", "audio_dim": 32, "audio_inject_layers": [0]}, CLIP,
                       extras={"audio_embed": (1, 1, 32, 8)}),
    "WAN22_Animate": Small({**_WAN, "model_type": "animate", "in_dim": 36}, CLIP),
    "WAN_Animate2": Small({**_WAN, "model_type": "animate2", "in_dim": 36}, CLIP),
    "WAN22_T2V": Small({**_WAN, "in_dim": 48, "out_dim": 48}, (48, 2, 8, 8)),
    "WAN21_FlowRVS": Small({**_WAN, "model_type": "flow_rvs"}, CLIP),
    "WAN21_SCAIL": Small({**_WAN, "model_type": "scail", "in_dim": 20}, CLIP),
    "WAN21_SCAIL2": Small({**_WAN, "model_type": "scail2", "in_dim": 20}, CLIP),
    "WAN22_WanDancer": Small({**_WAN, "model_type": "wandancer", "in_dim": 36, "audio_inject_layers": [0], "music_dim": 32,
                              "music_heads": 2, "music_latent_dim": 32}, CLIP),
    "HiDream": Small({"image_model": "hidream", "attention_head_dim": 32, "axes_dims_rope": [8, 12, 12],
                      "caption_channels": [CONTEXT, CONTEXT], "max_resolution": [64, 64], "in_channels": CHANNELS,
                      "llama_layers": [0, 1, 1], "num_attention_heads": 2, "num_routed_experts": 2, "num_activated_experts": 1,
                      "num_layers": 1, "num_single_layers": 1, "out_channels": CHANNELS, "patch_size": 2, "text_emb_dim": WIDTH},
                     extras={"conditioning_llama3": (1, 2, 5, CONTEXT)}),
    "ChromaRadiance": Small({**_CHROMA, "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3, "patch_size": 16,
                             "nerf_hidden_size": 16, "nerf_mlp_ratio": 2, "nerf_depth": 1, "nerf_max_freqs": 4,
                             "nerf_tile_size": 512, "nerf_final_head_type": "conv", "nerf_embedder_dtype": torch.float32,
                             "use_x0": False, "use_sequential_txt_ids": False}, (3, 64, 64)),
    "Boogu": Small({"image_model": "boogu", "hidden_size": WIDTH, "num_layers": 2, "num_double_stream_layers": 1,
                    "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16,
                    "axes_dim_rope": (8, 12, 12), "axes_lens": (64, 64, 64), "instruction_feat_dim": CONTEXT},
                   extras={"attention_mask": torch.ones(1, 7, dtype=torch.long)}),
    "Ideogram4": Small({"image_model": "ideogram4", "in_channels": 128, "num_layers": 2, "num_attention_heads": 2,
                        "attention_head_dim": 32, "intermediate_size": WIDTH, "adaln_dim": 16, "llm_features_dim": CONTEXT,
                        "mrope_section": [6, 5, 5]}, (128, 4, 4)),
    "Krea2": Small({"image_model": "krea2", "features": WIDTH, "tdim": 32, "txtdim": 32, "heads": 2, "kvheads": 1, "layers": 2,
                    "patch": 2, "channels": CHANNELS, "txtlayers": 2, "txtheads": 2, "txtkvheads": 2}, context=2 * 32),
    "MageFlow": Small({"image_model": "mage_flow", "in_channels": 128, "num_layers": 2, "attention_head_dim": 32,
                       "num_attention_heads": 2, "joint_attention_dim": CONTEXT, "axes_dims_rope": (8, 12, 12)}, (128, 4, 4)),
    "JoyImage": Small({"image_model": "joyimage", "hidden_size": WIDTH, "num_attention_heads": 2, "text_dim": CONTEXT,
                       "num_layers": 2, "rope_dim_list": [8, 12, 12]}, (CHANNELS, 1, 8, 8)),
    "Kandinsky5": Small({**_KANDINSKY, "visual_embed_dim": 132}, CLIP),
    "Kandinsky5Image": Small({**_KANDINSKY, "visual_embed_dim": 64}),
    "ErnieImage": Small({"image_model": "ernie", "hidden_size": WIDTH, "num_attention_heads": 2, "num_layers": 2,
                         "ffn_hidden_size": WIDTH, "text_in_dim": CONTEXT, "rope_axes_dim": (8, 12, 12)}, (128, 4, 4)),
    "HiDreamO1": Small({"image_model": "hidream_o1",
                        "text_config_overrides": {"vocab_size": 151936, "hidden_size": 64, "intermediate_size": 64,
                                                  "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                                                  "head_dim": 32, "rope_dims": [6, 5, 5]},
                        "vision_config_overrides": {"hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "depth": 1,
                                                    "deepstack_visual_indexes": ()}}, (3, 64, 64),
                       extras={"text_input_ids": torch.arange(7)[None]}),
    "SeedVR2": Small({"image_model": "seedvr2", "vid_dim": WIDTH, "heads": 2, "head_dim": 32, "num_layers": 2, "mm_layers": 1,
                      "norm_eps": 1e-5, "mlp_type": "swiglu", "vid_out_norm": True, "txt_in_dim": CONTEXT, "rope_dim": 32}, CLIP,
                     extras={"condition": (1, 17, 2, 8, 8)}),
    "CogVideoX_T2V": Small(_COGVIDEO, CLIP),
    "CogVideoX_I2V": Small({**_COGVIDEO, "in_channels": 32}, CLIP),
    "CogVideoX_Inpaint": Small({**_COGVIDEO, "in_channels": 48}, CLIP),
}  # fmt: skip

AT_LENGTH = {"Flux", "Flux2", "Chroma", "Lumina2", "QwenImage", "SD3", "WAN21_T2V", "Omnigen2", "GenmoMochi", "LTXV",
             "CosmosT2IPredict2"}  # fmt: skip
U_NETS = {"SD15", "SD15_instructpix2pix", "SD20", "SD21UnclipH", "SD21UnclipL", "SD_X4Upscaler", "LotusD", "SDXL", "SDXLRefiner",
          "SDXL_instructpix2pix", "SSD1B", "KOALA_1B", "KOALA_700M", "Segmind_Vega", "SVD_img2vid", "SV3D_p", "SV3D_u",
          "Stable_Zero123", "Stable_Cascade_B", "Stable_Cascade_C"}  # fmt: skip
UNTESTED = {
    *("StableAudio", "StableAudio3", "ACEStep", "ACEStep15", "MiniMaxMusic3", "MiniMaxH3"),  # sound, and clips with sound
    *("Hunyuan3Dv2", "Hunyuan3Dv2_1", "Hunyuan3Dv2mini", "Trellis2", "TripoSplat"),  # shapes
    *("SAM3", "SAM31", "DepthAnything3", "RT_DETR_v4"),  # these draw nothing
}
