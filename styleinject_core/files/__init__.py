"""Adapter files and the spellings of module names."""

from .format import AdapterFileError, load_adapter, save_adapter

__all__ = ["AdapterFileError", "load_adapter", "save_adapter"]
