"""The authors' deadiff_v1.ckpt (7.43 GB: a Lightning pickle with a whole Stable Diffusion 1.5) -> a slim file of 0.76 GB.

The one place of this pack that opens a pickle: tensors only (`weights_only`), mapped and not read, and never tried again
without. Tensors are copied one at a time, so that it takes no more memory than the largest of them beside the map.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..files.atomic import replacing
from ..files.names import diffusers_name
from .config import SD15, STREAMS
from .file import SUFFIX, VISION, DeadiffFileError, expected_tensors, header
from .spelling import WORD_IDS, Spelling, stream_keys
from .vision import VisionTower

LICENSE = "Weights by the authors of DEADiff (ByteDance), for research and non-commercial use (openrail, see their model card)"
_UNET = "model.diffusion_model."


@dataclass(frozen=True)
class Converted:
    """What was written.

    Args:
        tensors, parameters: counts, the vision encoder's among them.
        size: bytes of the file.
        unused: tensors of the checkpoint that were left out.
        notes: what a careful reader should know.
    """

    tensors: int
    parameters: int
    size: int
    unused: int
    notes: tuple[str, ...]


def convert(source: str | Path, target: str | Path, with_vision: bool = False, force: bool = False) -> Converted:
    """Write the slim file of a checkpoint; it appears whole or not at all.

    Args:
        source: deadiff_v1.ckpt, or the same as .safetensors.
        target: ends in .safetensors.
        with_vision: take the vision encoder along, 0.58 GB more.
        force: replace an existing target.

    Raises:
        DeadiffFileError: a source that is missing, holds more than tensors, is no DEADiff, or lacks tensors or has them in
            other shapes; a target that exists.
        WriteError: the disk refuses.
    """
    source, target = Path(source), Path(target)
    if target.suffix != SUFFIX:
        raise DeadiffFileError(f"{target.name}: expected a name that ends in {SUFFIX}")
    if target.exists() and not force:
        raise DeadiffFileError(f"{target} exists: choose another name, or --force to replace it")
    state = open_checkpoint(source)
    keys = source_keys(with_vision)
    _check(source, state, keys, with_vision)
    notes = _check_streams(source, state, with_vision)
    shapes = _output_shapes(with_vision)
    metadata = {
        "license": LICENSE,
        "deadiff_source": f"{source.name}, {source.stat().st_size} bytes",
        "deadiff_parameters": str(sum(_size(shape) for shape in shapes.values())),
        "modelspec.author": "Tianhao Qi et al. (DEADiff, arXiv 2403.06951)",
    }

    def value(name: str) -> Tensor:
        found = state[keys[name]] if name in keys else _text(state, name.split(".")[0])
        half = found.detach().reshape(shapes[name]).to(torch.float16)
        if not torch.isfinite(half).all():
            raise DeadiffFileError(
                f"{source.name}: {keys.get(name, name)} has values that float16 cannot hold, nothing was written"
            )
        return half.contiguous()

    stream_save(target, shapes, value, header(SD15, metadata, target.stem))
    used = {*keys.values(), *(key for stream in STREAMS for key in _table_keys(stream))}
    parameters = sum(_size(shape) for shape in shapes.values())
    return Converted(len(shapes), parameters, target.stat().st_size, len(set(state) - used), tuple(notes))


def open_checkpoint(path: Path) -> Mapping[str, Any]:
    """The state dict of a checkpoint, mapped to its file.

    Raises:
        DeadiffFileError: no such file, one that PyTorch cannot read as tensors alone, or one without a state dict.
    """
    if not path.is_file():
        raise DeadiffFileError(f"{path.name}: no such file in {path.parent}")
    if path.suffix == SUFFIX:
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise DeadiffFileError(f"{path.name}: damaged, or not a whole safetensors file ({str(error)[:300]})") from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of a damaged file PyTorch raises anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DeadiffFileError(
            f"{path.name}: could not be read as a file of tensors alone, and is not read in any other way, which could run "
            f"code in it. Incomplete download? PyTorch says: {reason[0][:300]}"
        ) from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(state, Mapping):
        raise DeadiffFileError(f"{path.name}: holds a {type(loaded).__name__}, expected a checkpoint with a state_dict")
    return state


def source_keys(with_vision: bool = False) -> dict[str, str]:
    """Name in the slim file -> key of the checkpoint, for every tensor that is taken as it is."""
    keys: dict[str, str] = {}
    for stream in STREAMS:
        blip = f"{stream}_blip"
        spelling = Spelling(f"{blip}.Qformer.bert.", f"{blip}.query_tokens", f"{blip}.ln_vision", f"{stream}_proj_layer")
        keys |= {f"{stream}.{own}": key for own, key in stream_keys(spelling, SD15.depth).items()}
    for attention in unet_attentions():
        for part in ("i_to_k", "i_to_v"):
            keys[f"{diffusers_name(attention)}.{part}.weight"] = f"{_UNET}{attention}.{part}.weight"
    vision = VisionTower(device="meta").state_dict() if with_vision else ("class_embedding",)
    keys |= {f"{VISION}{name}": f"style_blip.visual_encoder.{name}" for name in vision}
    return keys


def unet_attentions() -> tuple[str, ...]:
    """The 16 cross-attentions by their LDM names, in forward order."""
    places = (
        [f"input_blocks.{n}.1" for n in (1, 2, 4, 5, 7, 8)]
        + ["middle_block.1"]
        + [f"output_blocks.{n}.1" for n in range(3, 12)]
    )
    return tuple(f"{place}.transformer_blocks.0.attn2" for place in places)


def _output_shapes(with_vision: bool) -> dict[str, tuple[int, ...]]:
    shapes = expected_tensors(SD15)
    if with_vision:
        shapes |= {f"{VISION}{name}": tuple(v.shape) for name, v in VisionTower(device="meta").state_dict().items()}
    return shapes


def _table_keys(stream: str) -> tuple[str, str]:
    prefix = f"{stream}_blip.Qformer.bert.embeddings"
    return f"{prefix}.word_embeddings.weight", f"{prefix}.position_embeddings.weight"


def _text(state: Mapping[str, Tensor], stream: str) -> Tensor:
    """The rows of the stream's text, word + position, (3, 768): constant, so the tables stay behind."""
    words, positions = (state[key] for key in _table_keys(stream))
    return words[list(WORD_IDS[stream])].float() + positions[: len(WORD_IDS[stream])].float()


def _check(source: Path, state: Mapping[str, Any], keys: Mapping[str, str], with_vision: bool) -> None:
    """Every key that is needed is there, a tensor, and in its shape."""
    shapes = _output_shapes(with_vision)
    wanted = {keys[name]: shapes[name] for name in keys}
    missing = [key for key in (*wanted, *(k for s in STREAMS for k in _table_keys(s))) if key not in state]
    if len(missing) == len(wanted) + 2 * len(STREAMS):
        raise DeadiffFileError(f"{source.name}: not a DEADiff checkpoint, none of the {len(missing)} tensors it needs is there")
    if missing:
        raise DeadiffFileError(
            f"{source.name}: {len(missing)} of {len(wanted) + 2 * len(STREAMS)} tensors are missing, the first is {missing[0]}"
        )
    for key, shape in wanted.items():
        value = state[key]
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if found not in (shape, (1, *shape)):  # query_tokens have a dimension more
            raise DeadiffFileError(f"{source.name}: {key} has shape {found}, expected {shape}")
    for stream in STREAMS:
        words, positions = (tuple(state[key].shape) for key in _table_keys(stream))
        if words[0] <= max(WORD_IDS[stream]) or words[1:] != (SD15.width,) or positions[0] < SD15.words:
            raise DeadiffFileError(f"{source.name}: the word table of {stream}_blip has shape {words}, positions {positions}")


def _check_streams(source: Path, state: Mapping[str, Tensor], with_vision: bool) -> list[str]:
    """What both streams should share: the frozen vision encoder and its norm."""
    notes = []
    names = list(VisionTower(device="meta").state_dict()) if with_vision else ["class_embedding"]
    for name in names:
        style, content = (state.get(f"{stream}_blip.visual_encoder.{name}") for stream in STREAMS)
        if content is not None and style is not None and not torch.equal(style, content):
            raise DeadiffFileError(
                f"{source.name}: the two streams have different vision encoders ({name}), expected one and the same"
            )
    for part in ("weight", "bias"):
        if not torch.equal(*(state[f"{stream}_blip.ln_vision.{part}"] for stream in STREAMS)):
            notes.append(f"ln_vision.{part} differs between the streams; each keeps its own")
    return notes


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def stream_save(
    path: Path, shapes: Mapping[str, tuple[int, ...]], value: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a float16 safetensors file tensor by tensor, under another name until it is whole.

    Args:
        value: gives the tensor of a name, float16 and contiguous; called in the order of `shapes`.

    Raises:
        WriteError: the disk refuses; nothing is left behind.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, shape in shapes.items():
        table[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset := offset + 2 * _size(shape)]}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in shapes:
            file.write(memoryview(value(name).view(torch.uint8).numpy().reshape(-1)))  # type: ignore[arg-type]
