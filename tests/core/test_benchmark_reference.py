"""The benchmark of a step with a reference image, on a tiny U-Net: it runs, and its table has every variant."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")


def test_the_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    bench = importlib.import_module("reference_step")
    monkeypatch.setattr(sys, "argv", ["reference_step.py", "--quick", "--size", "8", "--runs", "1"])
    bench.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 4 and rows[2].startswith("| bare model | 1.000 | 0.0 MiB |")
    style, both, two = (float(row.split("|")[3].split()[0]) for row in rows[3:])
    assert 0 < style <= both and style <= two
