"""The router's numbers are right, and its pictures can be drawn from any trace."""

from __future__ import annotations

import builtins
import math
from dataclasses import replace

import pytest
import torch

from styleinject_core.layer_names import parse
from styleinject_core.router import analysis, canvas, plots
from styleinject_core.router.embedding import METHODS, embed
from styleinject_core.router.trace import RouterTrace, TraceError

LAYERS = (
    "conv_in",
    "down_blocks.0.resnets.1.conv1",
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0",
    "mid_block.attentions.0.transformer_blocks.2.ff.net.0.proj",
    "up_blocks.1.upsamplers.0.conv",
)


def make(s: torch.Tensor, roles=None, steps=None, total=None, layers=LAYERS, **texts) -> RouterTrace:
    """A trace of given probabilities (rows, layers, images, n), one role unless told."""
    rows, count, images, styles = s.shape
    steps = torch.arange(rows) if steps is None else torch.tensor(steps)
    texts = {"adapter": "ink", "label": "red apple", **texts}
    names = texts.pop("styles", tuple(f"style {k + 1}" for k in range(styles)))
    return RouterTrace(
        layers=tuple(layers[:count]), convolutions=("conv_in",), styles=names, roles=tuple(roles or ["positive"] * rows),
        probabilities=s, sizes=torch.rand(rows, count, images, 2), steps=steps, sigmas=torch.linspace(10, 1, rows),
        total_steps=total or int(steps.max()) + 1, **texts,
    )  # fmt: skip


def random_trace(seed=0, steps=5, layers=6, images=2, styles=3, **texts) -> RouterTrace:
    generator = torch.Generator().manual_seed(seed)
    s = torch.softmax(3 * torch.randn(2 * steps, layers, images, styles, generator=generator), -1)
    names = LAYERS if layers <= 6 else [f"down_blocks.{k // 40}.resnets.{k % 7}.layer{k}" for k in range(layers)]
    return make(s, ["positive", "negative"] * steps, [k // 2 for k in range(2 * steps)], layers=names, **texts)


def test_means_over_what_is_there():
    s = torch.zeros(3, 2, 1, 2)
    s[0, :, :, 0] = 1
    s[1, 0, :, 1], s[1, 1, :, 0] = 1, 1
    s[2] = math.nan
    trace = make(s, total=4)
    assert analysis.plain(analysis.timeline(trace)) == [[1, 0], [0.5, 0.5], [None, None], [None, None]]
    assert analysis.plain(analysis.by_layer(trace)) == [[0.5, 0.5], [1, 0]]
    assert analysis.plain(analysis.one_layer(trace, 0)) == [[1, 0], [0, 1], [None, None], [None, None]]
    assert analysis.plain(analysis.decidedness(trace)) == [[1, 1, None, None]] * 2
    found = analysis.layer_statistics(trace)
    assert found["reaction"].tolist() == [0.5, 0.0] and found["entropy"].tolist() == [0, 0]
    assert found["unused"].tolist() == [0.0, 0.5], "the second layer never chooses its second style"
    with pytest.raises(TraceError, match="image 2 of the batch: the trace has 1"):
        analysis.timeline(trace, image=1)


def test_entropy_is_a_share_of_its_maximum():
    s = torch.tensor(
        [[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], [0.5, 0.5, math.nan, math.nan], [1, math.nan, math.nan, math.nan]]
    )
    torch.testing.assert_close(analysis.entropy(s), torch.tensor([1.0, 0.0, 1.0, 0.0]))
    assert analysis.entropy(torch.full((3,), math.nan)).isnan()


def test_distance_compares_equal_shares_of_the_run():
    s = torch.softmax(torch.randn(4, 3, 2, 3, generator=torch.Generator().manual_seed(0)), -1)
    long, short = make(s.repeat_interleave(2, 0)), make(s)
    torch.testing.assert_close(analysis.distance(long, short), torch.zeros(3, 8), atol=1e-6, rtol=0)
    one, other = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
    one[..., 0], other[..., 1] = 1, 1
    assert analysis.distance(make(one), make(other)).tolist() == [[1.0]]
    with pytest.raises(TraceError, match="3 layers and 3 styles.*1 and 2: only traces of the same"):
        analysis.distance(short, make(one))


def test_points_are_rows_and_images():
    first, second = random_trace(0), random_trace(1, steps=3, images=1, label="cat")
    points, known = analysis.points([first, second], "positive")
    assert points.shape == (5 * 2 + 3, 6 * 3)
    assert known["prompt"][:2] == ["red apple [1]", "red apple [2]"] and known["prompt"][-1] == "cat"
    assert known["share"][0] == 0.1 and set(known["role"]) == {"positive"}
    torch.testing.assert_close(points[1], first.probabilities[0][:, 1].flatten())
    assert known["style"][1] == int(first.probabilities[0][:, 1].mean(0).argmax())
    with pytest.raises(TraceError, match="other numbers of styles"):
        analysis.points([first, random_trace(styles=2)])
    with pytest.raises(TraceError, match="at least 3 points, these traces have 2"):
        analysis.points([random_trace(steps=1, images=1)])


@pytest.mark.parametrize("method", METHODS)
def test_embeddings_keep_groups_apart(method):
    if method == "UMAP":
        pytest.importorskip("umap")
    torch.manual_seed(0)
    groups = torch.cat([torch.randn(20, 8) * 0.1 + center for center in torch.eye(8)[:3] * 5])
    plane = embed(groups, method)
    assert plane.shape == (60, 2) and torch.equal(plane, embed(groups, method))
    parts = plane.view(3, 20, 2)
    within = (parts - parts.mean(1, keepdim=True)).norm(dim=-1).max()
    assert torch.pdist(parts.mean(1)).min() > within
    few = embed(groups[:3], method)
    assert few.shape == (3, 2) and few.isfinite().all()
    assert torch.equal(embed(groups[:1].expand(40, 8), method), torch.zeros(40, 2)), "a mixer's routing: all the same"
    line = embed(torch.rand(12, 1), method)
    assert line.shape == (12, 2) and line.isfinite().all()


@pytest.mark.parametrize(("package", "call", "message"), [
    ("matplotlib", lambda: plots.timeline(random_trace()), "pip install matplotlib"),
    ("sklearn", lambda: embed(torch.randn(5, 3), "t-SNE"), "pip install scikit-learn"),
    ("umap", lambda: embed(torch.randn(5, 3), "UMAP"), "pip install umap-learn"),
])  # fmt: skip
def test_a_package_that_is_missing_is_named(package, call, message, monkeypatch):
    ordinary = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(name)
        return ordinary(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(canvas.MissingPackageError, match=message):
        call()


def drawn(trace):
    return [
        *(plots.heatmap(trace, view) for view in plots.VIEWS),
        plots.heatmap(trace, role="positive", image=0),
        plots.timeline(trace),
        plots.layers(trace, "positive"),
        plots.compare(trace, trace),
    ]


@pytest.mark.parametrize("trace", [
    random_trace(),
    random_trace(steps=1, layers=1, images=1, styles=1),
    random_trace(steps=12, layers=90, images=1, styles=10),
    make(torch.full((2, 3, 1, 2), math.nan), finished=False, note="recording stopped"),
], ids=["usual", "least", "large", "nothing"])  # fmt: skip
def test_pictures_of_any_trace(trace):
    for image in drawn(trace):
        assert image.ndim == 3 and image.shape[1] == 800 and 300 <= image.shape[0] <= 900
        assert image.min() >= 0 and image.max() <= 1 and image.std() > 0.02
    stack = canvas.batch(drawn(trace)[:2])
    assert stack.shape[0] == 2 and stack.shape[3] == 3


def test_texts_are_plain_and_other_peoples_settings_do_not_matter(tmp_path):
    import matplotlib

    hostile = {"label": "$\\frac{a}{b$ <b>x</b> 100%\n" + "long " * 60, "note": "$x^2$"}
    trace = replace(random_trace(**hostile), styles=("$\\bad{", "_x_", "ink"))
    image = plots.timeline(trace)
    assert torch.equal(image, plots.timeline(trace))
    with matplotlib.rc_context({"text.usetex": True, "figure.dpi": 37, "axes.facecolor": "red"}):
        assert torch.equal(image, plots.timeline(trace))
        assert matplotlib.rcParams["figure.dpi"] == 37
    canvas.save(image, tmp_path / "t.png")
    assert [path.name for path in tmp_path.iterdir()] == ["t.png"]


@pytest.mark.parametrize("color", plots.COLORS)
def test_maps(color):
    traces = [random_trace(seed, steps=2, images=1, label=f"prompt {seed}") for seed in range(20)]
    points, known = analysis.points(traces)
    image = plots.scatter(embed(points, "PCA"), known, color, "title", "subtitle", traces[0].styles)
    assert image.shape == (620, 800, 3) and image.std() > 0.02


def test_unknown_views_and_colors():
    with pytest.raises(ValueError, match="view 'x': expected one of layers x styles"):
        plots.heatmap(random_trace(), "x")
    with pytest.raises(ValueError, match="color 'x': expected one of prompt"):
        plots.scatter(torch.zeros(1, 2), {}, "x", "", "", ())
    with pytest.raises(ValueError, match="method 'x': expected one of t-SNE"):
        embed(torch.zeros(3, 2), "x")


@pytest.mark.parametrize(("layer", "short", "block"), [
    (LAYERS[0], "conv_in", "conv_in"),
    (LAYERS[1], "down 0.1 res conv1", "down 0"),
    (LAYERS[2], "down 0.1 self to_q", "down 0"),
    (LAYERS[3], "down 0.1 cross to_out", "down 0"),
    (LAYERS[4], "mid.0.2 ff proj", "mid"),
    (LAYERS[5], "up 1 grow conv", "up 1"),
    ("transformer_blocks.3.attn.to_q", "transformer_blocks.3.attn.to_q", "transformer_blocks.3"),
])  # fmt: skip
def test_names_for_people(layer, short, block):
    assert parse(layer).label == short
    assert parse(layer).block_label == block
