"""What pre-commit holds is held here too: ruff's rules and its layout, of the tests as well, and mypy."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKS = {"rules": ["ruff", "check", "."], "layout": ["ruff", "format", "--check", "."], "types": ["mypy"]}


@pytest.mark.parametrize("check", CHECKS)
def test_the_python_is_clean(check, skip_loudly):
    tool, *arguments = CHECKS[check]
    if importlib.util.find_spec(tool) is None:
        skip_loudly(f'{tool} is not installed: pip install -e ".[test]"')
    done = subprocess.run([sys.executable, "-m", tool, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_types_of_what_knows_comfyui(tmp_path, skip_loudly):
    """As a package with a name, so that its imports from above are found; of ComfyUI itself nothing is known here."""
    if importlib.util.find_spec("mypy") is None:
        skip_loudly('mypy is not installed: pip install -e ".[test]"')
    try:
        (tmp_path / "pack").symlink_to(ROOT, target_is_directory=True)
    except OSError as error:
        skip_loudly(f"integration/ and nodes/ were not type-checked, no link could be made: {error}")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--follow-imports", "silent"]
    command += ["-p", "pack.integration", "-p", "pack.nodes"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("tool", ["ruff", "mypy"])
def test_pre_commit_and_the_tests_run_the_same_version(tool):
    project = re.findall(rf'"{tool}==([^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    hooks = re.findall(rf"{tool}\S*\n    rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert len(project) == len(hooks) == 1 and project == hooks
