"""A node pack for test servers: a Z-Image of ComfyUI's own classes with its text encoder and VAE, so small that it trains in
seconds, weights random. It takes the place of the loaders in a template."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TESTS = str(Path(__file__).resolve().parents[2])
CLIP = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2,
        "max_position_embeddings": 77, "hidden_act": "quick_gelu", "eos_token_id": 49407}  # fmt: skip


class SmallZImage:
    """MODEL, CLIP and VAE: ``dit_models.z_image``, a CLIP two layers deep, TAESD with 16 channels."""

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the name is ComfyUI's
        return {"required": {}}

    def load(self) -> tuple[Any, Any, Any]:
        import comfy.sd
        import comfy.sd1_clip
        import comfy.taesd.taesd

        sys.path.append(TESTS)
        try:
            import dit_models
            import tiny_model
        finally:
            sys.path.remove(TESTS)
        target = SimpleNamespace(clip=small_clip, tokenizer=comfy.sd1_clip.SD1Tokenizer, params={})
        clip = comfy.sd.CLIP(target)
        tiny_model.fill(clip.cond_stage_model, 3)
        autoencoder = comfy.taesd.taesd.TAESD(latent_channels=16)
        tiny_model.fill(autoencoder, 5)
        return dit_models.z_image(), clip, comfy.sd.VAE(sd=autoencoder.state_dict())


def small_clip(**options: Any) -> Any:
    """ComfyUI's CLIP model, two narrow layers."""
    import comfy.sd1_clip

    return comfy.sd1_clip.SD1ClipModel(**options, clip_model=comfy.sd1_clip.SDClipModel, textmodel_json_config=CLIP)


NODE_CLASS_MAPPINGS = {"SmallZImage": SmallZImage}
