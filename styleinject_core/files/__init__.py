"""Adapter files and the spellings of module names."""

from .errors import AdapterFileError
from .format import save_adapter
from .reader import load_adapter

__all__ = ["AdapterFileError", "load_adapter", "save_adapter"]
