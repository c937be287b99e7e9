"""Style cards: tokens as small files, to keep and to share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ...integration.paths import CARD_FILES, CARDS, SUFFIX
from ...styleinject_core.deadiff import StyleCard, Tokens, card_of, load_card, save_card
from ...styleinject_core.deadiff.cards import picture
from ..schema import TokensType, schema


class StyleInjectSaveStyleCard(io.ComfyNode):
    """STYLEINJECT_TOKENS -> a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectSaveStyleCard",
            section="reference",
            display_name="Save Style Card",
            description="Keeps tokens as a small file, with a thumbnail of their reference: a style to use again or to share.",
            search_aliases=["save embeds", "save style", "reference image"],
            inputs=[
                io.String.Input(
                    "filename_prefix", default="style", tooltip=f"Start of the file name, in {CARDS} in the output folder."
                ),
                TokensType.Input("style", optional=True, tooltip="Style tokens."),
                TokensType.Input("content", optional=True, tooltip="Content tokens; both may be on one card."),
                io.Image.Input("image", optional=True, tooltip="The reference, for the thumbnail on the card."),
            ],
            outputs=[io.String.Output("path", display_name="path", tooltip="Where the card was saved.")],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        filename_prefix: str,
        style: Tokens | None = None,
        content: Tokens | None = None,
        image: Tensor | None = None,
    ) -> io.NodeOutput:
        card = card_of([tokens for tokens in (style, content) if tokens is not None], image)
        path = _next_path(filename_prefix)
        save_card(card, path)
        text: Any = f"{described(card)}\nsaved as {path.name}"
        return io.NodeOutput(str(path), ui=ui.PreviewText(text))


class StyleInjectLoadStyleCard(io.ComfyNode):
    """A file -> STYLEINJECT_TOKENS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectLoadStyleCard",
            section="reference",
            display_name="Load Style Card",
            description="Loads tokens that Save Style Card has kept. Neither the reference nor a vision encoder is needed.",
            search_aliases=["load embeds", "load style", "reference image"],
            inputs=[
                io.Combo.Input(
                    "card_name",
                    options=CARD_FILES.names(),
                    tooltip='A card from models/style_cards; those saved here have "output/" before their name. Press R after '
                    "adding files.",
                )
            ],
            outputs=[
                TokensType.Output("style", display_name="style", tooltip="Style tokens, where the card has them."),
                TokensType.Output("content", display_name="content", tooltip="Content tokens, where the card has them."),
                io.Image.Output(
                    "thumbnail", display_name="thumbnail", tooltip="The reference, small; black where there is none."
                ),
                io.String.Output("info", display_name="info", tooltip="What is on the card."),
            ],
        )

    @classmethod
    def validate_inputs(cls, card_name: str | None = None) -> bool | str:
        return CARD_FILES.problem(card_name) or True

    @classmethod
    def fingerprint_inputs(cls, card_name: str) -> str:
        return CARD_FILES.fingerprint(card_name)

    @classmethod
    def execute(cls, card_name: str) -> io.NodeOutput:
        card = load_card(CARD_FILES.path(card_name))
        image = picture(card)
        thumbnail = torch.zeros(1, 64, 64, 3) if image is None else image
        return io.NodeOutput(card.tokens.get("style"), card.tokens.get("content"), thumbnail, described(card))


def described(card: StyleCard) -> str:
    """What is on a card, for people."""
    lines = [tokens.described() for tokens in card.tokens.values()]
    return "\n".join([*lines, *([f"reference {card.reference[:16]}"] if card.reference else [])])


def _next_path(prefix: str) -> Path:
    """The next free name in output/style_cards; never outside of it."""
    name = prefix.replace("\\", "/").rsplit("/", 1)[-1].strip() or "style"
    output = folder_paths.get_output_directory()
    folder, stem, counter, _, _ = folder_paths.get_save_image_path(os.path.join(CARDS, name), output)
    return Path(folder) / f"{stem}_{counter:05}_{SUFFIX}"
