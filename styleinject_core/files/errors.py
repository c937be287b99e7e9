"""The one error of adapter files."""

from __future__ import annotations


class AdapterFileError(ValueError):
    """A file that is no usable adapter, or cannot be written; the message names the file, the tensor and both values."""
