"""The ComfyUI nodes of StyleInject: each a schema and a few lines that call the core."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..integration import paths, saving, style_names
from .adapter.apply import StyleInjectApply, StyleInjectLoadAndApply, StyleInjectStrength
from .adapter.layer_weights import StyleInjectLayerWeights
from .adapter.load import StyleInjectInfo, StyleInjectLoader
from .demo.dataset import StyleInjectDemoDataset
from .demo.emoji import StyleInjectDemoDecode, StyleInjectDemoModel, StyleInjectDemoPrompt
from .reference.apply import StyleInjectApplyDeadiff, StyleInjectReference
from .reference.cards import StyleInjectLoadStyleCard, StyleInjectSaveStyleCard
from .reference.encode import StyleInjectEncodeReference, StyleInjectLoadDeadiff, StyleInjectMixTokens
from .router.control import StyleInjectRouterControl, StyleInjectStyleMixer
from .router.plots import (
    StyleInjectRouterCompare,
    StyleInjectRouterHeatmap,
    StyleInjectRouterLayers,
    StyleInjectRouterMap,
    StyleInjectRouterTimeline,
)
from .router.record import StyleInjectLoadRouterTrace, StyleInjectRouterMonitor, StyleInjectRouterTrace
from .router.styles import StyleInjectNameStyles, StyleInjectStyleGrid, StyleInjectStyleSheet
from .train.options import StyleInjectTrainOptions
from .train.output import StyleInjectLossPlot, StyleInjectSave
from .train.pictures import StyleInjectPictures, StyleInjectPrompts
from .train.trainers import StyleInjectDistill, StyleInjectDreamBooth, StyleInjectTrain

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
    StyleInjectReference,
    StyleInjectLoadDeadiff,
    StyleInjectEncodeReference,
    StyleInjectMixTokens,
    StyleInjectApplyDeadiff,
    StyleInjectSaveStyleCard,
    StyleInjectLoadStyleCard,
    StyleInjectPictures,
    StyleInjectPrompts,
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
        saving.watch()
        style_names.serve()
        return NODES
