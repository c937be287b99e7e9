"""DEADiff (arXiv 2403.06951): style, or content, from a reference image, by tokens in the cross-attentions of Stable Diffusion 1.x."""

from .config import SD15, STREAMS, DeadiffConfig
from .model import Deadiff
from .rows import LayerRows, Reference
from .tokens import Tokens, TokensError, mix, side_by_side

__all__ = [
    "SD15",
    "STREAMS",
    "Deadiff",
    "DeadiffConfig",
    "LayerRows",
    "Reference",
    "Tokens",
    "TokensError",
    "mix",
    "side_by_side",
]
