"""DEADiff (arXiv 2403.06951): style, or content, from a reference image, for Stable Diffusion 1.x."""

from .cards import StyleCard, card_of, load_card, save_card
from .config import SD15, STREAMS, DeadiffConfig
from .file import DeadiffFileError, load_deadiff, load_vision, save_deadiff
from .inject import ReferenceAttachment, ReferenceMismatchError, referenced
from .model import Deadiff
from .rows import LayerRows, Reference
from .tokens import Tokens, TokensError, mix, side_by_side

__all__ = [
    "SD15",
    "STREAMS",
    "Deadiff",
    "DeadiffConfig",
    "DeadiffFileError",
    "LayerRows",
    "Reference",
    "ReferenceAttachment",
    "ReferenceMismatchError",
    "StyleCard",
    "Tokens",
    "TokensError",
    "card_of",
    "load_card",
    "load_deadiff",
    "load_vision",
    "mix",
    "referenced",
    "save_card",
    "save_deadiff",
    "side_by_side",
]
