"""styleinject plot."""

from __future__ import annotations

import pytest
import torch

from styleinject_core.cli import main
from styleinject_core.router.trace import RouterTrace, save_trace


@pytest.fixture
def traces(tmp_path):
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        s = torch.softmax(torch.randn(6, 3, 2, 3, generator=generator), -1)
        trace = RouterTrace(
            "ink", ("down_blocks.0.attn1.to_q", "mid_block.attn2.to_q", "conv_in"), ("conv_in",), ("a", "b", "c"),
            ("positive", "negative") * 3, s, torch.rand(6, 3, 2, 2), torch.arange(6) // 2, torch.linspace(9, 1, 6), 3, label=f"seed {seed}",
        )  # fmt: skip
        save_trace(trace, tmp_path / f"t{seed}.safetensors")
    return [str(tmp_path / f"t{seed}.safetensors") for seed in (1, 2)]


def test_every_picture(traces, tmp_path, capsys):
    out = tmp_path / "pictures"
    assert main(["plot", *traces, "--out", str(out)]) == 0
    names = ["compare.png", "map.png", *(f"t{k}-{kind}.png" for k in (1, 2) for kind in ("heatmap", "layers", "timeline"))]
    assert sorted(path.name for path in out.iterdir()) == names
    assert sorted(capsys.readouterr().out.split()) == [str(out / name) for name in names]


def test_one_picture(traces, tmp_path):
    out = tmp_path / "one"
    chosen = ["--kind", "heatmap", "--role", "negative", "--image", "2", "--layers", "conv", "--view", "layers x steps"]
    assert main(["plot", traces[0], "--out", str(out), *chosen]) == 0
    assert [path.name for path in out.iterdir()] == ["t1-heatmap.png"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--kind", "compare"], "compare needs two traces, found 1"),
    (["--role", "middle"], "has no role 'middle'; it has positive, negative"),
    (["--image", "3"], "image 3 of the batch: the trace has 2"),
    (["--layers", "up"], "'up' matches none"),
])  # fmt: skip
def test_errors_are_one_line(traces, tmp_path, capsys, arguments, message):
    assert main(["plot", traces[0], "--out", str(tmp_path / "x"), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
