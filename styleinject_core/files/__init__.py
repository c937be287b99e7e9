"""Adapter files and the spellings of module names."""

from .atomic import WriteError
from .format import AdapterFileError, load_adapter, save_adapter

__all__ = ["AdapterFileError", "WriteError", "load_adapter", "save_adapter"]
