"""What holds for every module of tests/core."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def import_path_is_left_as_it_was() -> Iterator[None]:
    """The repository has a folder ``nodes``: first on the path it would hide ComfyUI's nodes.py from tests/nodes."""
    before = sys.path.copy()
    yield
    assert sys.path == before, "a test left sys.path changed"
