"""DEADiff's files: the converter on a checkpoint with the real one's keys and shapes, the slim file, style cards."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import deadiff_models as models
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from styleinject_core import deadiff
from styleinject_core.cli import main
from styleinject_core.deadiff import (
    DeadiffFileError,
    Tokens,
    TokensError,
    card_of,
    load_card,
    load_deadiff,
    load_vision,
    save_card,
)
from styleinject_core.deadiff import convert as converter
from styleinject_core.deadiff.blip_diffusion import start_from_blip_diffusion
from styleinject_core.deadiff.cards import picture
from styleinject_core.deadiff.file import check_vision, expected_tensors, save_deadiff, vision_matches
from styleinject_core.demo.deadiff import DEMO_CONFIG, new_deadiff

TINY = models.tiny_config(deadiff)
# Runs the converter and prints the most anonymous memory it had beyond what importing took, in bytes.
MEASURED = """
import sys, threading, time
from styleinject_core.deadiff.convert import convert
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))
before = peak = anonymous()
done = threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
convert(sys.argv[1], sys.argv[2])
done.set(); thread.join()
print(peak - before)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint with every key and shape of the real one that the converter uses, and its tensors: 0.95 GB, once."""
    folder = tmp_path_factory.mktemp("checkpoint")
    state = models.write_checkpoint(folder / "deadiff_v1.ckpt")
    yield folder / "deadiff_v1.ckpt", state
    (folder / "deadiff_v1.ckpt").unlink()


@pytest.fixture(scope="module")
def slim(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("slim") / "deadiff.safetensors"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, checkpoint[0], path],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    yield path, int(done.stdout)
    path.unlink()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_the_converter_needs_little_memory(slim):
    path, peak = slim
    assert 750e6 < path.stat().st_size < 765e6
    assert peak < 200e6  # far below the file it writes


def test_the_converted_file_has_every_number_in_its_place(checkpoint, slim):
    _, state = checkpoint
    tensors = load_file(slim[0])
    config = deadiff.SD15
    assert set(tensors) == set(expected_tensors(config))
    parameters = sum(value.numel() for value in tensors.values())
    assert parameters == 378_308_608 + 1024  # and the class embedding
    place = {k: f"{s}.{n}.1" for k, (s, n) in enumerate([("input_blocks", n) for n in (1, 2, 4, 5, 7, 8)])}
    place |= {6: "middle_block.1"} | {k: f"output_blocks.{k - 4}.1" for k in range(7, 16)}
    for k, (name, width) in enumerate(config.layers):
        for part in ("i_to_k", "i_to_v"):
            key = f"model.diffusion_model.{place[k]}.transformer_blocks.0.attn2.{part}.weight"
            assert tensors[f"{name}.{part}.weight"].shape == (width, 768)
            assert torch.equal(tensors[f"{name}.{part}.weight"], state[key]), name
    for stream, word in (("style", 2806), ("content", 4180)):
        blip = f"{stream}_blip"
        table, positions = (state[f"{blip}.Qformer.bert.embeddings.{kind}_embeddings.weight"] for kind in ("word", "position"))
        text = torch.stack([table[row].float() + positions[k].float() for k, row in enumerate((101, word, 102))])
        assert torch.equal(tensors[f"{stream}.qformer.text"], text.half())
        assert torch.equal(tensors[f"{stream}.qformer.queries"], state[f"{blip}.query_tokens"][0])
        layer, own = f"{blip}.Qformer.bert.encoder.layer.7", f"{stream}.qformer.layers.7"
        for ours, theirs in (
            ("attention.query.weight", "attention.self.query.weight"), ("cross.value.weight", "crossattention.self.value.weight"),
            ("cross.out.bias", "crossattention.output.dense.bias"), ("query_ffn.rise.weight", "intermediate_query.dense.weight"),
            ("query_ffn.fall.weight", "output_query.dense.weight"), ("text_ffn.norm.bias", "output.LayerNorm.bias"),
        ):  # fmt: skip
            assert torch.equal(tensors[f"{own}.{ours}"], state[f"{layer}.{theirs}"]), ours
        assert torch.equal(tensors[f"{stream}.projection.rise.weight"], state[f"{stream}_proj_layer.dense1.weight"])
    with safe_open(slim[0], framework="pt") as file:
        metadata = file.metadata()
    assert "non-commercial" in metadata["license"] and metadata["deadiff_source"].startswith("deadiff_v1.ckpt, ")
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/deadiff"


def test_the_converted_file_loads_and_encodes(slim):
    model = load_deadiff(slim[0])
    assert model.counts()["all"] == 378_308_608 and model.config == deadiff.SD15
    assert load_vision(slim[0]) is None
    with torch.no_grad():
        tokens = model.encode(torch.randn(1, 257, 1024, generator=torch.Generator().manual_seed(0)), "content")
    assert tokens.values.shape == (1, 16, 768) and tokens.values.std() > 0.01
    rows = deadiff.Reference(model, content=tokens).rows()
    assert sum(r.keys.positive.numel() + r.values.positive.numel() for r in rows.values()) == 2 * 16 * 12_480


def test_the_converter_refuses_what_is_not_whole(checkpoint, tmp_path):
    path, _ = checkpoint
    out = tmp_path / "out.safetensors"

    def refuses(changed, message):
        torch.save({"state_dict": changed}, tmp_path / "bad.ckpt")
        with pytest.raises(DeadiffFileError, match=message):
            converter.convert(tmp_path / "bad.ckpt", out)
        assert not list(tmp_path.glob("*out*"))

    refuses({"betas": torch.zeros(3)}, "not a DEADiff checkpoint, none of the")
    refuses(
        {"betas": torch.zeros(3), "style_blip.query_tokens": torch.zeros(1, 16, 768)},
        "tensors are missing, the first is style_blip.ln_v",
    )
    for name, value in (
        ("empty.ckpt", b""),
        ("text.ckpt", b"<html>not found</html>"),
        ("cut.ckpt", path.read_bytes()[: 1 << 20]),
    ):
        (tmp_path / name).write_bytes(value)
        with pytest.raises(DeadiffFileError, match=f"{name}: could not be read as a file of tensors alone"):
            converter.convert(tmp_path / name, out)
    with pytest.raises(DeadiffFileError, match="no such file"):
        converter.convert(tmp_path / "none.ckpt", out)
    with pytest.raises(DeadiffFileError, match="expected a name that ends in .safetensors"):
        converter.convert(path, tmp_path / "out.ckpt")
    out.write_bytes(b"mine")
    with pytest.raises(DeadiffFileError, match="exists: choose another name"):
        converter.convert(path, out)
    assert out.read_bytes() == b"mine"


def test_the_converter_checks_shapes_values_and_the_two_encoders(checkpoint, tmp_path, monkeypatch):
    path, state = checkpoint
    changed = dict(state)
    monkeypatch.setattr(converter, "open_checkpoint", lambda _: changed)

    def refuses(key, value, message):
        changed.clear()
        changed.update({**state, key: value})
        with pytest.raises(DeadiffFileError, match=message):
            converter.convert(path, tmp_path / "out.safetensors")
        assert not list(tmp_path.iterdir())

    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.i_to_v.weight"
    refuses(key, torch.zeros(640, 768), r"i_to_v.weight has shape \(640, 768\), expected \(1280, 768\)")
    refuses(key, torch.full((1280, 768), 1e6), "i_to_v.weight has values that float16 cannot hold, nothing was written")
    refuses(key, [0.0], r"i_to_v.weight has shape list")
    refuses("content_blip.visual_encoder.class_embedding", torch.ones(1024), "different vision encoders")
    refuses(
        "style_blip.Qformer.bert.embeddings.word_embeddings.weight",
        torch.zeros(2000, 768),
        r"word table of style_blip has shape \(2000",
    )


def test_a_pickle_that_runs_code_runs_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": {"x": Bomb()}}, tmp_path / "bomb.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.ckpt", "plain.ckpt"):
        with pytest.raises(DeadiffFileError, match="could not be read as a file of tensors alone"):
            converter.convert(tmp_path / name, tmp_path / "out.safetensors")
    assert not (tmp_path / "ran").exists()


def test_with_vision(checkpoint, tmp_path, monkeypatch):
    """The vision encoder's keys; values are views of one stretch of noise, so that this costs no second file."""
    _, state = checkpoint
    noise = torch.randn(4096 * 1024, generator=torch.Generator().manual_seed(1)).half() * 0.02
    vision = {
        key: noise[: torch.Size(shape).numel()].view(shape)
        for key, shape in models.checkpoint_shapes()
        if ".visual_encoder." in key
    }
    vision = {key: value if value.ndim < 2 or "resblocks.5." not in key else value.flip(0) for key, value in vision.items()}
    monkeypatch.setattr(converter, "open_checkpoint", lambda _: {**state, **vision})
    written = {}

    def keep(_, shapes, value, metadata):
        written.update({name: value(name) for name in shapes if name.startswith("vision.")})
        save_file({"x": torch.zeros(1)}, tmp_path / "out.safetensors")

    monkeypatch.setattr(converter, "stream_save", keep)
    (tmp_path / "deadiff.ckpt").write_bytes(b"")
    converter.convert(tmp_path / "deadiff.ckpt", tmp_path / "out.safetensors", with_vision=True)
    assert len(written) == 3 + 2 + 23 * 12
    for name, value in written.items():
        assert torch.equal(value, vision[f"style_blip.visual_encoder.{name.removeprefix('vision.')}"]), name
    different = {**vision, "content_blip.visual_encoder.ln_pre.bias": torch.ones(1024)}
    monkeypatch.setattr(converter, "open_checkpoint", lambda _: {**state, **different})
    with pytest.raises(DeadiffFileError, match=r"different vision encoders \(ln_pre.bias\)"):
        converter.convert(tmp_path / "deadiff.ckpt", tmp_path / "other.safetensors", with_vision=True)


def test_the_command(checkpoint, tmp_path, capsys):
    out = tmp_path / "deadiff.safetensors"
    assert main(["deadiff", "convert", str(checkpoint[0]), str(out)]) == 0
    text = capsys.readouterr().out
    assert "378,309,632 parameters" in text and "non-commercial" in text and "757 MB" in text
    assert out.stat().st_mode & 0o777 == 0o644
    assert main(["deadiff", "convert", str(checkpoint[0]), str(out)]) == 1
    assert "exists" in capsys.readouterr().err


# --- the slim file -----------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_file(tmp_path):
    model = models.random_model(deadiff, TINY)
    save_deadiff(model, tmp_path / "tiny.safetensors", {"license": "none"}, dtype=torch.float32)
    return model, tmp_path / "tiny.safetensors"


def test_a_slim_file_comes_back(tiny_file):
    model, path = tiny_file
    loaded = load_deadiff(path)
    assert loaded.config == TINY and loaded.name == "tiny" and loaded.metadata["license"] == "none"
    assert set(loaded.state_dict()) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.stream_id("style") == model.stream_id("style")
    assert list(path.parent.iterdir()) == [path]


def rewrite(path, change_metadata=None, **changes):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors.update({k: v for k, v in changes.items() if v is not None})
    for name in [k for k, v in changes.items() if v is None]:
        del tensors[name]
    save_file(tensors, path, {**metadata, **(change_metadata or {})})


def test_damaged_slim_files_are_refused_by_name(tiny_file):
    _, path = tiny_file
    whole, name = path.read_bytes(), f"{TINY.layers[2][0]}.i_to_k.weight"
    config = json.loads(json.dumps(TINY.to_dict()))
    for change, tensors, message in (
        ({}, {name: None}, rf"1 of \d+ tensors are missing, the first is {name}"),
        ({}, {name: torch.zeros(64, 25)}, rf"{name} has shape \(64, 25\), its config says \(64, 24\)"),
        ({}, {name: torch.full((64, 24), torch.nan)}, f"{name}.* has NaN or Inf"),
        ({"deadiff_version": "2"}, {}, "deadiff_version is 2, this version of the pack reads up to 1: update it"),
        ({"deadiff_config": "{"}, {}, "deadiff_config"),
        ({"deadiff_config": "[]"}, {}, "expected an object, found list"),
        ({"deadiff_config": json.dumps({**config, "more": 1})}, {}, "unknown field more"),
        ({"deadiff_config": json.dumps({**config, "heads": 5})}, {}, "width 24 is not a multiple of heads 5"),
        ({"deadiff_config": json.dumps({**config, "queries": "4"})}, {}, "queries is '4', expected a whole number"),
        ({"deadiff_config": json.dumps({**config, "encoder": "dino"})}, {}, "encoder is 'dino'"),
        ({"deadiff_config": json.dumps({**config, "content_layers": [7]})}, {}, "content_layers has 7, expected 0 to 6"),
        ({"deadiff_config": json.dumps({**config, "width": 32})}, {}, "its config says"),
    ):
        rewrite(path, change, **tensors)
        with pytest.raises(DeadiffFileError, match=message):
            load_deadiff(path)
        path.write_bytes(whole)
    path.write_bytes(whole[:-100])
    with pytest.raises(DeadiffFileError, match=r"tiny.safetensors: damaged or truncated"):
        load_deadiff(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"image_proj.proj.weight": 1, "ip_adapter.1.to_k_ip.weight": 1}, "an IP-Adapter, not a DEADiff"),
        ({"model.diffusion_model.input_blocks.0.0.weight": 1}, "a model checkpoint"),
        ({"style_blip.query_tokens": 1}, "not converted: styleinject deadiff convert"),
        ({"down_blocks.0.attn2.to_q.styleinject_A": 1}, "a StyleInject adapter"),
        ({"vision_model.embeddings.class_embedding": 1}, "a CLIP vision model"),
        ({"something": 1}, r"no deadiff_config in its header, 1 tensors \(first: something\)"),
    ],
)
def test_other_files_are_told_what_they_are(tmp_path, tensors, message):
    path = tmp_path / "file.safetensors"
    save_file({name: torch.zeros(size) for name, size in tensors.items()}, path)
    with pytest.raises(DeadiffFileError, match=message):
        load_deadiff(path)


def test_pickles_are_never_loaded(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "deadiff_v1.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "renamed.safetensors")
    for name in ("deadiff_v1.ckpt", "renamed.safetensors"):
        with pytest.raises(DeadiffFileError, match="convert it once: styleinject deadiff convert"):
            load_deadiff(tmp_path / name)
    with pytest.raises(DeadiffFileError, match="no such file"):
        load_deadiff(tmp_path / "none.safetensors")


def test_another_vision_encoder_of_the_same_size_is_told_apart(tiny_file):
    model = tiny_file[0]
    embedding = model.class_embedding
    assert vision_matches(model, embedding.half().view(1, 1, -1)) > 0.999
    check_vision(model, embedding + 0.01 * torch.randn(1024, generator=torch.Generator().manual_seed(0)) * embedding.std())
    with pytest.raises(ValueError, match=r"other weights than OpenAI's CLIP ViT-L/14 .*expected above 0.99\): OpenCLIP"):
        check_vision(model, torch.randn(1024, generator=torch.Generator().manual_seed(9)))
    with pytest.raises(ValueError, match="is 1280 wide, random0 was trained with one of 1024"):
        check_vision(model, torch.zeros(1280))


# --- style cards -------------------------------------------------------------------------------------------------


def test_a_style_card_comes_back(tmp_path):
    g = torch.Generator().manual_seed(0)
    style = Tokens(torch.randn(1, 16, 768, generator=g), "style", "0123456789abcdef", ("wave.png",))
    content = Tokens(torch.randn(2, 16, 768, generator=g), "content", "fedcba9876543210")
    image = torch.rand(1, 300, 200, 3, generator=g)
    save_card(card_of([style], image), tmp_path / "wave.safetensors")
    assert (tmp_path / "wave.safetensors").stat().st_size < 25_000 + 12_000  # noise is the worst a JPEG can meet
    save_card(card_of([style, content], image), tmp_path / "both.safetensors")
    card = load_card(tmp_path / "both.safetensors")
    for tokens in (style, content):
        loaded = card.tokens[tokens.stream]
        assert torch.equal(loaded.values, tokens.values.half().float())
        assert (loaded.model_id, loaded.labels) == (tokens.model_id, tokens.labels)
    assert picture(card).shape == (1, 128, 85, 3)
    assert len(card.reference) == 64 and card.reference != card_of([style], image.flip(1)).reference
    assert picture(load_card(save_plain(tmp_path, style))) is None


def save_plain(folder, tokens):
    save_card(card_of([tokens]), folder / "plain.safetensors")
    return folder / "plain.safetensors"


def test_bad_cards_are_refused(tmp_path):
    style = Tokens(torch.zeros(1, 4, 24), "style")
    with pytest.raises(TokensError, match="one set of tokens a stream, found style, style"):
        card_of([style, style])
    path = save_plain(tmp_path, style)
    whole = path.read_bytes()
    for change, tensors, message in (
        ({"deadiff_card": "9"}, {}, "deadiff_card is 9"),
        ({"deadiff_labels": "["}, {}, "plain.safetensors"),
        ({}, {"style.tokens": torch.full((1, 4, 24), torch.inf)}, "NaN or Inf"),
        ({}, {"style.tokens": torch.zeros(4, 24)}, r"shape \(4, 24\)"),
        ({}, {"style.tokens": None, "x": torch.zeros(1)}, "neither style.tokens nor content.tokens"),
    ):
        rewrite(path, change, **tensors)
        with pytest.raises(DeadiffFileError, match=message):
            load_card(path)
        path.write_bytes(whole)
    model = models.random_model(deadiff, TINY)
    save_deadiff(model, tmp_path / "model.safetensors")
    with pytest.raises(DeadiffFileError, match="load it with Load DEADiff"):
        load_card(tmp_path / "model.safetensors")
    with pytest.raises(DeadiffFileError, match="a style card: load it with Load Style Card"):
        deadiff.load_deadiff(path)
    rewrite(path, {"deadiff_thumbnail": "bm8gSlBFRw=="})
    assert picture(load_card(path)) is None


def qformer_of_diffusers(config):
    """Random weights in the classes of diffusers' BLIP-Diffusion, at the sizes of `config`."""
    blip = pytest.importorskip("diffusers.pipelines.deprecated.blip_diffusion.modeling_blip2")
    from transformers import Blip2Config

    settings = Blip2Config(
        vision_config={"hidden_size": config.vision_width, "num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 2},
        qformer_config={
            "hidden_size": config.width, "num_hidden_layers": config.depth, "num_attention_heads": config.heads,
            "intermediate_size": config.feed_forward, "encoder_hidden_size": config.vision_width, "cross_attention_frequency": 1,
            "vocab_size": 5000, "max_position_embeddings": 16,
        },
        num_query_tokens=config.queries,
    )  # fmt: skip
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blip.BertTokenizer, "from_pretrained", lambda *_args, **_named: Mock())  # else it asks the network
        model = blip.Blip2QFormerModel(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def test_training_may_begin_with_blip_diffusions_qformer(tmp_path):
    """Both spellings; every tensor in its place, text rows of each stream's own word; the rest as it was."""
    config = replace(DEMO_CONFIG, words=3, feed_forward=64, vision_width=24)
    model = qformer_of_diffusers(config)
    state = {key: value.contiguous() for key, value in model.state_dict().items() if "position_ids" not in key}
    state = {key: value for key, value in state.items() if not key.startswith("proj_layer")}
    for name, shape in {
        "LayerNorm": (config.width,),
        "dense1": (config.feed_forward, config.width),
        "dense2": (config.context, config.feed_forward),
    }.items():
        state |= {f"proj_layer.{name}.weight": torch.randn(shape), f"proj_layer.{name}.bias": torch.randn(shape[0])}
    save_file(state, tmp_path / "diffusers.safetensors")
    lavis = {}
    for key, value in state.items():
        key = key.replace("attention.attention.", "attention.self.").replace("visual_encoder.post_layernorm", "blip.ln_vision")
        if key.startswith(("encoder.", "embeddings.")):
            key = f"blip.Qformer.bert.{key}"
        lavis["blip.query_tokens" if key == "query_tokens" else key] = value
    save_file(lavis, tmp_path / "lavis.safetensors")

    loaded = []
    for name in ("diffusers", "lavis"):
        deadiff = new_deadiff(config)
        for parameter in deadiff.to_kv.parameters():
            torch.nn.init.normal_(parameter)
        before = [parameter.clone() for parameter in deadiff.to_kv.parameters()]
        start_from_blip_diffusion(deadiff, tmp_path / f"{name}.safetensors")
        assert all(torch.equal(a, b) for a, b in zip(before, deadiff.to_kv.parameters(), strict=True))
        loaded.append(deadiff.streams.state_dict())
    assert all(torch.equal(loaded[0][key], loaded[1][key]) for key in loaded[0])
    for stream, word in (("style", 2806), ("content", 4180)):
        own = loaded[0]
        text = state["embeddings.word_embeddings.weight"][[101, word, 102]] + state["embeddings.position_embeddings.weight"][:3]
        torch.testing.assert_close(own[f"{stream}.qformer.text"], text)
        assert torch.equal(own[f"{stream}.qformer.queries"].flatten(), state["query_tokens"].flatten())
        for theirs, ours in {
            "encoder.layer.2.attention.attention.query.weight": "qformer.layers.2.attention.query.weight",
            "encoder.layer.1.crossattention.output.dense.bias": "qformer.layers.1.cross.out.bias",
            "encoder.layer.0.output_query.dense.weight": "qformer.layers.0.query_ffn.fall.weight",
            "encoder.layer.0.intermediate.dense.weight": "qformer.layers.0.text_ffn.rise.weight",
            "visual_encoder.post_layernorm.weight": "vision_norm.weight",
            "proj_layer.dense2.weight": "projection.fall.weight",
        }.items():
            assert torch.equal(own[f"{stream}.{ours}"], state[theirs]), ours


def test_what_is_no_qformer_of_blip_diffusion_is_refused(tmp_path):
    deadiff = new_deadiff()
    before = {key: value.clone() for key, value in deadiff.state_dict().items()}
    config = replace(DEMO_CONFIG, words=3, feed_forward=64, vision_width=24)
    state = {k: v.contiguous() for k, v in qformer_of_diffusers(config).state_dict().items() if "position_ids" not in k}
    save_file(state, tmp_path / "other.safetensors")
    save_file({k: v for k, v in state.items() if k != "query_tokens"}, tmp_path / "part.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "nothing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name, message in {
        "other.safetensors": "other.safetensors: .* has shape", "part.safetensors": "tensors are missing: query_tokens",
        "nothing.safetensors": "not a Q-Former of BLIP-Diffusion", "broken.safetensors": "damaged", "a.bin": "expected a .safetensors",
        "none.safetensors": "no such file",
    }.items():  # fmt: skip
        with pytest.raises(DeadiffFileError, match=message):
            start_from_blip_diffusion(deadiff, tmp_path / name)
    assert all(torch.allclose(before[key], value, 0, 0, equal_nan=True) for key, value in deadiff.state_dict().items())
