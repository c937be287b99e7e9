"""Steering the style router: rules for Apply StyleInject, by words or by sliders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io, ui

from ...integration.monitor import traces_of
from ...styleinject_core import Adapter
from ...styleinject_core.adapter import no_router
from ...styleinject_core.router.control import ROLES, Rule, parse_styles
from ...styleinject_core.router.trace import TraceError
from ..schema import AdapterType, RouterControlType, TraceType, after_input, percent_inputs, schema

SLIDERS = 16
_FEW = 4  # sliders of a new mixer; with an adapter, it shows as many as that has styles (web/js/style_mixer.js)
_HOLD = ("no", "first step", "trace", "mean")
_STYLES = 'One style a line, by name or number: "flat ink = {0}" or "3 = {0}"; "all = {0}" for every style'


def control_input() -> Any:
    return RouterControlType.Input(
        "control", optional=True, tooltip="Controls that act before this one, from another Router Control or Style Mixer."
    )


def role_input() -> io.Combo.Input:
    return io.Combo.Input("role", options=list(ROLES), default="all", tooltip="For the positive or the negative prompt alone.")


def layers_input() -> io.String.Input:
    return io.String.Input(
        "layers",
        default="all",
        tooltip='Which layers to steer: "all", or groups such as attention, conv, self, cross, down, mid, up, up.1, to_q.',
    )


def control_output() -> Any:
    return RouterControlType.Output("controls", display_name="control", tooltip="For Apply StyleInject.")


class StyleInjectRouterControl(io.ComfyNode):
    """Settings -> STYLEINJECT_ROUTER_CONTROL: one more rule."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectRouterControl",
            section="router",
            display_name="StyleInject Router Control",
            description="Steers the style router of an adapter: sharpen or even out the mix, favor, fix, limit or hold styles.",
            search_aliases=["style router", "style mixer", "temperature"],
            advanced=("bias", "floor", "hold", "role", "layers", "start_percent", "end_percent"),
            inputs=[
                io.Float.Input(
                    "temperature",
                    default=1.0,
                    min=0.01,
                    max=100.0,
                    step=0.05,
                    round=0.001,
                    tooltip="Below 1 the mix gets sharper (fewer styles), above 1 more even. 1 leaves it.",
                ),
                io.Int.Input("top_k", default=0, min=0, max=1024, tooltip="How many styles may be used at once. 0: all."),
                io.String.Input(
                    "weights",
                    default="",
                    multiline=True,
                    tooltip=_STYLES.format("0.7") + ". Replaces the router's own mix; normalized.",
                ),
                io.String.Input(
                    "bias",
                    default="",
                    multiline=True,
                    tooltip=_STYLES.format("2") + ". Added to the router's logits: 2 makes a style about 7 times as likely.",
                ),
                io.String.Input(
                    "floor", default="", multiline=True, tooltip=_STYLES.format("0.05") + ". No style gets less than its floor."
                ),
                io.Combo.Input(
                    "hold",
                    options=list(_HOLD),
                    default=_HOLD[0],
                    tooltip="Keep the mix of the first step of each run, of a trace at the same noise level, or the mean over "
                    "training, which is best for things that the adapter was not trained on.",
                ),
                role_input(),
                layers_input(),
                *percent_inputs("the control"),
                TraceType.Input("trace", optional=True, tooltip="The trace to hold to, where hold says so."),
                after_input(),
                control_input(),
            ],
            outputs=[control_output()],
        )

    @classmethod
    def execute(
        cls,
        temperature: float,
        top_k: int,
        weights: str,
        bias: str,
        floor: str,
        hold: str,
        role: str,
        layers: str,
        start_percent: float,
        end_percent: float,
        trace: Any = None,
        after: Any = None,
        control: Sequence[Rule] = (),
    ) -> io.NodeOutput:
        if hold == "trace" and trace is None:
            raise TraceError('hold is "trace": connect a trace, from Load Router Trace or Keep Router Trace')
        rule = Rule(
            weights=parse_styles(weights),
            bias=parse_styles(bias),
            floor=parse_styles(floor),
            temperature=temperature,
            top_k=top_k,
            hold_first=hold == "first step",
            hold_mean=hold == "mean",
            hold=traces_of(trace, after) if hold == "trace" else None,
            layers=layers,
            role=role,
            start_percent=start_percent,
            end_percent=end_percent,
        )
        return io.NodeOutput((*(control or ()), rule))


class StyleInjectStyleMixer(io.ComfyNode):
    """Sliders -> STYLEINJECT_ROUTER_CONTROL that replaces the router's mix."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectStyleMixer",
            section="router",
            display_name="StyleInject Style Mixer",
            description="Mixes an adapter's styles by hand, one slider each, instead of its router. All at 0: no change.",
            search_aliases=["style router", "style weights", "sliders"],
            advanced=(*(f"style_{k}" for k in range(_FEW + 1, SLIDERS + 1)), "role", "layers"),
            inputs=[
                *(
                    io.Float.Input(
                        f"style_{k}",
                        default=0.0,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        round=0.001,
                        display_mode=io.NumberDisplay.slider,
                        tooltip=f"How much of style {k}; only the shares count. Connect `adapter` to see the styles' names.",
                    )
                    for k in range(1, SLIDERS + 1)
                ),
                role_input(),
                layers_input(),
                AdapterType.Input("adapter", optional=True, tooltip="The adapter, for the names of its styles."),
                control_input(),
            ],
            outputs=[control_output()],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, role: str, layers: str, adapter: Adapter | None = None, control: Sequence[Rule] = (), **sliders: float
    ) -> io.NodeOutput:
        if adapter is not None and not adapter.routed:
            raise ValueError(no_router(adapter, "mix"))
        shares = {name.removeprefix("style_"): value for name, value in sliders.items() if value > 0}
        names = adapter.style_names if adapter is not None else ()
        total = sum(shares.values())
        lines = [f"{value / total:4.0%}  {_name(names, int(k))}" for k, value in shares.items()]
        rules = (Rule(weights=shares, role=role, layers=layers),) if shares else ()
        text: Any = "\n".join(lines) or "all sliders at 0: the router decides"
        return io.NodeOutput(
            (*(control or ()), *rules), ui={**ui.PreviewText(text).as_dict(), "styleinject_styles": list(names)}
        )


def _name(names: Sequence[str], number: int) -> str:
    return names[number - 1] if number <= len(names) else f"style {number}"
