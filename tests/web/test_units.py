"""Runs the unit tests of web/js, where Node.js is there to run them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.skipif(shutil.which("node") is None, reason="tests/web: Node.js is not installed")
def test_the_units_of_the_live_view() -> None:
    tests = sorted(map(str, FOLDER.glob("*.test.js")))
    done = subprocess.run(["node", "--test", *tests], capture_output=True, text=True, timeout=120, cwd=FOLDER.parent.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(tests) >= 4
