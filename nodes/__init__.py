"""The ComfyUI nodes of StyleInject: each a schema and a few lines that call the core."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import paths
from .apply import StyleInjectApply, StyleInjectLoadAndApply, StyleInjectStrength
from .demo import StyleInjectDemoDataset, StyleInjectDemoDecode, StyleInjectDemoModel, StyleInjectDemoPrompt
from .load import StyleInjectInfo, StyleInjectLoader
from .router_control import StyleInjectRouterControl, StyleInjectStyleMixer
from .router_plots import (
    StyleInjectRouterCompare,
    StyleInjectRouterHeatmap,
    StyleInjectRouterLayers,
    StyleInjectRouterMap,
    StyleInjectRouterTimeline,
)
from .router_record import StyleInjectLoadRouterTrace, StyleInjectRouterMonitor, StyleInjectRouterTrace
from .router_styles import StyleInjectNameStyles, StyleInjectStyleGrid, StyleInjectStyleSheet
from .train import StyleInjectDistill, StyleInjectDreamBooth, StyleInjectTrain
from .train_options import StyleInjectTrainOptions
from .train_output import StyleInjectLossPlot, StyleInjectSave
from .weights import StyleInjectLayerWeights

NODES: list[type[io.ComfyNode]] = [
    StyleInjectLoadAndApply,
    StyleInjectLoader,
    StyleInjectApply,
    StyleInjectStrength,
    StyleInjectLayerWeights,
    StyleInjectInfo,
    StyleInjectRouterMonitor,
    StyleInjectRouterTrace,
    StyleInjectLoadRouterTrace,
    StyleInjectRouterHeatmap,
    StyleInjectRouterTimeline,
    StyleInjectRouterLayers,
    StyleInjectRouterMap,
    StyleInjectRouterCompare,
    StyleInjectRouterControl,
    StyleInjectStyleMixer,
    StyleInjectStyleGrid,
    StyleInjectStyleSheet,
    StyleInjectNameStyles,
    StyleInjectTrain,
    StyleInjectDreamBooth,
    StyleInjectDistill,
    StyleInjectTrainOptions,
    StyleInjectSave,
    StyleInjectLossPlot,
    StyleInjectDemoModel,
    StyleInjectDemoPrompt,
    StyleInjectDemoDecode,
    StyleInjectDemoDataset,
]


class StyleInjectExtension(ComfyExtension):
    """The pack, as ComfyUI sees it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        paths.register_folder()
        return NODES
