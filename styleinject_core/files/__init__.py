"""Adapter files and the spellings of module names."""

from .atomic import WriteError
from .errors import AdapterFileError
from .format import save_adapter
from .reader import load_adapter

__all__ = ["AdapterFileError", "WriteError", "load_adapter", "save_adapter"]
