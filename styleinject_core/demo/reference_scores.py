"""What the demo's DEADiff draws, by the shipped classifier, and what leaks from its references: things, and colors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..deadiff import Deadiff
from . import data
from .classifier import load_classifier
from .deadiff import draw, style_words
from .features import trunk_features
from .training import DemoTrainingModel

COLORED = ("twemoji", "noto", "fluent3d")  # styles whose drawings have colors of their own for a thing
_FAR = 0.3  # distance of two mean colors below which nothing can be said of the way between them


def ink(images: Tensor) -> Tensor:
    """The mean color of what is not paper, (N, 3), of images (N, 3, H, W) in [-1, 1]."""
    darkness = (1 - images).amax(1, keepdim=True).clamp(min=1e-4)  # 0 for white
    return (images * darkness).sum((2, 3)) / darkness.sum((2, 3))


@torch.no_grad()
def measure(
    model: DemoTrainingModel, deadiff: Deadiff | None, seed: int = 0, distance: Callable[[Tensor, Tensor], float] | None = None
) -> dict[str, float]:
    """37 held-out things in 5 styles, each drawn with another held-out thing's drawing in that style as its reference.

    Args:
        model: the five-style model.
        deadiff: None measures the model told the style in words: the ceiling.
        distance: of images from the artists' own, (N, 3, 64, 64) each, for the column `distance`.

    Returns:
        Shares that the classifier recognizes, 0 to 1: concept, style, both; concept_leak, taken for the reference's thing.
        color_leak: how far the mean ink color lies on the way from the thing's own drawing to the reference (0: none of
        its colors came along, 1: all), over COLORED and pairs whose colors differ. content_concept and content_style: told
        the style in a word, and the thing by a drawing of it in another style, where there is a content stream.
    """
    classifier, styles, concepts = load_classifier(), data.styles(), data.concepts()
    held = [k for k, concept in enumerate(concepts) if concept.held_out]
    truth, count, names = torch.tensor(held), len(held), [concepts[k].name for k in held]
    drawings = torch.stack([data.images(style)[held] for style in styles])  # (S, N, 3, 64, 64)
    other = torch.arange(count).roll(count // 3)
    result = dict.fromkeys(("concept", "style", "both", "concept_leak", "content_concept", "content_style"), 0.0)
    leaks = []

    def seen(images: Tensor) -> tuple[Tensor, Tensor]:
        concept, style = classifier(images)
        return concept.argmax(1), style.argmax(1)

    def add(place: int, images: Tensor, prefix: str = "") -> None:
        concept, style = seen(images)
        right, in_style = concept == truth, style == place
        shares = {"concept": right, "style": in_style}
        if not prefix:
            shares |= {"both": right & in_style, "concept_leak": concept == truth[other]}
        for key, value in shares.items():
            result[prefix + key] += value.float().mean().item() / len(styles)

    for place, style in enumerate(styles):
        word = style_words()[style]
        prompts = names if deadiff is not None else [f"{word} {name}" for name in names]
        reference = trunk_features(drawings[place][other])
        images = model.decode(draw(model.denoiser, model.text_encoder, prompts, deadiff, reference, seed=seed))
        add(place, images)
        if distance is not None:
            result["distance"] = result.get("distance", 0.0) + distance(images, drawings[place]) / len(styles)
        if style in COLORED:
            own, way = ink(drawings[place]), ink(drawings[place][other]) - ink(drawings[place])
            along = ((ink(images) - own) * way).sum(1) / way.square().sum(1).clamp(min=1e-6)
            leaks.append(along[way.norm(dim=1) > _FAR])
        if deadiff is not None and deadiff.config.content_layers:
            content = trunk_features(drawings[(place + 1) % len(styles)])
            drawn = draw(model.denoiser, model.text_encoder, [word] * count, deadiff, content=content, seed=seed)
            add(place, model.decode(drawn), "content_")
    result["color_leak"] = torch.cat(leaks).mean().item()
    return result


@torch.no_grad()
def measure_new_styles(
    model: DemoTrainingModel, deadiff: Deadiff | None, distance: Callable[[Tensor, Tensor], float], seed: int = 0
) -> dict[str, float]:
    """The distance of 37 held-out things from their drawings in styles that nothing was trained on.

    Args:
        deadiff: each thing is drawn with another one's drawing in the style as its reference; None: without any.
        distance: of images from the artists' own, (N, 3, 64, 64) each.

    Returns:
        A number for each of data.NEW_STYLES.
    """
    names = [concept.name for concept in data.concepts() if concept.held_out]
    other = torch.arange(len(names)).roll(len(names) // 3)
    result = {}
    for style in data.NEW_STYLES:
        drawings = data.new_style_images(style)
        reference = trunk_features(drawings[other])
        images = model.decode(draw(model.denoiser, model.text_encoder, names, deadiff, reference, seed=seed))
        result[style] = distance(images, drawings)
    return result
