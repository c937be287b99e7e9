"""One spelling in all texts of the repository: American."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BRITISH = re.compile(
    r"colour|favour|honour|behaviour|neighbour|centre|centring|labelled|labelling|modelled|modelling|cancelled|grey|licence"
    r"|catalogue|artefact|judgement|(recogn|optim|normal|quant|initial|organ|summar|serial|special|general|minim|maxim|visual"
    r"|token|synchron|local|stabil|equal|parametr|penal|material|vector|random|custom|util|categor|memor|capital)is(e|i[nv]|a)",
    re.IGNORECASE,
)
TEXTS = {".py", ".md", ".js", ".toml", ".yml", ".json"}
# What others have written, or wrote down: data, pictures' names, and this file.
OTHERS = ("styleinject_core/demo/assets/emoji/", "benchmarks/emoji/results", "examples/", "tests/core/test_spelling.py")


def test_all_texts_have_american_spelling():
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"this is no Git checkout: {error}")
    found = []
    for name in listed.splitlines():
        path = ROOT / name
        if path.suffix in TEXTS and path.is_file() and not name.startswith(OTHERS):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                found += [f"{name}:{number}: {match[0]}" for match in BRITISH.finditer(line)]
    assert not found, "\n".join(found)
