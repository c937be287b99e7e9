"""`styleinject plot`: the router's pictures from saved traces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from ..router import analysis, canvas, plots
from ..router.embedding import embed
from ..router.trace import RouterTrace, TraceError, load_trace

KINDS = ("heatmap", "timeline", "layers", "map", "compare")


def run(
    files: Sequence[Path],
    out: Path,
    kinds: Sequence[str],
    *,
    role: str | None,
    image: int | None,
    layers: str,
    view: str,
    method: str,
) -> list[Path]:
    """Draw traces and write PNG files.

    Args:
        files: traces that `save_trace` wrote. Each gets the pictures of its own; a map has all of them, a comparison two.
        out: the folder, made where it is missing.
        kinds: of KINDS; empty for every kind that these files allow.
        role, image, layers: as in `plots`; layers is a layer selector.
        view: of the heat map. method: of the map.

    Returns:
        The files written.

    Raises:
        TraceError: a file that is no trace, or a comparison of other than two.
    """
    traces = [load_trace(path) for path in files]
    if layers != "all":
        traces = [trace.only(layers) for trace in traces]
    if "compare" in kinds and len(traces) != 2:
        raise TraceError(f"compare needs two traces, found {len(traces)}")
    wanted = list(kinds) or [kind for kind in KINDS if kind != "compare" or len(traces) == 2]
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, draw in _OF_ONE.items():
        for path, trace in zip(files, traces, strict=True):
            if kind in wanted:
                written.append(out / f"{path.stem}-{kind}.png")
                canvas.save(draw(trace, view, role, image), written[-1])
    if "map" in wanted:
        points, known = analysis.points(traces, role)
        title = traces[0].title if len(traces) == 1 else f"The style router of {len(traces)} traces"
        subtitle = f"{method} of s over all layers; each point a step of an image, larger is later"
        written.append(out / "map.png")
        canvas.save(plots.scatter(embed(points, method), known, "prompt", title, subtitle, traces[0].styles), written[-1])
    if "compare" in wanted:
        written.append(out / "compare.png")
        canvas.save(plots.compare(traces[0], traces[1], role), written[-1])
    return written


_OF_ONE: dict[str, Callable[[RouterTrace, str, str | None, int | None], Tensor]] = {
    "heatmap": plots.heatmap,
    "timeline": lambda trace, _, role, image: plots.timeline(trace, role, image),
    "layers": lambda trace, _, role, image: plots.layers(trace, role, image),
}
