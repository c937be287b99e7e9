"""The router's pictures, each a function from traces to pixels (H, W, 3) in [0, 1]; `analysis` has the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..colors import FAINT, PAPER, SHADE, STYLE_COLORS
from ..layer_names import parse, parse_all
from . import analysis
from .canvas import color_map, figure, patch, picture, shortened, style_look
from .trace import RouterTrace

VIEWS = ("layers x styles", "styles x steps", "layers x steps")
COLORS = ("prompt", "step", "style", "role")
_LABELED_ROWS = 30  # of more, only the blocks are labeled


@picture
def heatmap(trace: RouterTrace, view: str = VIEWS[0], role: str | None = None, image: int | None = None) -> Any:
    """The router as a heat map, a panel for each role.

    Args:
        view: one of VIEWS: probabilities over two of layer, style and step; or how decided each layer is at each step.
        role: of this role only; None for all there are.
        image: of this image of the batch, from 0; None for the mean.
    """
    if view not in VIEWS:
        raise ValueError(f"view {view!r}: expected one of {', '.join(VIEWS)}")
    roles = [role] if role else list(trace.role_names)
    meaning = {
        VIEWS[0]: "probability of each style in each layer, mean over the steps",
        VIEWS[1]: "probability of each style at each step, mean over the layers",
        VIEWS[2]: "how decided each layer is at each step: 0 mixes all styles alike, 1 uses one",
    }[view]
    panels = {
        VIEWS[0]: lambda r: analysis.by_layer(trace, r, image),
        VIEWS[1]: lambda r: analysis.timeline(trace, r, image).mT,
        VIEWS[2]: lambda r: analysis.decidedness(trace, r, image),
    }
    values = [panels[view](r) for r in roles]
    rows = trace.styles if view == VIEWS[1] else trace.layers
    drawn = figure(_height(len(rows), view != VIEWS[1]), trace.title, meaning + _which_image(image), trace.remarks)
    axes = drawn.subplots(1, len(roles), squeeze=False, sharey=True)[0]
    top = 1.0 if view == VIEWS[2] else max(1e-6, max(float(v.nan_to_num(0.0).max()) for v in values))
    for axis, name, panel in zip(axes, roles, values, strict=True):
        shown = axis.imshow(panel.numpy(), aspect="auto", cmap=color_map(), vmin=0, vmax=top, interpolation="nearest")
        axis.set_title(name)
        if view == VIEWS[0]:
            _style_ticks(axis, trace.styles, len(roles))
        else:
            _step_ticks(axis, trace.total_steps)
    if view == VIEWS[1]:
        axes[0].set_yticks(range(len(rows)), [shortened(name, 22) for name in rows])
    else:
        _layer_ticks(axes, trace.layers)
    bar = drawn.colorbar(shown, ax=list(axes), fraction=0.05, pad=0.02)
    bar.set_label("decided" if view == VIEWS[2] else "probability")
    return drawn


@picture
def timeline(trace: RouterTrace, role: str | None = None, image: int | None = None) -> Any:
    """Each style's share over the steps, a row for each role: the mean over all layers, and the layers that react most.

    A style of one layer has nothing to do with the same number in another: in the mean they may cancel out.
    Steps at which the adapter was not active are gray.
    """
    roles = [role] if role else list(trace.role_names)
    liveliest = (
        analysis.layer_statistics(trace, role, image)["reaction"].nan_to_num(-1.0).topk(min(3, len(trace.layers))).indices
    )
    chosen = sorted(liveliest.tolist()) if len(trace.layers) > 1 else []
    subtitle = (
        "share of each style at each step" + _which_image(image) + ("; right: the layers that react most" if chosen else "")
    )
    drawn = figure(1.6 + 2.3 * len(roles), trace.title, subtitle, trace.remarks)
    axes = drawn.subplots(len(roles), 1 + len(chosen), squeeze=False, sharey=True, sharex=True)
    for row, name in zip(axes, roles, strict=True):
        _stack(row[0], analysis.timeline(trace, name, image))
        row[0].set_ylabel(name)
        for axis, place in zip(row[1:], chosen, strict=True):
            _stack(axis, analysis.one_layer(trace, place, name, image))
    names = [trace.layers[0]] if not chosen else ["mean of all layers", *(trace.layers[place] for place in chosen)]
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(shortened(parse(name).label, 24), fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("sampling step")
    _style_legend(drawn, trace.styles)
    return drawn


@picture
def layers(trace: RouterTrace, role: str | None = None, image: int | None = None) -> Any:
    """Which layers react to what they see, how undecided they are, and how large their increments are."""
    statistics = analysis.layer_statistics(trace, role, image)
    names, grouped = _grouped(trace.layers, statistics)
    columns = [
        ("reaction", "reaction to\nstep and image", 0),
        ("entropy", "entropy: 0 one\nstyle, 1 all alike", 1),
        ("dma", "size of Δh\nbeside h", 2),
        ("sta", "size of AdaIN\nbeside h", 3),
    ]
    whose = f"{role} prompt" if role in ("positive", "negative") else role or "all roles"
    subtitle = f"mean over the steps, {whose}{_which_image(image)}" + (", layers of a kind together" if grouped else "")
    unused = float(statistics["unused"].nanmean().nan_to_num(0.0))
    subtitle += f"; {unused:.0%} of the layers' styles hardly ever chosen" if unused else ""
    drawn = figure(max(4.5, 1.9 + 0.19 * len(names)), trace.title, subtitle, trace.remarks)
    axes = drawn.subplots(1, len(columns), sharey=True)
    for axis, (key, label, color) in zip(axes, columns, strict=True):
        values = torch.tensor([float(v) for v in names.values_of(key)])
        axis.barh(range(len(names)), values.nan_to_num(0.0).tolist(), color=STYLE_COLORS[color], height=0.75)
        axis.set_xlabel(label, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        axis.locator_params(axis="x", nbins=3)
        axis.set_xlim(0, 1 if key == "entropy" else max(1e-6, float(values.nan_to_num(0.0).max()) * 1.08))
        if values.isnan().all():
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", rotation=90, color=FAINT)
    axes[0].set_yticks(range(len(names)), names.labels, fontsize=9)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    return drawn


@picture
def compare(first: RouterTrace, second: RouterTrace, role: str | None = None) -> Any:
    """Two traces side by side, the styles of each layer, and below how differently each layer routes at each step."""
    drawn = figure(8.0, f"{first.title}  |  {second.title}", f"two runs, {role or 'all roles'}", _remarks_of_two(first, second))
    grid = drawn.add_gridspec(2, 2, height_ratios=(1.2, 1))
    values = [analysis.by_layer(trace, role) for trace in (first, second)]
    top = max(1e-6, max(float(v.nan_to_num(0.0).max()) for v in values))
    upper: list[Any] = []
    for place, (trace, panel) in enumerate(zip((first, second), values, strict=True)):
        upper.append(drawn.add_subplot(grid[0, place]))
        shown = upper[-1].imshow(panel.numpy(), aspect="auto", cmap=color_map(), vmin=0, vmax=top, interpolation="nearest")
        upper[-1].set_title(shortened(trace.title, 42))
        _style_ticks(upper[-1], trace.styles, 2)
        _layer_ticks([upper[-1]], trace.layers)
    upper[1].tick_params(labelleft=False)
    drawn.colorbar(shown, ax=upper, fraction=0.05, pad=0.02).set_label("probability")
    lower = drawn.add_subplot(grid[1, :])
    away = analysis.distance(first, second, role)
    top = max(1e-6, float(away.nan_to_num(0.0).max()))
    shown = lower.imshow(away.numpy(), aspect="auto", cmap=color_map(), vmin=0, vmax=top, interpolation="nearest")
    lower.set_title(f"how differently each layer routes (0 the same, 1 nothing in common); mean {float(away.nanmean()):.3f}")
    _step_ticks(lower, away.shape[1])
    _layer_ticks([lower], first.layers)
    drawn.colorbar(shown, ax=lower, fraction=0.05, pad=0.02).set_label("distance")
    return drawn


@picture
def scatter(
    coordinates: Tensor, known: dict[str, list[Any]], color: str, title: str, subtitle: str, styles: Sequence[str]
) -> Any:
    """A map of points.

    Args:
        coordinates: (points, 2), from `embedding.embed`.
        known: of each point, from `analysis.points`.
        color: one of COLORS.
    """
    if color not in COLORS:
        raise ValueError(f"color {color!r}: expected one of {', '.join(COLORS)}")
    drawn = figure(6.2, title, subtitle)
    axis = drawn.add_subplot()
    x, y = coordinates.numpy().T
    markers = "osD^vP*X"
    sizes = torch.tensor([22 + 60 * share for share in known["share"]]).numpy()  # points grow with the step
    if color == "step":
        shown = axis.scatter(x, y, c=known["share"], cmap=color_map(), s=36, vmin=0, vmax=1, edgecolors=PAPER, linewidths=0.3)
        drawn.colorbar(shown, ax=axis, fraction=0.05, pad=0.02).set_label("share of sampling")
    else:
        groups = list(dict.fromkeys(known[color])) if color != "style" else sorted(set(known["style"]))
        for number, group in enumerate(groups):
            own = [k for k, value in enumerate(known[color]) if value == group]
            place = group if color == "style" else number
            label = styles[group] if color == "style" else str(group)
            marker = markers[place // len(STYLE_COLORS) % len(markers)]
            face = STYLE_COLORS[place % len(STYLE_COLORS)]
            label = f" {shortened(label, 30)}" if number < 16 else None
            axis.scatter(x[own], y[own], s=sizes[own], color=face, marker=marker, label=label, edgecolors=PAPER, linewidths=0.4)
        more = f" (16 of {len(groups)})" if len(groups) > 16 else ""
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title=color + more, fontsize=9.5)
    axis.set_xticks([])
    axis.set_yticks([])
    return drawn


def _stack(axis: Any, shares: Tensor) -> None:
    """The styles' shares (steps, n) on each other, step by step; nothing where there is none."""
    steps, styles = shares.shape
    edges, bottom = torch.arange(steps + 1) + 0.5, torch.zeros(steps)
    for style in range(styles):
        top = bottom + shares[:, style].nan_to_num(0.0)
        axis.stairs(top.numpy(), edges.numpy(), baseline=bottom.numpy(), fill=True, linewidth=0, **style_look(style))
        bottom = top
    axis.set(xlim=(0.5, steps + 0.5), ylim=(0, 1))
    axis.xaxis.get_major_locator().set_params(integer=True)
    for step in torch.nonzero(shares.isnan().all(1)).flatten().tolist():
        axis.axvspan(step + 0.5, step + 1.5, color=SHADE, linewidth=0)


def _style_legend(drawn: Any, styles: Sequence[str]) -> None:
    # the space: matplotlib leaves out names that begin with an underscore
    handles = [patch(label=f" {shortened(name, 26)}", **style_look(k)) for k, name in enumerate(styles)]
    drawn.legend(handles=handles, loc="outside lower center", ncols=4 if len(styles) > 3 else len(styles), fontsize=9.5)


def _style_ticks(axis: Any, styles: Sequence[str], panels: int) -> None:
    unnamed = all(name == f"style {k + 1}" for k, name in enumerate(styles))
    if unnamed:
        every = 1 if len(styles) * panels <= 36 else 2
        axis.set_xticks(range(0, len(styles), every), [str(k + 1) for k in range(0, len(styles), every)])
        axis.set_xlabel("style")
    else:
        names = [shortened(name, 16) for name in styles]
        axis.set_xticks(range(len(styles)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=9.5)


def _step_ticks(axis: Any, steps: int) -> None:
    every = max(1, -(-steps // 8))
    axis.set_xticks(range(0, steps, every), [str(step + 1) for step in range(0, steps, every)])
    axis.set_xlabel("sampling step")


def _layer_ticks(axes: Sequence[Any], names: Sequence[str]) -> None:
    """A label for each layer, or for each block where there are many; lines between the blocks."""
    blocks = [parse(name).block_label for name in names]
    starts = [k for k, block in enumerate(blocks) if k == 0 or block != blocks[k - 1]]
    for axis in axes:
        for start in starts[1:]:
            axis.axhline(start - 0.5, color=PAPER, linewidth=1.2)
    if len(names) <= _LABELED_ROWS:
        axes[0].set_yticks(range(len(names)), [shortened(parse(name).label, 30) for name in names], fontsize=9)
        return
    ends = [*starts[1:], len(names)]
    wide = [(start, end) for start, end in zip(starts, ends, strict=True) if end - start > len(names) / _LABELED_ROWS]
    axes[0].set_yticks([(start + end - 1) / 2 for start, end in wide], [shortened(blocks[start], 24) for start, _ in wide])
    axes[0].tick_params(axis="y", length=0)


class _Rows:
    """Rows of the layer plot: layers, or the layers of a kind in a block where there are too many."""

    def __init__(self, labels: list[str], values: dict[str, list[float]]):
        self.labels, self._values = labels, values

    def values_of(self, key: str) -> list[float]:
        return self._values[key]

    def __len__(self) -> int:
        return len(self.labels)


def _grouped(names: Sequence[str], statistics: dict[str, Tensor]) -> tuple[_Rows, bool]:
    """One row a layer; of too many, one for the layers of a kind in a block, with fewer kinds if need be."""
    layers = parse_all(names)
    for level in range(3):
        groups: dict[tuple[str, ...], list[int]] = {}
        for place, name in enumerate(names):
            layer = layers[name]
            role = layer.role_label if level == 1 else layer.role_label[:1]
            label = (layer.label, str(place)) if level == 0 else (layer.block_label, *role)
            groups.setdefault(label, []).append(place)
        if len(groups) <= _LABELED_ROWS * 1.5:
            break
    values = {key: [float(v[places].nanmean()) for places in groups.values()] for key, v in statistics.items()}
    labels = [" ".join(label[:-1] if level == 0 else label) for label in groups]
    return _Rows([shortened(label, 30) for label in labels], values), level > 0


def _height(rows: int, are_layers: bool) -> float:
    shown = min(rows, _LABELED_ROWS + 10) if are_layers else rows
    return min(8.0, max(4.2, 2.0 + 0.19 * shown))


def _which_image(image: int | None) -> str:
    return "" if image is None else f", image {image + 1}"


def _remarks_of_two(first: RouterTrace, second: RouterTrace) -> str:
    return "; ".join(f"{trace.title}: {trace.remarks}" for trace in (first, second) if trace.remarks)
