"""Looking at the style router: each node draws what a trace holds, and hands out the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ...integration.monitor import traces_of
from ...styleinject_core.router import analysis, plots
from ...styleinject_core.router.canvas import batch
from ...styleinject_core.router.embedding import METHODS, embed
from ...styleinject_core.router.trace import RouterTrace, TraceError
from ..schema import after_input, schema, trace_input

_ALL = "all"
_SELECTOR = 'Which layers to show: "all", or groups such as attention, conv, self, cross, down, mid, up, up.1, to_q.'


def role_input(tooltip: str = "For which prompt. all: one panel for each.") -> io.Combo.Input:
    return io.Combo.Input("role", options=[_ALL, "positive", "negative"], default=_ALL, tooltip=tooltip)


def image_input() -> io.Int.Input:
    return io.Int.Input(
        "image", default=0, min=0, max=4096, tooltip="Which image of the batch, counted from 1. 0: the mean of all."
    )


def layers_input() -> io.String.Input:
    return io.String.Input("layers", default=_ALL, tooltip=_SELECTOR)


def image_output() -> io.Image.Output:
    return io.Image.Output("IMAGE", display_name="IMAGE", tooltip="The picture; one for each adapter in the trace.")


class StyleInjectRouterHeatmap(io.ComfyNode):
    """STYLEINJECT_TRACE -> IMAGE: layers, styles and steps, two of them at a time."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectRouterHeatmap",
            section="router",
            display_name="Router Heatmap",
            description="Shows the style router of a run as a heat map: which layers use which styles, and when.",
            search_aliases=["style router", "heat map", "plot"],
            advanced=("image", "layers"),
            inputs=[
                trace_input(),
                io.Combo.Input(
                    "view",
                    options=list(plots.VIEWS),
                    default=plots.VIEWS[0],
                    tooltip="The first two show probabilities; layers x steps shows how decided each layer is.",
                ),
                role_input(),
                image_input(),
                layers_input(),
                after_input(),
            ],
            outputs=[image_output()],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, trace: Any, view: str, role: str, image: int, layers: str, after: Any = None) -> io.NodeOutput:
        role_name, which = _role(role), _image(image)
        values = {
            plots.VIEWS[0]: analysis.by_layer,
            plots.VIEWS[1]: analysis.timeline,
            plots.VIEWS[2]: analysis.decidedness,
        }[view]
        traces = _traces(trace, after, layers)
        numbers = [_numbers(t, role_name, lambda r, t=t: analysis.plain(values(t, r, which))) for t in traces]
        return _output(cls, [plots.heatmap(t, view, role_name, which) for t in traces], numbers)


class StyleInjectRouterTimeline(io.ComfyNode):
    """STYLEINJECT_TRACE -> IMAGE: the styles' shares over the steps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectRouterTimeline",
            section="router",
            display_name="Router Timeline",
            description="Shows how the mix of styles changes from step to step: the mean, and the layers that react most.",
            search_aliases=["style router", "steps", "plot"],
            advanced=("image", "layers"),
            inputs=[trace_input(), role_input(), image_input(), layers_input(), after_input()],
            outputs=[image_output()],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, trace: Any, role: str, image: int, layers: str, after: Any = None) -> io.NodeOutput:
        role_name, which = _role(role), _image(image)
        traces = _traces(trace, after, layers)
        numbers = [_numbers(t, role_name, lambda r, t=t: analysis.plain(analysis.timeline(t, r, which))) for t in traces]
        return _output(cls, [plots.timeline(t, role_name, which) for t in traces], numbers)


class StyleInjectRouterLayers(io.ComfyNode):
    """STYLEINJECT_TRACE -> IMAGE: what each layer does."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectRouterLayers",
            section="router",
            display_name="Router Layers",
            description="Shows which layers react to what they see, how undecided they are, and how much they change.",
            search_aliases=["style router", "entropy", "layer statistics", "plot"],
            advanced=("image", "layers"),
            inputs=[
                trace_input(),
                role_input("For which prompt. all: the mean."),
                image_input(),
                layers_input(),
                after_input(),
            ],
            outputs=[image_output()],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, trace: Any, role: str, image: int, layers: str, after: Any = None) -> io.NodeOutput:
        role_name, which = _role(role), _image(image)
        traces = _traces(trace, after, layers)

        def statistics(t: RouterTrace, r: str) -> dict[str, Any]:
            return {key: analysis.plain(values) for key, values in analysis.layer_statistics(t, r, which).items()}

        numbers = [_numbers(t, role_name, lambda r, t=t: statistics(t, r)) for t in traces]
        return _output(cls, [plots.layers(t, role_name, which) for t in traces], numbers)


class StyleInjectRouterCompare(io.ComfyNode):
    """Two STYLEINJECT_TRACE -> IMAGE: side by side, and what differs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectRouterCompare",
            section="router",
            display_name="Router Compare",
            description="Shows two runs side by side, for example of two prompts, and how differently each layer routes.",
            search_aliases=["style router", "difference", "plot"],
            advanced=("layers",),
            inputs=[
                trace_input("trace_a"),
                trace_input("trace_b"),
                role_input("For which prompt. all: the mean."),
                layers_input(),
                after_input("after_a"),
                after_input("after_b"),
            ],
            outputs=[image_output()],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, trace_a: Any, trace_b: Any, role: str, layers: str, after_a: Any = None, after_b: Any = None
    ) -> io.NodeOutput:
        role_name = _role(role)
        pairs = _pairs(_traces(trace_a, after_a, layers), _traces(trace_b, after_b, layers))
        numbers = [
            {
                "traces": [a.title, b.title],
                "layers": list(a.layers),
                "distance": analysis.plain(analysis.distance(a, b, role_name)),
            }
            for a, b in pairs
        ]
        return _output(cls, [plots.compare(a, b, role_name) for a, b in pairs], numbers)


class StyleInjectRouterMap(io.ComfyNode):
    """STYLEINJECT_TRACE -> IMAGE: every step of every image as a point on a plane (the paper's figure 9)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectRouterMap",
            section="router",
            display_name="Router Map",
            description="Shows every step of every image as a point; points close together were routed alike in all layers.",
            search_aliases=["style router", "t-SNE", "PCA", "UMAP", "plot"],
            advanced=("layers", "seed"),
            inputs=[
                trace_input(),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=METHODS[0],
                    tooltip="How the plane is found. PCA keeps distances; t-SNE and UMAP keep neighbors "
                    "together (they need the packages scikit-learn and umap-learn).",
                ),
                io.Combo.Input(
                    "color",
                    options=list(plots.COLORS),
                    default=plots.COLORS[0],
                    tooltip="What the colors mean: prompt (a trace's label and image), step, the style used most, or role.",
                ),
                role_input("For which prompt. all: all of them in one map."),
                layers_input(),
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1, tooltip="Where t-SNE and UMAP start; they are random."),
                after_input(),
            ],
            outputs=[io.Image.Output("IMAGE", display_name="IMAGE", tooltip="The picture, all traces in one.")],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, trace: Any, method: str, color: str, role: str, layers: str, seed: int, after: Any = None
    ) -> io.NodeOutput:
        traces = _traces(trace, after, layers)
        points, known = analysis.points(traces, _role(role))
        plane = embed(points, method, seed=seed)
        title = traces[0].title if len(traces) == 1 else f"The style router of {len(traces)} traces"
        subtitle = f"{method} of s over all layers; each point a step of an image, larger is later"
        picture = plots.scatter(plane, known, color, title, subtitle, traces[0].styles)
        return _output(cls, [picture], [{"traces": [t.title for t in traces], "points": analysis.plain(plane), **known}])


def _role(role: str) -> str | None:
    return None if role == _ALL else role


def _image(image: int) -> int | None:
    return image - 1 if image else None


def _traces(trace: Any, after: Any, layers: str) -> list[RouterTrace]:
    found = traces_of(trace, after)
    if not found:
        raise TraceError("there is no trace in what is connected to `trace`")
    return [t if layers.strip() == _ALL else t.only(layers) for t in found]


def _pairs(first: Sequence[RouterTrace], second: Sequence[RouterTrace]) -> list[tuple[RouterTrace, RouterTrace]]:
    """The traces of the same adapter; where no name is in both, the first of each."""
    by_name = {trace.adapter: trace for trace in second}
    return [(t, by_name[t.adapter]) for t in first if t.adapter in by_name] or [(first[0], second[0])]


def _numbers(trace: RouterTrace, role: str | None, values: Any) -> dict[str, Any]:
    """A trace's numbers for programs: nested lists by role, and what their places mean."""
    return {
        "adapter": trace.adapter,
        "label": trace.label,
        "remarks": trace.remarks,
        "layers": list(trace.layers),
        "styles": list(trace.styles),
        "steps": trace.total_steps,
        "values": {name: values(name) for name in ([role] if role else trace.role_names)},
    }


def _output(cls: Any, pictures: list[Tensor], numbers: list[dict[str, Any]]) -> io.NodeOutput:
    """The pictures, shown in the node, and the numbers, in the history under "styleinject"."""
    images = batch(pictures)
    return io.NodeOutput(images, ui={**ui.PreviewImage(images, cls=cls).as_dict(), "styleinject": numbers})
