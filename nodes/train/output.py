"""What comes after training: saving the adapter with its metadata, and the loss as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io, ui

from ...integration import paths
from ...integration.training.named_runs import LossHistory
from ...styleinject_core import Adapter
from ...styleinject_core.files import save_adapter
from ...styleinject_core.train.request import DTYPES, TrainingRequest
from ...styleinject_core.train.run.watch import figure_pixels, loss_figure, running_mean
from ..schema import AdapterType, LossType, schema


class StyleInjectSave(io.ComfyNode):
    """STYLEINJECT_ADAPTER -> a file in output/styleinject."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectSave",
            section="train",
            display_name="StyleInject Save",
            description="Saves an adapter in output/styleinject, where the loader finds it. Nothing is overwritten: a number "
            "is added to the name.",
            search_aliases=["save adapter", "save lora"],
            advanced=("dtype", "author", "description", "license"),
            inputs=[
                AdapterType.Input("adapter", tooltip="The adapter to save."),
                io.String.Input(
                    "filename_prefix",
                    default="my_style",
                    tooltip="Start of the file name; a / makes a folder, as in emoji/my_style.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES[::-1]),
                    default=TrainingRequest.dtype,
                    tooltip="Number format of the file. float16 is half the size of float32, and as good in use.",
                ),
                io.String.Input("title", default="", tooltip="A name for people to read; empty for the file name."),
                io.String.Input("author", default="", tooltip="Who made it."),
                io.String.Input(
                    "trigger_phrase", default="", tooltip="The words that call the style or the subject in a prompt."
                ),
                io.String.Input("description", default="", multiline=True, tooltip="What it does, in a sentence or two."),
                io.String.Input("license", default="", tooltip="Its license, by SPDX name, such as CC-BY-4.0."),
            ],
            outputs=[
                io.String.Output(
                    "adapter_name", display_name="adapter_name", tooltip="The name by which Load StyleInject Adapter lists it."
                )
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, adapter: Adapter, filename_prefix: str, dtype: str, **about: str) -> io.NodeOutput:
        root = paths.trained_folder()
        folder, stem, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, str(root))
        while (path := Path(folder) / f"{stem}_{counter:05}_.safetensors").exists():
            counter += 1
        metadata = {"modelspec.title": path.stem}
        metadata |= {f"modelspec.{field}": text.strip() for field, text in about.items() if text.strip()}
        save_adapter(adapter, path, metadata, getattr(torch, dtype))
        name = path.relative_to(root).as_posix()
        return io.NodeOutput(f"output/{name}", ui=ui.PreviewText(f"Saved as output/{paths.TRAINED}/{name}"))


class StyleInjectLossPlot(io.ComfyNode):
    """STYLEINJECT_LOSS -> IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectLossPlot",
            section="train",
            display_name="StyleInject Loss Plot",
            description="The loss of a training as a picture. A single step says little: look at the running mean.",
            search_aliases=["loss graph", "training curve"],
            inputs=[LossType.Input("losses", tooltip="From a StyleInject training node.")],
            outputs=[
                io.Image.Output("IMAGE", display_name="IMAGE", tooltip="Loss by step, its running mean, validation losses.")
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, losses: LossHistory) -> io.NodeOutput:
        pixels = figure_pixels(loss_figure(losses.title, losses.losses, losses.validation))
        image = (pixels.float() / 255).unsqueeze(0)  # (1, H, W, 3)
        means = running_mean(losses.losses)
        text = f"{losses.title}: {len(means)} steps, loss {means[0]:.4f} at the start, {means[-1]:.4f} at the end"
        if losses.validation:
            step, value = min(losses.validation, key=lambda entry: entry[1])
            text += f", best validation {value:.4f} at step {step}"
        preview: dict[str, Any] = {**ui.PreviewImage(image, cls=cls).as_dict(), "text": (text,)}
        return io.NodeOutput(image, ui=preview)
