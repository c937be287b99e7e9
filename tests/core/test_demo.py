"""The embedded model: its data, that it draws what it is asked for, and the demo command's pieces."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("diffusers")

from styleinject_core import load_adapter
from styleinject_core.demo import data, pictures, show, styles
from styleinject_core.demo.classifier import load_classifier, recognized
from styleinject_core.demo.deadiff import BASE_FILE as FIVE_STYLES_FILE
from styleinject_core.demo.model import load_text_encoder
from styleinject_core.hosts.architectures import ARCHITECTURES, architecture_of


@pytest.fixture(scope="module")
def model():
    return styles.DemoModel()


def test_data_is_whole():
    concepts = data.concepts()
    assert len(concepts) >= 200
    assert len({c.name for c in concepts}) == len(concepts)
    assert 0.1 < sum(c.held_out for c in concepts) / len(concepts) < 0.25
    for style in data.styles():
        images = data.images(style)
        assert images.shape == (len(concepts), 3, 64, 64)
        assert images.amin() >= -1
        assert images.amax() <= 1
        assert (images.flatten(1).std(1) > 0.05).all(), f"{style}: an empty tile"
        assert data.LICENSES[style]
    with pytest.raises(ValueError, match="demo style 'apple': expected one of twemoji"):
        data.images("apple")


def test_drawings_by_name_and_evenly():
    named = data.drawings(["noto", "twemoji"], "turtle, Owl")
    assert [name for _, name, _ in named] == ["turtle", "turtle", "owl", "owl"] and not torch.equal(named[0][0], named[1][0])
    assert [style for *_, style in named] == ["noto", "twemoji"] * 2
    assert torch.equal(named[1][0], data.images("twemoji")[[concept.name for concept in data.concepts()].index("turtle")])
    everything = data.drawings(["noto"])
    assert len(everything) == sum(not concept.held_out for concept in data.concepts())
    some = data.drawings(["noto"], count=7)
    assert [name for _, name, _ in some] == [everything[k * len(everything) // 7][1] for k in range(7)]
    with pytest.raises(ValueError, match="there is no drawing of 'sheriff'"):
        data.drawings(["noto"], "owl, sheriff")


def test_the_base_model_draws_its_concepts(model):
    """Not a quality bar: far above chance (1 in 223), which a broken file, sampler or text encoder is not."""
    chosen = list(range(0, len(data.concepts()), 15))
    names = [data.concepts()[k].name for k in chosen]
    images = show._images(model, None, names, seed=0)
    concept, in_style, _ = recognized(load_classifier(), images, chosen, data.BASE_STYLE)
    assert concept > 0.5
    assert in_style > 0.5


def test_unknown_words_are_left_out(model):
    assert model.text_encoder.unknown_words("A Zyzzyva cat") == ["a", "zyzzyva"]
    assert torch.equal(model.text_encoder(["zyzzyva cat face"]), model.text_encoder(["Cat face!"]))


def test_the_text_encoder_knows_a_word_for_each_style(model):
    words = [data.STYLE_WORDS[style] for style in styles.learned(styles.ALL)]
    assert len(set(words)) == 4 and model.text_encoder.unknown_words(" ".join(words)) == []
    assert not set(words) & {word for concept in data.concepts() for word in concept.name.split()}
    drawn = show._images(model, None, [f"{word} cat face" for word in words], seed=0)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    of_five_styles = load_text_encoder(FIVE_STYLES_FILE)  # which was trained with the same words, and has its own rows
    assert of_five_styles.vocabulary.count("flat") == 1


def test_one_adapter_of_all_styles_draws_each_by_its_word(model):
    """Not a quality bar: far above chance, and above what is drawn with the word of another style."""
    adapter, classifier = load_adapter(styles.adapter_path(styles.ALL)), load_classifier()
    chosen = [k for k, concept in enumerate(data.concepts()) if not concept.held_out][::18]
    names, of = [data.concepts()[k].name for k in chosen], styles.learned(styles.ALL)
    assert list(adapter.style_names) == [data.STYLE_WORDS[style] for style in of]
    found = {}
    for asked in of:
        images = show._images(model, adapter, styles.prompts(asked, names, called=True), seed=0)
        found[asked] = {style: recognized(classifier, images, chosen, style) for style in of}
    for style in of:
        others = [found[asked][style][1] for asked in of if asked != style]
        assert found[style][style][1] > max(others), f"{style}: {found}"
    assert sum(found[style][style][2] for style in of) / len(of) > 0.4


def test_an_adapter_of_all_styles_learns_which_drawing_is_of_which(model, tmp_path):
    adapter = show._train(model, tmp_path, styles.ALL, 2, seed=0)
    assert adapter.style_names == ("flat", "shaded", "lineart", "rendered")
    assert all(layer.config.router_input == "prompt" for layer in adapter.layers.values())
    assert adapter.metadata["modelspec.license"] == "CC-BY-SA-4.0"
    lora = styles.new_adapter(styles.ALL, "lora")  # which has no styles to be given
    assert len(styles.train_style(model, lora, styles.ALL, steps=1, batch=2)) == 1


@pytest.mark.parametrize("style", [*data.STYLE_WORDS, styles.ALL])
def test_shipped_adapters(style):
    ours, lora = load_adapter(styles.adapter_path(style)), load_adapter(styles.adapter_path(style, "lora"))
    assert architecture_of(ours) is ARCHITECTURES["demo"]
    assert int(ours.metadata["styleinject.steps"]) == int(lora.metadata["styleinject.steps"])
    assert 0.9 < ours.parameter_count() / lora.parameter_count() < 1.1
    assert ours.metadata["modelspec.license"] == lora.metadata["modelspec.license"] == styles.license_of(style)


def test_training_and_drawing_write_their_files(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(show, "SHOWN", 1)
    adapter = show._train(model, tmp_path, "noto", 2, seed=0)
    assert adapter.metadata["styleinject.steps"] == "2"
    assert all("forward" not in m.__dict__ for m in model.unet.modules())
    show._draw(model, tmp_path, adapter, "noto", seed=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "noto.safetensors", "router.png", "strengths.png"]
    for picture in tmp_path.glob("*.png"):
        assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "loss.png" in capsys.readouterr().out


def test_strength_zero_draws_the_base_model_bit_for_bit(model):
    adapter = load_adapter(styles.adapter_path("noto"))
    base = show._images(model, None, ["cat face"], seed=3)
    assert torch.equal(show._images(model, adapter, ["cat face"], 3, strength=0.0), base)
    assert not torch.allclose(show._images(model, adapter, ["cat face"], 3, strength=1.0), base)


def test_an_image_does_not_depend_on_the_others_in_its_batch(model):
    alone = show._images(model, None, ["cat face"], seed=5)
    beside = show._images(model, None, ["cat face", "red apple"], seed=5)
    torch.testing.assert_close(alone[0], beside[0], rtol=1e-3, atol=1e-3)


def test_router_picture(tmp_path):
    pictures.router_over_steps(
        tmp_path / "r.png", "t", torch.softmax(torch.randn(3, 10, 4), -1), ["down", "mid", "up"], list("abcd")
    )
    assert (tmp_path / "r.png").stat().st_size > 5000
