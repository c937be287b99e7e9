"""Numbers out of traces: what the plots show, and what the nodes hand to programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .trace import RouterTrace, TraceError

UNUSED = 0.01  # a style whose mean share is smaller is hardly ever chosen


def timeline(trace: RouterTrace, role: str | None = None, image: int | None = None) -> Tensor:
    """The mean probability of every style at every step, over layers and images: (steps, n)."""
    return _of_image(trace.by_step(role), image).nanmean((1, 2))


def one_layer(trace: RouterTrace, layer: int, role: str | None = None, image: int | None = None) -> Tensor:
    """The probability of every style of one layer at every step, mean over images: (steps, n)."""
    return _of_image(trace.by_step(role), image)[:, layer].nanmean(1)


def by_layer(trace: RouterTrace, role: str | None = None, image: int | None = None) -> Tensor:
    """The mean probability of every style in every layer, over steps and images: (layers, n)."""
    return _of_image(trace.by_step(role), image).nanmean((0, 2))


def decidedness(trace: RouterTrace, role: str | None = None, image: int | None = None) -> Tensor:
    """How far each router is from mixing all styles alike, by layer and step: (layers, steps), 0 alike to 1 one style."""
    return 1 - entropy(_of_image(trace.by_step(role), image)).nanmean(2).mT


def entropy(s: Tensor) -> Tensor:
    """Entropy over the last dimension as a share of its maximum, 0 to 1; NaN where there is nothing; 0 for one style."""
    styles = (~s.isnan()).sum(-1)
    total = -torch.special.xlogy(s, s).nan_to_num(0.0).sum(-1)
    share = total / styles.clamp(min=2).float().log()
    return torch.where(styles > 0, share, math.nan)


def layer_statistics(trace: RouterTrace, role: str | None = None, image: int | None = None) -> dict[str, Tensor]:
    """What each layer does, (layers,) each.

    Returns:
        entropy: of its s, 0 one style to 1 all alike, mean over steps and images.
        reaction: how much s depends on step and image: the mean distance (half the sum of absolute differences, 0 to 1)
            of s from the layer's own mean.
        unused: the share of its styles that are hardly ever chosen (a mean of s below `UNUSED`).
        dma, sta: the mean sizes of its increments, relative to the frozen layer's output; NaN where not measured.
    """
    s = _of_image(trace.by_step(role), image)  # (steps, layers, images, n)
    sizes = _of_image(trace.by_step(role, trace.sizes), image).nanmean((0, 2))
    away = (s - s.nanmean((0, 2), keepdim=True)).abs().nansum(-1) / 2
    missing = s.isnan().all(-1)
    mean = s.nanmean((0, 2))  # (layers, n); a layer with fewer styles than others has NaN for those it has not
    unused = (mean < UNUSED).float().where(~mean.isnan(), math.nan).nanmean(-1)
    return {
        "entropy": entropy(s).nanmean((0, 2)),
        "reaction": torch.where(missing, math.nan, away).nanmean((0, 2)),
        "unused": unused,
        "dma": sizes[:, 0],
        "sta": sizes[:, 1],
    }


def distance(first: RouterTrace, second: RouterTrace, role: str | None = None) -> Tensor:
    """How differently two traces route, by layer and share of sampling: (layers, steps of the longer), 0 to 1.

    Each step is compared with the step of the other trace at the same share of its run; images are averaged first.

    Raises:
        TraceError: other layers, or another number of styles.
    """
    if first.layers != second.layers or len(first.styles) != len(second.styles):
        raise TraceError(
            f"{first.title} has {len(first.layers)} layers and {len(first.styles)} styles, {second.title} "
            f"{len(second.layers)} and {len(second.styles)}: only traces of the same layers and styles can be subtracted"
        )
    a, b = (trace.by_step(role).nanmean(2) for trace in (first, second))  # (steps, layers, n)
    steps = max(len(a), len(b))
    places = torch.arange(steps)
    a, b = a[places * len(a) // steps], b[places * len(b) // steps]
    missing = a.isnan().all(-1) | b.isnan().all(-1)
    return torch.where(missing, math.nan, (a - b).abs().nansum(-1) / 2).mT


def points(traces: Sequence[RouterTrace], role: str | None = None) -> tuple[Tensor, dict[str, list[Any]]]:
    """Every row and image of some traces as a point, its coordinates the s of all their common layers side by side.

    Returns:
        (points, layers x n), and what is known of each point: "trace", "prompt", "step", "share" (of the run),
        "style" (the one used most, over all layers), "role".

    Raises:
        TraceError: no layers in common, other numbers of styles, or fewer than three points.
    """
    common = [name for name in traces[0].layers if all(name in trace.layers for trace in traces)]
    if not common or len({len(trace.styles) for trace in traces}) > 1:
        raise TraceError("these traces have no layers in common, or other numbers of styles: they cannot share a map")
    coordinates, known = [], {name: [] for name in ("trace", "prompt", "step", "share", "style", "role")}  # type: ignore[var-annotated]
    for number, trace in enumerate(traces):
        places = [trace.layers.index(name) for name in common]
        for row in trace.rows(role).tolist() if role is None or role in trace.roles else []:
            step = int(trace.steps[row])
            for image, s in enumerate(trace.probabilities[row][places].movedim(1, 0)):  # (images, layers, n)
                if s.isnan().all():
                    continue
                coordinates.append(s.nan_to_num(0.0).flatten())
                label = trace.label or trace.adapter
                known["trace"].append(number)
                known["prompt"].append(f"{label} [{image + 1}]" if trace.probabilities.shape[2] > 1 else label)
                known["step"].append(step)
                known["share"].append((step + 0.5) / trace.total_steps)
                known["style"].append(int(s.nanmean(0).nan_to_num(0.0).argmax()))
                known["role"].append(trace.roles[row])
    if len(coordinates) < 3:
        raise TraceError(f"a map needs at least 3 points, these traces have {len(coordinates)}: sample more steps or prompts")
    return torch.stack(coordinates), known


def plain(values: Tensor) -> list[Any]:
    """Nested lists for JSON, NaN as None, four digits."""
    if values.ndim > 1:
        return [plain(part) for part in values]
    return [None if math.isnan(value) else round(value, 4) for value in values.tolist()]


def _of_image(values: Tensor, image: int | None) -> Tensor:
    """Of (steps, layers, images, ...), one image, counted from 0; None for all. Raises TraceError: there is no such image."""
    if image is None:
        return values
    if not 0 <= image < values.shape[2]:
        raise TraceError(f"image {image + 1} of the batch: the trace has {values.shape[2]}")
    return values[:, :, image : image + 1]
