"""Finding out what each style of an adapter means, and giving it a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io, ui

from ...integration import paths
from ...integration.patcher import ModelPatcher, apply_adapter
from ...styleinject_core import Adapter, load_adapter, save_adapter
from ...styleinject_core.router.canvas import contact_sheet
from ...styleinject_core.router.control import Rule
from ..schema import AdapterType, schema, strength_input


class StyleInjectStyleGrid(io.ComfyNode):
    """MODEL and adapter -> a list of MODELs, one for each style alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectStyleGrid",
            section="router",
            display_name="StyleInject Style Grid",
            description="Applies an adapter once for each of its styles, with that style alone; the sampler runs for each.",
            search_aliases=["style router", "XY plot", "grid"],
            inputs=[
                io.Model.Input("model", tooltip="The model to restyle. It is not changed itself."),
                AdapterType.Input("adapter", tooltip="The adapter, from Load StyleInject Adapter."),
                strength_input("How much of the style: 0 is the model alone, 1 the adapter as trained."),
                io.Boolean.Input(
                    "with_router", default=True, tooltip="Start with one that the router itself steers, for comparison."
                ),
            ],
            outputs=[
                io.Model.Output(
                    "MODEL", display_name="MODEL", is_output_list=True, tooltip="A list of models, for the KSampler."
                ),
                io.String.Output(
                    "labels",
                    display_name="labels",
                    is_output_list=True,
                    tooltip="The style of each, for Style Sheet or an XY node.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, adapter: Adapter, strength: float, with_router: bool) -> io.NodeOutput:
        controls: list[tuple[str, tuple[Rule, ...]]] = [("router", ())] if with_router else []
        controls += [(name, (Rule(weights={str(k): 1.0}),)) for k, name in enumerate(adapter.style_names, 1)]
        models = [apply_adapter(model, adapter, strength=strength, control=control)[0] for _, control in controls]
        return io.NodeOutput(models, [label for label, _ in controls])


class StyleInjectStyleSheet(io.ComfyNode):
    """A list of images and their labels -> one labeled picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectStyleSheet",
            section="router",
            display_name="StyleInject Style Sheet",
            description="Puts images with their labels on one sheet, as they come from Style Grid, sampler and decoder.",
            search_aliases=["contact sheet", "grid", "XY plot"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="The decoded images, in the order of the labels."),
                io.String.Input("labels", force_input=True, tooltip="From StyleInject Style Grid."),
                io.String.Input("title", default="", tooltip="A title above the images."),
                io.Int.Input(
                    "columns", default=0, min=0, max=64, tooltip="Images in a row. 0: as many as make the sheet square."
                ),
            ],
            outputs=[io.Image.Output("IMAGE", display_name="IMAGE", tooltip="The sheet.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images: list[Any], labels: list[str], title: list[str], columns: list[int]) -> io.NodeOutput:
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images for {len(labels)} labels: connect both to the same Style Grid")
        named = [(label, image) for label, batch in zip(labels, images, strict=True) for image in batch]
        sheet = contact_sheet(named, title[0], columns[0]).unsqueeze(0)
        return io.NodeOutput(sheet, ui=ui.PreviewImage(sheet, cls=cls))


class StyleInjectNameStyles(io.ComfyNode):
    """Adapter -> the same adapter with names for its styles, saved if wanted."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectNameStyles",
            section="router",
            display_name="Name StyleInject Styles",
            description="Gives the styles of an adapter names, for every plot, slider and control, and saves them with it.",
            search_aliases=["style router", "rename", "metadata"],
            inputs=[
                AdapterType.Input("adapter", tooltip="The adapter, from Load StyleInject Adapter."),
                io.String.Input(
                    "names",
                    default="",
                    multiline=True,
                    tooltip="One name per line, in order; an empty line leaves a style unnamed.",
                ),
                io.String.Input(
                    "save_as",
                    default="",
                    tooltip="A new file in models/styleinject to save the adapter to. Files are never replaced. Empty: "
                    "it is not saved.",
                ),
            ],
            outputs=[
                AdapterType.Output(
                    "named", display_name="adapter", tooltip="The adapter with the names, for Apply StyleInject."
                )
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, adapter: Adapter, names: str, save_as: str) -> io.NodeOutput:
        named = adapter.with_style_names(names.splitlines()) if names.strip() else adapter
        lines = [f"{k}  {name}" for k, name in enumerate(named.style_names, 1)]
        if save_as.strip():
            path = _file(save_as.strip())
            if not path.exists():
                save_adapter(named, path)
            elif not _is_saved(named, path):
                raise FileExistsError(f"{path.name} is in {path.parent} already: choose another name")
            lines.append(f"saved as {path.name}")
        text: Any = "\n".join(lines)
        return io.NodeOutput(named, ui=ui.PreviewText(text))


def _file(name: str) -> Path:
    """A file in the first models/styleinject folder. Raises ValueError."""
    if Path(name).name != name or "\\" in name or name.startswith("."):
        raise ValueError(f"save_as is {name!r}: expected a plain file name, without folders")
    return Path(folder_paths.get_folder_paths(paths.FOLDER)[0]) / (name.removesuffix(paths.SUFFIX) + paths.SUFFIX)


def _is_saved(adapter: Adapter, path: Path) -> bool:
    """Whether a file holds this adapter with these names already: the node ran before."""
    saved = load_adapter(path)
    mine, theirs = adapter.state_dict(), saved.state_dict()
    return (
        saved.style_names == adapter.style_names
        and mine.keys() == theirs.keys()
        and all(torch.equal(value, theirs[name].to(value)) for name, value in mine.items())
    )
