"""The slim file of a DEADiff: safetensors with the config in the header; without Stable Diffusion, tokenizer and word table.

header      deadiff_version 1; deadiff_config, the JSON of DeadiffConfig; modelspec.*, license, deadiff_source
tensors     style.*, content.*                       vision_norm, qformer, projection of a stream
            <attn2>.i_to_k.weight, .i_to_v.weight    (C, width), <attn2> by its diffusers name
            vision.class_embedding                   (vision width,), tells CLIP models of one size apart
            vision.*                                 optional: the vision encoder, by OpenCLIP's names
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files.atomic import save_tensors
from ..files.errors import AdapterFileError
from ..files.header import is_known_version, parse_json, shortened
from ..files.header import read_header as safetensors_header
from .config import CLIP_L, STREAMS, DeadiffConfig
from .model import Deadiff
from .ops import CASTING, LayerOps
from .vision import VisionTower

FORMAT_VERSION = 1
SUFFIX = ".safetensors"
VISION = "vision."
_CLASS_EMBEDDING = f"{VISION}class_embedding"
_TENSORS_OF_A_BLOCK = 60  # at least, both streams together
CONVERT = "styleinject deadiff convert FILE.ckpt OUT.safetensors"


class DeadiffFileError(ValueError):
    """A file that is no usable DEADiff, or no style card; the message names the file, the tensor and both values."""


@dataclass(frozen=True)
class OpenedFile:
    """What a file's header says, before any tensor is read."""

    path: Path
    config: DeadiffConfig
    metadata: dict[str, str]
    has_vision: bool


def tensor_name(name: str, config: DeadiffConfig) -> str:
    """The name in a file of an entry of `Deadiff.state_dict()`."""
    part, _, rest = name.partition(".")
    if part == "streams":
        return rest
    if part == "to_kv":
        place, _, which = rest.partition(".")
        return f"{config.layers[int(place)][0]}.{which}.weight"
    return f"{VISION}{name}"


def expected_tensors(config: DeadiffConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a file of this config must hold and its shape, in the order of the model."""
    state = Deadiff(config, device="meta").state_dict()
    return {tensor_name(name, config): tuple(value.shape) for name, value in state.items()}


def load_deadiff(path: str | Path, ops: LayerOps = CASTING) -> Deadiff:
    """Read a DEADiff from its slim file, on the CPU, in the dtype it is stored in.

    Args:
        path: ends in .safetensors; its stem becomes the model's name.
        ops: see Deadiff.

    Raises:
        DeadiffFileError: no such file, another kind of file (says which), a newer version, or tensors that are missing, of
            another shape than the config says, or not finite.
    """
    opened = open_file(path)
    names = {tensor_name(name, opened.config): name for name in Deadiff(opened.config, device="meta").state_dict()}
    state = _read_tensors(opened, expected_tensors(opened.config))
    model = Deadiff(opened.config, ops, opened.path.stem, device="meta")
    model.load_state_dict({names[key]: value for key, value in state.items()}, assign=True)
    model.metadata = {key: value for key, value in opened.metadata.items() if key != "deadiff_config"}
    return model.requires_grad_(False).eval()


def load_vision(path: str | Path, ops: LayerOps = CASTING) -> VisionTower | None:
    """The vision encoder inside a slim file, or None where it has none (`convert --with-vision` puts it there).

    Raises:
        DeadiffFileError: see `load_deadiff`.
    """
    opened = open_file(path)
    if not opened.has_vision:
        return None
    shapes = {f"{VISION}{name}": tuple(v.shape) for name, v in VisionTower(device="meta").state_dict().items()}
    state = _read_tensors(opened, shapes)
    tower = VisionTower(ops, device="meta")
    tower.load_state_dict({name.removeprefix(VISION): value for name, value in state.items()}, assign=True)
    return tower.requires_grad_(False).eval()


def save_deadiff(
    model: Deadiff, path: str | Path, metadata: Mapping[str, str] | None = None, dtype: torch.dtype = torch.float16
) -> None:
    """Write a slim file; it appears whole or not at all.

    Raises:
        DeadiffFileError: a wrong suffix, or values that are not finite.
        WriteError: the disk refuses.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise DeadiffFileError(f"{path.name}: expected a name that ends in {SUFFIX}")
    tensors = {tensor_name(k, model.config): v.detach().to("cpu", dtype).contiguous() for k, v in model.state_dict().items()}
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise DeadiffFileError(f"{path.name}: {name} has NaN or Inf values in {dtype}, nothing was written")
    save_tensors(tensors, path, header(model.config, {**model.metadata, **(metadata or {})}, path.stem))


def header(config: DeadiffConfig, metadata: Mapping[str, str], title: str) -> dict[str, str]:
    """The metadata of a slim file."""
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
        "modelspec.architecture": f"{config.base}/deadiff",
        **metadata,
        "format": "pt",
        "deadiff_version": str(FORMAT_VERSION),
        "deadiff_config": json.dumps(config.to_dict()),
    }


def open_file(path: str | Path) -> OpenedFile:
    """Check what kind of file this is and that it has every tensor in its shape; reads the header alone.

    Raises:
        DeadiffFileError: see `load_deadiff`.
    """
    path = Path(path)
    metadata, shapes = read_header(path)
    if "deadiff_config" not in metadata:
        raise DeadiffFileError(f"{path.name}: {_what_else(set(shapes), metadata)}")
    version = metadata.get("deadiff_version", "1")
    if not is_known_version(version, FORMAT_VERSION):
        raise DeadiffFileError(
            f"{path.name}: deadiff_version is {shortened(version)}, this version of the pack reads up to "
            f"{FORMAT_VERSION}: update it"
        )
    try:
        with refused_by_name():
            values = parse_json(path, metadata["deadiff_config"], "deadiff_config")
        if not isinstance(values, dict):
            raise ValueError(f"expected an object, found {type(values).__name__}")
        config = DeadiffConfig.from_dict(values)
    except DeadiffFileError:
        raise
    except ValueError as error:
        raise DeadiffFileError(f"{path.name}: deadiff_config: {str(error)[:500]}") from None
    _check_sizes(path, config, len(shapes))
    expected = expected_tensors(config)
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise DeadiffFileError(
            f"{path.name}: {len(missing)} of {len(expected)} tensors are missing, the first is {missing[0]}: the file was not "
            "converted or copied completely, make it again"
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise DeadiffFileError(f"{path.name}: {name} has shape {shapes[name]}, its config says {shape}")
    has_vision = any(name.startswith(VISION) and name != _CLASS_EMBEDDING for name in shapes)
    return OpenedFile(path, config, metadata, has_vision)


def read_header(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Metadata and tensor shapes of a safetensors file.

    Raises:
        DeadiffFileError: no such file, another suffix, a pickle, or a file that is cut off.
    """
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise DeadiffFileError(
            f"{path.name}: a pickled PyTorch file, which can run code, is not loaded; convert it once: {CONVERT}"
        )
    if path.suffix != SUFFIX:
        raise DeadiffFileError(f"{path.name}: only {SUFFIX} files are read")
    if not path.is_file():
        raise DeadiffFileError(f"{path.name}: no such file in {path.parent}")
    with path.open("rb") as file:
        if file.read(2) in (b"PK", b"\x80\x02"):
            raise DeadiffFileError(f"{path.name}: a pickled PyTorch file, whatever its name says; convert it once: {CONVERT}")
    with refused_by_name():
        found = safetensors_header(path)
    return found.metadata, {key: entry.shape for key, entry in found.entries.items()}


@contextmanager
def refused_by_name() -> Iterator[None]:
    """What the readers of adapters' headers raise, as the error of these files."""
    try:
        yield
    except AdapterFileError as error:
        raise DeadiffFileError(str(error)) from None


def _check_sizes(path: Path, config: DeadiffConfig, tensors: int) -> None:
    """Refuse a config that no file of this size has, before a model is made of it."""
    size = path.stat().st_size
    numbers = {field.name: getattr(config, field.name) for field in fields(config) if field.type == "int"}
    numbers |= {f"width of {shortened(name, 80)}": width for name, width in config.layers}
    name = max(numbers, key=lambda key: numbers[key])
    if numbers[name] > size:
        raise DeadiffFileError(f"{path.name}: deadiff_config: {name} is larger than the file, which has {size} bytes")
    if (needed := config.depth * _TENSORS_OF_A_BLOCK + 2 * len(config.layers)) > tensors:
        raise DeadiffFileError(f"{path.name}: deadiff_config: at least {needed} tensors follow from it, {tensors} are there")


def _read_tensors(opened: OpenedFile, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    state, name = {}, opened.path.name
    try:
        with safe_open(opened.path, framework="pt") as file:
            present = set(file.keys())
            for key, shape in expected.items():
                if key not in present:
                    raise DeadiffFileError(f"{name}: {key} is missing")
                value = file.get_tensor(key).clone()  # a tensor that stays mapped to the file would change with it
                if tuple(value.shape) != shape:
                    raise DeadiffFileError(f"{name}: {key} has shape {tuple(value.shape)}, expected {shape}")
                if not value.is_floating_point() or not torch.isfinite(value).all():
                    raise DeadiffFileError(f"{name}: {key} ({value.dtype}) has NaN or Inf values, or is not a number")
                state[key] = value
    except DeadiffFileError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise DeadiffFileError(f"{name}: a tensor cannot be read: {shortened(str(error))}") from None
    return state


def _what_else(keys: set[str], metadata: Mapping[str, str]) -> str:
    """What a file is that has no DEADiff config."""

    def starts(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in keys)

    if "deadiff_card" in metadata:
        return "a style card: load it with Load Style Card"
    if starts("image_proj.", "ip_adapter."):
        return "an IP-Adapter, not a DEADiff: it belongs into models/ipadapter and another pack's nodes"
    if starts(*(f"{stream}_blip." for stream in STREAMS)):
        return f"the authors' checkpoint, or a part of it, that was not converted: {CONVERT}"
    if any(".styleinject_" in key for key in keys):
        return "a StyleInject adapter, not a DEADiff: load it with Load StyleInject Adapter"
    if starts("model.diffusion_model.", "first_stage_model.", "down_blocks.", "double_blocks."):
        return f"a model checkpoint ({len(keys)} tensors) without DEADiff's weights"
    if starts("vision_model.", "visual."):
        return "a CLIP vision model, not a DEADiff: it belongs into models/clip_vision"
    examples = ", ".join(sorted(keys)[:3]) or "none"
    return f"not a DEADiff: no deadiff_config in its header, {len(keys)} tensors (first: {examples})"


def vision_matches(model: Deadiff, class_embedding: Tensor) -> float:
    """Cosine of a vision encoder's class embedding to the one this model was trained with; above .99 they are the same.

    Args:
        class_embedding: (vision width,) or any shape of that many numbers.

    Raises:
        ValueError: the model's encoder has none, or the sizes differ.
    """
    own = model.class_embedding
    if own is None:
        raise ValueError(f"{model.name} has no class embedding to compare")
    given = class_embedding.detach().float().flatten().cpu()
    if given.shape != own.shape:
        raise ValueError(f"the vision encoder is {given.numel()} wide, {model.name} was trained with one of {own.numel()}")
    return torch.nn.functional.cosine_similarity(given, own.detach().float().cpu(), dim=0).item()


def check_vision(model: Deadiff, class_embedding: Tensor) -> None:
    """Whether this is the vision encoder the model was trained with.

    Raises:
        ValueError: another width (both named), or the same size with other weights.
    """
    cosine = vision_matches(model, class_embedding)
    if not cosine > 0.99:
        title = "OpenAI's CLIP ViT-L/14" if model.config.encoder == CLIP_L else model.config.encoder
        raise ValueError(
            f"this vision encoder has the right size and other weights than {title} (cosine of the class embeddings "
            f"{cosine:.2f}, expected above 0.99): OpenCLIP's ViT-L/14 is a different model; use openai/clip-vit-large-patch14"
        )
