"""The command line as its user meets it: a process of its own for the entry, main() for the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from styleinject_core import load_adapter
from styleinject_core.cli import main

ROOT = Path(__file__).parents[2]


def test_init_and_info(tmp_path, capsys):
    path = tmp_path / "new.safetensors"
    arguments = ["init", "--base", "sd15", "--rank", "4", "--styles", "2", "--targets", "mid & to_q,mid & to_v", str(path)]
    assert main(arguments) == 0
    assert "4 layers of Stable Diffusion 1.x" in capsys.readouterr().out
    assert load_adapter(path).config.r == 4
    assert main(["info", str(path)]) == 0
    text = capsys.readouterr().out
    assert "StyleInject for Stable Diffusion 1.x" in text
    assert "stable-diffusion-v1/styleinject" in text
    assert main(["info", "--json", str(path)]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["parameters"] == load_adapter(path).parameter_count()
    assert summary["targets"] == {"to_q": 2, "to_v": 2}

    before = path.read_bytes()
    assert main(arguments) == 1
    assert "exists: choose another name, or --force" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert main([*arguments, "--force", "--seed", "1"]) == 0
    assert path.read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["init", "--base", "sd15", "--targets", "to_x", "OUT"], "'to_x' matches none of the 282 layers"),
        (["init", "--base", "sd15", "--rank", "0", "OUT"], "r: expected an integer of at least 1, found 0"),
        (["init", "--base", "sd15", "OUT.pt"], "expected a name that ends in .safetensors"),
        (["info", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["demo", "--style", "oil", "--out", "OUT"], "--style 'oil': expected one of twemoji, noto"),
        (["demo", "--no-train", "--steps", "5", "--out", "OUT"], "--steps has no meaning with --no-train"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = ["OUT.safetensors" if a == "OUT" and arguments[0] == "init" else a for a in arguments]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_core_imports_no_optional_package():
    """`info` must work where only torch and safetensors are: in ComfyUI's own Python."""
    code = (
        "import sys, styleinject_core, styleinject_core.cli; "
        "print([m for m in ('diffusers', 'matplotlib', 'sklearn', 'peft', 'transformers', 'comfy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
