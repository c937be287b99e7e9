"""A DEADiff's Q-Formers and projections from BLIP-Diffusion's (arXiv 2305.14720), whose sizes they have: where training begins.

Two spellings: the `qformer` of diffusers' BlipDiffusionPipeline, and LAVIS' `blip_model` and `proj_layer` in one file.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import STREAMS
from .file import SUFFIX, DeadiffFileError
from .model import Deadiff
from .spelling import WORD_IDS, Spelling, stream_keys

SPELLINGS = (
    Spelling("", "query_tokens", "visual_encoder.post_layernorm", "proj_layer", "attention"),
    Spelling("blip.Qformer.bert.", "blip.query_tokens", "blip.ln_vision", "proj_layer"),
    Spelling("Qformer.bert.", "query_tokens", "ln_vision", "proj_layer"),
)


@torch.no_grad()
def start_from_blip_diffusion(deadiff: Deadiff, path: str | Path) -> None:
    """Give both streams the Q-Former and the projection of a BLIP-Diffusion file; i_to_k and i_to_v stay as they are.

    Raises:
        DeadiffFileError: no .safetensors file, one that is no BLIP-Diffusion Q-Former, or tensors of other shapes; `deadiff`
            is as it was.
    """
    path = Path(path)
    if path.suffix != SUFFIX or not path.is_file():
        raise DeadiffFileError(
            f"{path.name}: " + (f"no such file in {path.parent}" if path.suffix == SUFFIX else f"expected a {SUFFIX} file")
        )
    try:
        with safe_open(path, framework="pt") as file:
            present = set(file.keys())
            spelled = [stream_keys(spelling, deadiff.config.depth) for spelling in SPELLINGS]
            keys = max(spelled, key=lambda own: len(present & set(own.values())))
            tables = [next((key for key in present if key.endswith(f"embeddings.{t}_embeddings.weight")), "")
                      for t in ("word", "position")]  # fmt: skip
            missing = [key for key in keys.values() if key not in present]
            if len(missing) == len(keys):
                raise DeadiffFileError(f"{path.name}: not a Q-Former of BLIP-Diffusion, it has none of the {len(keys)} tensors")
            if missing or not all(tables):
                first = missing[0] if missing else "the table of words or of positions"
                raise DeadiffFileError(f"{path.name}: {len(missing) or 1} of {len(keys) + 2} tensors are missing: {first}")
            values = {own: file.get_tensor(key) for own, key in keys.items()}
            words, positions = map(file.get_tensor, tables)
    except (SafetensorError, OSError) as error:
        raise DeadiffFileError(f"{path.name}: damaged, or not a whole safetensors file ({str(error)[:300]})") from None
    loaded = {stream: _state(path, deadiff, stream, values, words, positions) for stream in STREAMS}
    for stream, state in loaded.items():
        deadiff.streams[stream].load_state_dict(state)


def _state(
    path: Path, deadiff: Deadiff, stream: str, values: dict[str, Tensor], words: Tensor, positions: Tensor
) -> dict[str, Tensor]:
    """One stream's state dict: the file's tensors in the stream's shapes, and the rows of its text."""
    wanted = deadiff.streams[stream].state_dict()
    ids = list(WORD_IDS[stream][: deadiff.config.words])
    tables = words.ndim == positions.ndim == 2 and words.shape[1] == positions.shape[1]
    if not tables or len(words) <= max(ids) or len(positions) < len(ids):
        shapes = f"{tuple(words.shape)} and {tuple(positions.shape)}"
        raise DeadiffFileError(f"{path.name}: its tables of words and positions have shapes {shapes}, too small for {stream!r}")
    rows = {**values, "qformer.text": words[ids].float() + positions[: len(ids)].float()}
    for name, like in wanted.items():
        found = rows[name]
        if found.numel() != like.numel() or found.shape[-1:] != like.shape[-1:]:
            raise DeadiffFileError(f"{path.name}: {name} has shape {tuple(found.shape)}, expected {tuple(like.shape)}")
    return {name: rows[name].float().reshape(like.shape) for name, like in wanted.items()}
