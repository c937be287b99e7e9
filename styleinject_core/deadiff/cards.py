"""Style cards: tokens as a file, 25 KB a stream, applied with neither the reference nor vision model nor Q-Former.

header      deadiff_card 1; deadiff_labels (JSON); deadiff_reference, the SHA-256 of the reference's pixels;
            deadiff_thumbnail, a JPEG in base64; deadiff_style_id, deadiff_content_id
tensors     style.tokens, content.tokens      (R, S, width) float16; one of them or both
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files.atomic import save_tensors
from ..files.header import is_known_version, parse_json, shortened
from .config import STREAMS
from .file import SUFFIX, DeadiffFileError, read_header, refused_by_name
from .tokens import Tokens, TokensError

CARD_VERSION = 1
THUMBNAIL = 128  # pixels of its longer side
_MAX_TOKENS = 4096


@dataclass(frozen=True)
class StyleCard:
    """Tokens with where they come from.

    Args:
        tokens: of one stream or of both, by stream.
        thumbnail: a JPEG of the reference, or empty.
        reference: SHA-256 of the reference's pixels, or empty.
        metadata: the rest of the header.
    """

    tokens: dict[str, Tokens]
    thumbnail: bytes = b""
    reference: str = ""
    metadata: dict[str, str] = field(default_factory=dict)


def card_of(tokens: Sequence[Tokens], image: Tensor | None = None) -> StyleCard:
    """A card of tokens, one set a stream, and of the reference image (R, H, W, 3) in [0, 1]; the first one is shown.

    Raises:
        TokensError: no tokens, or two sets for one stream.
    """
    by_stream = {t.stream: t for t in tokens}
    if not tokens or len(by_stream) != len(tokens):
        raise TokensError(
            f"a style card holds one set of tokens a stream, found {', '.join(t.stream for t in tokens) or 'none'}"
        )
    if image is None:
        return StyleCard(by_stream)
    levels = (image[..., :3].detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
    return StyleCard(by_stream, _jpeg(levels[0]), hashlib.sha256(levels.numpy().tobytes()).hexdigest())


def save_card(card: StyleCard, path: str | Path) -> None:
    """Write a card; it appears whole or not at all. Raises DeadiffFileError, WriteError."""
    path = Path(path)
    if path.suffix != SUFFIX:
        raise DeadiffFileError(f"{path.name}: expected a name that ends in {SUFFIX}")
    tensors = {f"{stream}.tokens": t.values.half().contiguous() for stream, t in card.tokens.items()}
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise DeadiffFileError(f"{path.name}: {name} has values that float16 cannot hold, nothing was written")
    save_tensors(tensors, path, {
        "modelspec.title": path.stem,
        **card.metadata,
        "format": "pt",
        "deadiff_card": str(CARD_VERSION),
        "deadiff_labels": json.dumps({stream: list(t.labels) for stream, t in card.tokens.items()}),
        "deadiff_reference": card.reference,
        "deadiff_thumbnail": base64.b64encode(card.thumbnail).decode(),
        **{f"deadiff_{stream}_id": t.model_id for stream, t in card.tokens.items()},
    })  # fmt: skip


def load_card(path: str | Path) -> StyleCard:
    """Read a style card.

    Raises:
        DeadiffFileError: no such file, no style card (says what to do), a newer version, or tokens of a wrong shape or with
            values that are not finite.
    """
    path = Path(path)
    metadata, shapes = read_header(path)
    if "deadiff_card" not in metadata:
        other = "a DEADiff itself: load it with Load DEADiff" if "deadiff_config" in metadata else "not a style card"
        raise DeadiffFileError(f"{path.name}: {other}")
    version = metadata["deadiff_card"]
    if not is_known_version(version, CARD_VERSION):
        raise DeadiffFileError(
            f"{path.name}: deadiff_card is {shortened(version)}, this version of the pack reads up to {CARD_VERSION}: update it"
        )
    present = [stream for stream in STREAMS if f"{stream}.tokens" in shapes]
    if not present:
        raise DeadiffFileError(f"{path.name}: neither style.tokens nor content.tokens is in this style card")
    try:
        with refused_by_name():
            labels = parse_json(path, metadata.get("deadiff_labels", "{}"), "deadiff_labels")
        thumbnail = base64.b64decode(metadata.get("deadiff_thumbnail", ""))
        with safe_open(path, framework="pt") as file:
            tokens = {
                stream: Tokens(
                    _sized(path, file.get_tensor(f"{stream}.tokens")), stream, metadata.get(f"deadiff_{stream}_id", ""),
                    tuple(map(str, labels.get(stream, ()))),
                )
                for stream in present
            }  # fmt: skip
    except DeadiffFileError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError, AttributeError, TypeError) as error:
        raise DeadiffFileError(f"{path.name}: {shortened(str(error))}") from None
    rest = {key: value for key, value in metadata.items() if key != "format" and not key.startswith("deadiff_")}
    return StyleCard(tokens, thumbnail, metadata.get("deadiff_reference", ""), rest)


def picture(card: StyleCard) -> Tensor | None:
    """The thumbnail as (1, H, W, 3) in [0, 1], or None where the card has none that can be read."""
    if not card.thumbnail:
        return None
    import numpy as np
    from PIL import Image

    try:
        with Image.open(io.BytesIO(card.thumbnail), formats=["JPEG"]) as image:
            if max(image.size) > 4 * THUMBNAIL:
                return None
            return torch.from_numpy(np.array(image.convert("RGB"))).float().div(255).unsqueeze(0)
    except (OSError, ValueError):
        return None


def _sized(path: Path, values: Tensor) -> Tensor:
    if values.ndim != 3 or not 0 < values.shape[0] * values.shape[1] <= _MAX_TOKENS:
        raise DeadiffFileError(f"{path.name}: tokens have shape {tuple(values.shape)}, expected (images, tokens, width)")
    return values.float().clone()


def _jpeg(levels: Tensor) -> bytes:
    from PIL import Image

    image = Image.fromarray(levels.numpy())
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
