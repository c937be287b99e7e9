"""What a training is asked for: the same from a config file and from a node, with one set of defaults."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from styleinject_core.train.data.drawn import draw_once, kept_latents
from styleinject_core.train.request import AdapterRequest, TrainingRequest, check_name
from styleinject_core.train.settings import TrainSettings

HOST = nn.ModuleDict({"to_q": nn.Linear(4, 6), "to_v": nn.Linear(4, 6), "to_k": nn.Linear(4, 6)})


def request(**values) -> TrainingRequest:
    return TrainingRequest(name="ink", adapter=AdapterRequest(rank=2, styles=3), **values)


def test_the_split_is_of_the_seed_and_leaves_no_image_out():
    trained_on, held_out = request(held_out=3, settings=TrainSettings(seed=5)).split(10)
    assert len(held_out) == 3 and sorted([*trained_on, *held_out]) == list(range(10))
    assert trained_on == sorted(trained_on) and held_out == sorted(held_out)
    assert request(held_out=3, settings=TrainSettings(seed=5)).split(10) == (trained_on, held_out)
    assert request(held_out=3, settings=TrainSettings(seed=6)).split(10) != (trained_on, held_out)
    assert request().split(4) == ([0, 1, 2, 3], [])


@pytest.mark.parametrize("count", [3, 2, 0])
def test_a_split_leaves_images_to_train_on(count):
    with pytest.raises(ValueError, match=f"data.validation: 3 of {count} images leave none to train on"):
        request(held_out=3).split(count, "data.validation")


def test_a_new_adapter_is_of_the_seed_and_leaves_random_numbers_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, again = (request(settings=TrainSettings(seed=2)).new_adapter(HOST).state_dict() for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    other = request(settings=TrainSettings(seed=3)).new_adapter(HOST).state_dict()
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("method", ["styleinject", "lora", "dma-only", "sta-only"])
def test_methods_are_configs(method):
    config = AdapterRequest(method=method, rank=2, styles=3, router_pool="sum", sta="additive").config()
    assert config.n_styles == (1 if method in ("lora", "sta-only") else 3)
    assert config.sta == ("none" if method in ("lora", "dma-only") else "additive")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "dora"}, "method: expected one of styleinject, lora, kronecker, dma-only, sta-only, found 'dora'"),
        ({"rank": -1}, "r: expected an integer of at least 1, found -1"),
    ],
)
def test_what_no_adapter_can_be(values, message):
    with pytest.raises(ValueError, match=message):
        AdapterRequest(**values)


def test_an_unknown_dtype():
    with pytest.raises(ValueError, match="dtype: expected one of float32, bfloat16, float16, found 'float8'"):
        request(dtype="float8")


def drawings(start: int, stop: int) -> torch.Tensor:
    return torch.stack([torch.full((2, 3), float(k)) for k in range(start, stop)])


def test_images_are_drawn_once_and_gone_on_with_after_an_interrupt(tmp_path):
    path, calls = tmp_path / "new" / "x.latents", []

    def draw(start: int, stop: int) -> torch.Tensor:
        calls.append((start, stop))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return drawings(start, stop)

    with pytest.raises(KeyboardInterrupt):
        draw_once(path, 7, draw, at_once=2)
    assert len(kept_latents(path)) == 4
    told: list[int] = []
    latents = draw_once(path, 7, draw, at_once=2, progress=told.append)
    assert calls == [(0, 2), (2, 4), (4, 6), (4, 6), (6, 7)] and told == [4, 6, 7]
    assert torch.equal(torch.stack(latents), drawings(0, 7))
    assert torch.equal(torch.stack(draw_once(path, 7, lambda *_: pytest.fail("it draws"))), drawings(0, 7))


def test_images_that_cannot_be_kept(tmp_path):
    (tmp_path / "file").write_text("no folder")
    path, told = tmp_path / "file" / "x.latents", []
    assert len(draw_once(path, 2, drawings, problem=told.append)) == 2
    assert len(told) == 1 and "images drawn for training are not kept" in told[0]
    with pytest.raises(OSError, match="file"):
        draw_once(path, 2, drawings)


def test_a_damaged_file_of_drawn_images_is_drawn_anew(tmp_path):
    (tmp_path / "x.latents").write_bytes(b"no safetensors")
    assert len(draw_once(tmp_path / "x.latents", 3, drawings)) == 3 == len(kept_latents(tmp_path / "x.latents"))


@pytest.mark.parametrize("name", [
    "", " ", ".", "..", "a.", "a. .", "a/b", "a\\b", "a\nb", "a:b", "a\x7f", "a\x85b", "a\ud800", ".hidden", "best", "BEST ", "step-5",
    "Step-000005", "drawn", "con", "NUL", "nul.v2", "aux.x.y", "COM1", "lpt\u00b2", "CONIN$", "con .x", "best.safetensors", ".safetensors",
])  # fmt: skip
def test_names_that_no_run_may_have(name):
    with pytest.raises(ValueError, match="^name: "):
        check_name(name)


@pytest.mark.parametrize(("name", "found"), [
    (" ink ", "ink"), ("ink.safetensors", "ink"), ("ink.SafeTensors ", "ink"), ("v1.5 ink", "v1.5 ink"), ("console", "console"),
    ("step-5 best", "step-5 best"), ("caf\u00e9", "caf\u00e9"), ("comic1", "comic1"),
])  # fmt: skip
def test_names_of_runs(name, found):
    assert check_name(name) == found


def test_drawn_images_with_one_changed_bit_are_drawn_anew(tmp_path):
    drawn = []

    def draw(start, stop):
        drawn.append(start)
        return torch.full((stop - start, 4, 2, 2), float(start))

    path = tmp_path / "images.latents"
    first = draw_once(path, 3, draw)
    content = bytearray(path.read_bytes())
    content[-2] ^= 64
    path.write_bytes(content)
    assert kept_latents(path) == []
    again = draw_once(path, 3, draw)
    assert drawn == [0, 1, 2] * 2 and all(map(torch.equal, first, again)) and len(kept_latents(path)) == 3
