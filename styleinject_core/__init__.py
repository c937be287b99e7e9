"""StyleInject (arXiv 2401.13942) for PyTorch: adapters that change style without bending what the prompt means.

from styleinject_core import attach, load_adapter
with attach(unet, load_adapter("style.safetensors"), strength=0.8):
    ...
"""

from .adapter import Adapter
from .attach import AdapterMismatchError, Applied, Attachment, MatchReport, attach
from .config import AdapterConfig
from .files import AdapterFileError, load_adapter, save_adapter
from .layers import LayerShape, UnsupportedLayerError
from .selector import SelectorError

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterFileError",
    "AdapterMismatchError",
    "Applied",
    "Attachment",
    "LayerShape",
    "MatchReport",
    "SelectorError",
    "UnsupportedLayerError",
    "attach",
    "load_adapter",
    "save_adapter",
]
__version__ = "0.1.0"
