"""The demo's DEADiff: it draws in the style of its reference, not with its colors, and the command writes the grid."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from styleinject_core.cli import main
from styleinject_core.demo import data, references
from styleinject_core.demo.deadiff import DEMO_CONFIG, draw, five_style_training, load_emoji_deadiff, style_words
from styleinject_core.demo.features import demo_features, trunk_features
from styleinject_core.demo.reference_scores import ink

pytest.importorskip("diffusers")
NAMES = ("turtle", "pizza", "snowman", "rocket", "cat face", "red heart")


@pytest.fixture(scope="module")
def model():
    return five_style_training()


@pytest.fixture(scope="module")
def deadiff():
    return load_emoji_deadiff()


def saturation(images):
    """How colored drawings are, 0 to 2: largest minus smallest channel, averaged over the ink."""
    darkness = (1 - images).amax(1).clamp(min=1e-4)
    return (((images.amax(1) - images.amin(1)) * darkness).sum((1, 2)) / darkness.sum((1, 2))).mean().item()


def test_sizes(deadiff):
    assert deadiff.config == DEMO_CONFIG
    assert deadiff.counts()["i_to"] == 270_336
    assert [site.stream for site in DEMO_CONFIG.sites] == ["style", *["content"] * 3, *["style"] * 3]
    assert set(style_words()) == set(data.styles())


def test_features_of_any_picture(deadiff):
    drawing = data.images("noto")[:1]
    features = demo_features((drawing.movedim(1, -1) + 1) / 2)
    torch.testing.assert_close(features, trunk_features(drawing), atol=1e-5, rtol=1e-5)
    assert demo_features(torch.rand(2, 100, 30, 3)).shape == (2, 64, 128)
    white = demo_features(torch.rand(1, 64, 64, 3), torch.ones(1, 64, 64) * 1e-9)
    torch.testing.assert_close(white, trunk_features(torch.ones(1, 3, 64, 64)), atol=1e-4, rtol=1e-4)


def test_new_styles_draw_the_held_out_things_alone():
    held = [k for k, concept in enumerate(data.concepts()) if concept.held_out]
    for style in data.NEW_STYLES:
        drawings = data.new_style_images(style)
        assert drawings.shape == (len(held), 3, 64, 64) and style in data.LICENSES and style not in data.styles()
        ink_share = (drawings.amin(1) < 0.5).float().mean((1, 2))
        assert ink_share.min() > 0.05, "a tile without a drawing"
        with pytest.raises(ValueError, match="expected one of twemoji"):
            data.images(style)
    assert saturation(data.new_style_images("fluent-high-contrast")) < 0.02 < saturation(data.new_style_images("fluent-flat"))
    rows = references.references()
    assert [label for label, _ in rows] == [*data.styles(), *(f"{style} *" for style in data.NEW_STYLES)]
    assert all(picture.shape == (1, 3, 64, 64) for _, picture in rows)


def test_a_reference_says_the_style_and_not_the_color(model, deadiff):
    """The same prompts and noise beside a line drawing and beside a colored one; nothing of either's thing."""
    held = [k for k, concept in enumerate(data.concepts()) if concept.held_out][: len(NAMES)]
    drawn = {}
    for style in ("openmoji-line", "twemoji"):
        features = trunk_features(data.images(style)[held])
        drawn[style] = model.decode(draw(model.denoiser, model.text_encoder, NAMES, deadiff, features))
    assert saturation(drawn["openmoji-line"]) < 0.4 * saturation(drawn["twemoji"])


def test_ink_is_the_color_of_what_is_drawn():
    image = torch.ones(1, 3, 8, 8)
    image[0, :, 2:4, 2:4] = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1)
    torch.testing.assert_close(ink(image), torch.tensor([[1.0, -1.0, -1.0]]), atol=0.01, rtol=0)


def test_the_command_writes_the_grid(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(references, "draw", lambda *args, seed, **_: torch.zeros(len(args[2]), 16, 8, 8))
    monkeypatch.setattr(references, "measure", lambda *_: dict.fromkeys(("concept", "style", "both", "color_leak"), 0.5))
    Image.effect_noise((70, 40), 80).save(tmp_path / "mine.png")
    assert main(["demo", "--out", str(tmp_path / "out"), "--reference", str(tmp_path / "mine.png")]) == 0
    with Image.open(tmp_path / "out" / "references.png") as grid:
        assert grid.width > 600
    text = capsys.readouterr().out
    assert "shown a picture" in text and "50%" in text
    assert main(["demo", "--out", str(tmp_path / "out"), "--reference", str(tmp_path / "none.png")]) == 1
    assert "none.png" in capsys.readouterr().err
