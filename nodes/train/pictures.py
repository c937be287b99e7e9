"""What a training is given: pictures with their captions from a folder, and prompts to look at its result with."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ...integration.training import pictures
from ..schema import schema


class StyleInjectPictures(io.ComfyNode):
    """A folder in ComfyUI's input folder -> its pictures and a caption for each."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectPictures",
            section="train",
            display_name="Pictures from a Folder",
            description="Reads the pictures of a folder and their captions, for Train StyleInject: upright, on white where "
            "they are transparent, in sRGB, cut to sizes that a model can learn from.",
            search_aliases=["load images from folder", "training data", "dataset", "captions", "styleinject pictures"],
            advanced=("keep_shape",),
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=pictures.folder_names(),
                    tooltip="A folder with pictures in ComfyUI's input folder; the samples come with this pack. Press R after "
                    "adding one.",
                ),
                io.Combo.Input(
                    "captions",
                    options=list(pictures.CAPTIONS),
                    default=pictures.FROM_FILES,
                    tooltip='What each picture shows, in words. "from files": NAME.txt beside NAME.png, or one metadata.jsonl. '
                    '"one caption for all": the text below. "trigger word alone": nothing but that.',
                ),
                io.String.Input(
                    "caption",
                    default="",
                    multiline=True,
                    tooltip='For "one caption for all": what is in the pictures, and not how they are drawn.',
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    tooltip="A word that no other prompt has, such as inkbrush7. It is put before each caption, and calls the "
                    "style in prompts later. Empty: the style is there whenever the adapter is.",
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=64,
                    max=2048,
                    step=64,
                    tooltip="Side of a square picture in pixels: 512 for Stable Diffusion 1.x, 1024 for SDXL and Z-Image (768 "
                    "saves memory), 64 for the demo model. Others have about as many pixels.",
                ),
                io.Boolean.Input(
                    "keep_shape",
                    default=True,
                    tooltip="Wide pictures stay wide and tall ones tall. Off: all are cut square, and fit one batch.",
                ),
                io.Combo.Input(
                    "subfolders",
                    options=list(pictures.SUBFOLDERS),
                    default=pictures.SUBFOLDERS[0],
                    optional=True,
                    tooltip='What folders inside it are. "more pictures": nothing else. "a style each": several styles for one '
                    "adapter; a folder's name is put before its captions, and goes to image_styles of Train StyleInject.",
                ),
                io.Image.Input(
                    "images", optional=True, tooltip="Pictures to use in place of the folder's; they need a caption for all."
                ),
            ],
            outputs=[
                io.Image.Output(
                    "pictures", display_name="images", is_output_list=True, tooltip="The pictures one by one, for VAE Encode."
                ),
                io.String.Output(
                    "texts", display_name="captions", is_output_list=True, tooltip="A caption for each, for CLIP Text Encode."
                ),
                io.String.Output(
                    "word", display_name="trigger", tooltip="The trigger word, for the training node to save with the adapter."
                ),
                io.String.Output(
                    "styles",
                    display_name="image_styles",
                    is_output_list=True,
                    tooltip='The style of each picture, where subfolders is "a style each", for Train StyleInject; else empty.',
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, folder: str | None = None) -> bool | str:
        return pictures.problem(folder) or True

    @classmethod
    def fingerprint_inputs(cls, folder: str, **_others: object) -> str:
        return pictures.fingerprint(folder)

    @classmethod
    def execute(cls, folder: str, images: Any = None, **how: Any) -> io.NodeOutput:
        found = pictures.from_folder(folder, **how) if images is None else pictures.from_images(images, **how)
        return io.NodeOutput(
            found.images, found.captions, how["trigger"].strip(), found.styles, ui=ui.PreviewText(found.report)
        )


class StyleInjectPrompts(io.ComfyNode):
    """Lines of text -> a list of prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectPrompts",
            section="train",
            display_name="Prompts, One per Line",
            description="Makes a list of prompts: nodes behind it run once for each, to see a style on several things at once.",
            search_aliases=["prompt list", "batch prompts", "styleinject prompts", "text lines"],
            inputs=[
                io.String.Input("text", default="", multiline=True, tooltip="One prompt per line; empty lines do not count."),
                io.String.Input(
                    "before", default="", tooltip="Put before each prompt, with a comma: the trigger word, for example."
                ),
            ],
            outputs=[
                io.String.Output(
                    "prompts", display_name="prompts", is_output_list=True, tooltip="The prompts, for CLIP Text Encode."
                ),
                io.String.Output(
                    "labels",
                    display_name="labels",
                    is_output_list=True,
                    tooltip="The lines without the prefix, for Style Sheet.",
                ),
            ],
        )

    @classmethod
    def execute(cls, text: str, before: str) -> io.NodeOutput:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise ValueError("text: no prompts; write one per line")
        word = before.strip()
        return io.NodeOutput([f"{word}, {line}" if word else line for line in lines], lines)
