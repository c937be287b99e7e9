"""The command line as its user meets it: a process of its own for the entry, main() for the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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
        (["init", "--base", "sd15", "--rank", "0", "OUT"], "--rank, --styles: expected 1 or more, found 0 and 16"),
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


def authors_file(path, d=20, k=12, a1=4, a2=3):
    """As DiffuseKronA's released program saves it: down (a2, a1), up (b1, b2)."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for part in ("to_q_lora", "to_out_lora"):
        stem = f"unet.down_blocks.0.attn1.processor.{part}"
        tensors[f"{stem}.down.weight"] = torch.randn(a2, a1, generator=generator)
        tensors[f"{stem}.up.weight"] = torch.randn(d // a1, k // a2, generator=generator)
    save_file(tensors, path)
    return load_adapter(path)


def test_convert_a_file_of_the_authors_program(tmp_path, capsys):
    """Kept for this pack, refused as LoKr, and as whole differences the same change for every program."""
    source, same, whole = (tmp_path / name for name in ("a.safetensors", "same.safetensors", "whole.safetensors"))
    adapter = authors_file(source)
    assert main(["convert", str(source), str(same)]) == 0
    assert "2 layers" in (out := capsys.readouterr().out) and "only this pack reads it" in out
    assert main(["convert", "--as", "lokr", str(source), str(tmp_path / "no.safetensors")]) == 1
    assert "which a LoKr file cannot say" in capsys.readouterr().err and not (tmp_path / "no.safetensors").exists()
    assert main(["convert", "--as", "difference", str(source), str(whole)]) == 0
    assert "other programs read it too" in capsys.readouterr().out
    for path in (same, whole):
        loaded = load_adapter(path)
        for name, layer in adapter.layers.items():
            torch.testing.assert_close(loaded.layers[name].delta(), layer.delta(), rtol=1e-6, atol=1e-6)
    keys = load_file(whole).keys()
    assert all(key.endswith(".diff") for key in keys)
    assert main(["convert", str(source), str(same)]) == 1
    assert "exists" in capsys.readouterr().err


def test_convert_refuses_what_the_form_cannot_hold(tmp_path, capsys):
    path = tmp_path / "s.safetensors"
    assert main(["init", "--base", "sd15", "--rank", "2", "--styles", "2", "--targets", "mid & to_q", str(path)]) == 0
    capsys.readouterr()
    for form, problem in (("difference", "depends on the image"), ("lokr", "is StyleInject, not a Kronecker product")):
        assert main(["convert", "--as", form, str(path), str(tmp_path / "out.safetensors")]) == 1
        assert problem in capsys.readouterr().err
        assert not (tmp_path / "out.safetensors").exists()
    assert main(["convert", str(path), str(tmp_path / "again.safetensors")]) == 0
    assert load_adapter(tmp_path / "again.safetensors").config == load_adapter(path).config
