"""Checks web/js, where Node.js is there: its unit tests, and, where npm can get them, the linter and the type checker."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
TOOLS = {"lint": "eslint", "types": "tsc"}  # scripts of package.json, and what they run


@pytest.fixture(scope="module")
def npm(skip_loudly) -> str:
    """npm, with what package.json asks for installed."""
    program = shutil.which("npm")
    if program is None:
        skip_loudly("web/js is not linted, npm is not installed")
    if not all((ROOT / "node_modules" / ".bin" / tool).exists() for tool in TOOLS.values()):
        install = [program, "install", "--no-package-lock", "--no-audit", "--no-fund"]
        try:
            subprocess.run(install, cwd=ROOT, capture_output=True, check=True, timeout=120)
        except (subprocess.SubprocessError, OSError) as error:
            skip_loudly(f"web/js is not linted, npm could not install eslint and typescript: {error}")
    return program


def test_the_units(skip_loudly) -> None:
    node = shutil.which("node")
    if node is None:
        skip_loudly("the unit tests of web/js did not run, Node.js is not installed")
    tests = sorted(map(str, FOLDER.glob("*.test.js")))
    done = subprocess.run([node, "--test", *tests], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(tests) >= 4


@pytest.mark.parametrize("script", TOOLS)
def test_the_javascript_is_clean(npm, script) -> None:
    done = subprocess.run([npm, "run", "--silent", script], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
