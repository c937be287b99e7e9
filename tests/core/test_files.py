"""Adapter files: round trips, every spelling, golden file, and one clear error for each kind of bad file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from styleinject_core import Adapter, AdapterConfig, AdapterFileError, LayerShape, attach, load_adapter, save_adapter
from styleinject_core.files.header import read_header
from styleinject_core.files.names import diffusers_name
from styleinject_core.hosts.architectures import ARCHITECTURES, architecture_of
from styleinject_core.layer_names import parse

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "up_blocks.1.resnets.2.conv1"
SHAPES = {TO_Q: LayerShape(6, 8), CONV: LayerShape(3, 5, (3, 3))}


def adapter(seed=0, **config):
    torch.manual_seed(seed)
    config = {"r": 2, "n_styles": 3, "alpha": 4.0, "target_modules": ("all",), **config}
    made = Adapter.create(SHAPES, AdapterConfig(**config))
    for p in made.parameters():
        p.data.normal_()
    return made


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"n_styles": 1},
        {"n_styles": 1, "sta": "none"},
        {"sta": "additive", "router_pool": "sum", "eps": 1e-3},
        {"layers": {TO_Q: {"router_pool": "token", "r": 5, "alpha": None}}},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip(tmp_path, config, dtype):
    before = adapter(**config).to(dtype)
    before.metadata["modelspec.author"] = "Ada <b>L.</b> 世界"
    save_adapter(before, tmp_path / "a.safetensors", {"modelspec.trigger_phrase": "in line art"})
    after = load_adapter(tmp_path / "a.safetensors")
    assert after.name == "a"
    assert after.config == before.config
    assert after.metadata["modelspec.author"] == "Ada <b>L.</b> 世界"
    assert after.metadata["modelspec.trigger_phrase"] == "in line art"
    for (name, one), (other_name, other) in zip(sorted(before.layers.items()), sorted(after.layers.items()), strict=True):
        assert name == other_name and one.config == other.config and one.shape == other.shape
        for part, value in one.tensors().items():
            assert torch.equal(value, other.tensors()[part]) and other.tensors()[part].dtype == dtype
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_golden_keys_and_shapes(tmp_path):
    """The format as others write and read it: a change here is a change of the file format."""
    save_adapter(adapter(), tmp_path / "a.safetensors")
    assert {k: tuple(v.shape) for k, v in load_file(tmp_path / "a.safetensors").items()} == {
        f"{TO_Q}.styleinject_A": (3, 2, 6),
        f"{TO_Q}.styleinject_B": (8, 2),
        f"{TO_Q}.styleinject_router.weight": (3, 6),
        f"{TO_Q}.styleinject_router.bias": (3,),
        f"{TO_Q}.styleinject_hyper.weight": (8, 3),
        f"{TO_Q}.styleinject_hyper.bias": (8,),
        f"{CONV}.styleinject_A": (3, 2, 3, 3, 3),
        f"{CONV}.styleinject_B": (5, 2),
        f"{CONV}.styleinject_router.weight": (3, 3),
        f"{CONV}.styleinject_router.bias": (3,),
        f"{CONV}.styleinject_hyper.weight": (5, 3),
        f"{CONV}.styleinject_hyper.bias": (5,),
    }
    header = (tmp_path / "a.safetensors").read_bytes()
    metadata = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    assert metadata["styleinject_version"] == "1" and metadata["format"] == "pt"
    assert json.loads(metadata["styleinject_config"]) == {
        "r": 2, "n_styles": 3, "alpha": 4.0, "router_pool": "mean", "sta": "multiplicative", "eps": 1e-05,
        "target_modules": ["all"], "layers": {},
    }  # fmt: skip


def test_what_older_versions_cannot_run_they_refuse_by_the_version(tmp_path):
    for config, version in (
        ({}, "1"),
        ({"tokens": "all"}, "2"),
        ({"router_pool": "paper"}, "2"),
        ({"layers": {TO_Q: {"router_pool": "paper"}}}, "2"),
    ):
        save_adapter(adapter(**config), tmp_path / "a.safetensors")
        assert read_header(tmp_path / "a.safetensors").metadata["styleinject_version"] == version
        loaded = load_adapter(tmp_path / "a.safetensors")
        assert {n: layer.config for n, layer in loaded.layers.items()} == {
            n: layer.config for n, layer in adapter(**config).layers.items()
        }


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        (TO_Q, TO_Q),
        ("unet." + TO_Q, TO_Q),
        ("base_model.model." + TO_Q, TO_Q),
        ("base_model.model.unet." + TO_Q, TO_Q),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", TO_Q),
        ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", TO_Q),
        ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", TO_Q),
        ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", TO_Q),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0", "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"),
        ("diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj", "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"),
        ("lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_ff_net_0_proj", "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj"),
        ("diffusion_model.middle_block.2.out_layers.3", "mid_block.resnets.1.conv2"),
        ("diffusion_model.input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("diffusion_model.output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv"),
        ("diffusion_model.output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_output_blocks_8_0_skip_connection", "up_blocks.2.resnets.2.conv_shortcut"),
        ("lora_unet_down_blocks_1_resnets_0_time_emb_proj", "down_blocks.1.resnets.0.time_emb_proj"),
        ("lora_unet_time_embedding_linear_1", "time_embedding.linear_1"),
        ("diffusion_model.label_emb.0.2", "add_embedding.linear_2"),
        ("diffusion_model.double_blocks.3.img_attn.proj", "double_blocks.3.img_attn.proj"),
    ],
)  # fmt: skip
def test_every_spelling_of_a_name(spelled, expected):
    assert diffusers_name(spelled) == expected


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_kohya_spelling_of_every_layer(base):
    for name in ARCHITECTURES[base].shapes():
        assert diffusers_name("lora_unet_" + name.replace(".", "_")) == name


def test_ldm_styleinject_names_load(tmp_path):
    in_ldm = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    save_adapter(adapter(), tmp_path / "a.safetensors")
    ldm = {key.replace(TO_Q, in_ldm): tensor for key, tensor in load_file(tmp_path / "a.safetensors").items()}
    save_file(ldm, tmp_path / "b.safetensors")
    loaded = load_adapter(tmp_path / "b.safetensors")
    assert set(loaded.names) == {TO_Q, CONV}
    assert loaded.config.r == 2 and loaded.config.n_styles == 3 and loaded.config.alpha is None
    config = {"r": 2, "n_styles": 3, "layers": {in_ldm: {"alpha": 7.0, "router_pool": "token"}}}
    save_file(ldm, tmp_path / "c.safetensors", {"styleinject_config": json.dumps(config)})
    layers = load_adapter(tmp_path / "c.safetensors").layers
    assert layers[TO_Q].config.alpha == 7.0 and layers[TO_Q].config.router_pool == "token"
    assert layers[CONV].config.alpha is None


LORA_SPELLINGS = {
    "kohya": ("lora_unet_" + TO_Q.replace(".", "_"), ".lora_down.weight", ".lora_up.weight", "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"),
    "peft": ("base_model.model." + TO_Q, ".lora_A.weight", ".lora_B.weight", "text_encoder.text_model.encoder.layers.0.lora_A.weight"),
    "peft adapter name": ("base_model.model." + TO_Q, ".lora_A.default.weight", ".lora_B.default.weight", "text_encoder.x.lora_A.weight"),
    "diffusers": ("unet." + TO_Q, ".lora_A.weight", ".lora_B.weight", "text_encoder.x.lora_A.weight"),
    "diffusers, older": ("unet." + TO_Q, ".lora.down.weight", ".lora.up.weight", "text_encoder.x.lora.down.weight"),
    "diffusers, oldest": ("unet." + TO_Q.replace("attn1.to_q", "attn1.processor.to_q"), "_lora.down.weight", "_lora.up.weight", "text_encoder.x.lora.down.weight"),
}  # fmt: skip


@pytest.mark.parametrize("spelling", LORA_SPELLINGS)
def test_plain_loras_load(tmp_path, spelling):
    module, down, up, text_encoder = LORA_SPELLINGS[spelling]
    A, B = torch.randn(4, 6), torch.randn(8, 4)
    tensors = {module + down: A, module + up: B, text_encoder: torch.ones(1, 1)}
    if spelling == "kohya":
        tensors |= {module + ".alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "lora.safetensors")
    loaded = load_adapter(tmp_path / "lora.safetensors")
    assert loaded.names == (TO_Q,) and loaded.skipped == (text_encoder,)
    layer = loaded.layers[TO_Q]
    assert layer.config.scale == (0.5 if spelling == "kohya" else 1.0)
    assert layer.router_weight is None and layer.hyper_weight is None
    x = torch.randn(2, 3, 6)
    host = torch.nn.Module()
    host.to_q = torch.nn.Linear(6, 8)
    with torch.no_grad(), attach(host, loaded, names={TO_Q: "to_q"}):
        found = host.to_q(x)
    expected = torch.nn.functional.linear(x, host.to_q.weight + layer.config.scale * B @ A, host.to_q.bias)
    torch.testing.assert_close(found, expected)


def test_convolution_loras_load(tmp_path):
    A, B = torch.randn(4, 3, 3, 3), torch.randn(5, 4, 1, 1)
    name = "lora_unet_" + CONV.replace(".", "_")
    save_file(
        {name + ".lora_down.weight": A, name + ".lora_up.weight": B, name + ".alpha": torch.tensor(4.0)},
        tmp_path / "l.safetensors",
    )
    layer = load_adapter(tmp_path / "l.safetensors").layers[CONV]
    assert layer.shape == LayerShape(3, 5, (3, 3)) and torch.equal(layer.A[0], A) and torch.equal(layer.B, B.flatten(1))


def write(path, change=None, metadata=None, **config):
    """A valid file at `path`, with its tensors and header changed."""
    save_adapter(adapter(**config), path)
    tensors = load_file(path)
    header = {"styleinject_version": "1", "styleinject_config": json.dumps(adapter(**config).config.to_dict())}
    if change:
        change(tensors)
    save_file(tensors, path, {**header, **(metadata or {})})


def set_nan(tensors):
    tensors[f"{TO_Q}.styleinject_hyper.bias"][2] = float("nan")


def drop(part):
    return lambda tensors: tensors.pop(f"{TO_Q}.styleinject_{part}")


def put(part, tensor):
    return lambda tensors: tensors.update({f"{TO_Q}.styleinject_{part}": tensor})


BAD_FILES = {
    "truncated": (lambda p: (write(p), p.write_bytes(p.read_bytes()[:-40])), "damaged or truncated"),
    "cut in the header": (lambda p: (write(p), p.write_bytes(p.read_bytes()[:100])), "damaged or truncated"),
    "empty": (lambda p: p.write_bytes(b""), "the file is empty"),
    "not safetensors": (lambda p: p.write_bytes(b"hello, adapter " * 20), "damaged or truncated"),
    "pickle": (lambda p: torch.save({"a": torch.ones(1)}, p), "pickled PyTorch file"),
    "missing": (lambda p: None, "no such file"),
    "checkpoint": (lambda p: save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)}, p), "whole model checkpoint"),
    "something else": (lambda p: save_file({"emb_params": torch.ones(1)}, p), "no adapter inside.*emb_params"),
    "nan": (lambda p: write(p, set_nan), rf"{TO_Q}: hyper_bias has NaN"),
    "part missing": (lambda p: write(p, drop("B")), rf"{TO_Q}: styleinject_B is missing"),
    "half a router": (lambda p: write(p, drop("router.bias")), "router_weight and router_bias must both"),
    "unknown part": (lambda p: write(p, put("C", torch.ones(1))), "unknown part 'C'"),
    "rank against config": (lambda p: write(p, metadata={"styleinject_config": json.dumps({"r": 16, "n_styles": 3})}), "file has rank 2, config says 16"),
    "styles against config": (lambda p: write(p, metadata={"styleinject_config": json.dumps({"r": 2, "n_styles": 4})}), "file has n_styles 3, config says 4"),
    "sta against config": (lambda p: write(p, metadata={"styleinject_config": json.dumps({"r": 2, "n_styles": 3, "sta": "none"})}), "a hypernetwork, config says sta = 'none'"),
    "B against A": (lambda p: write(p, put("B", torch.ones(8, 3))), r"B has shape \(8, 3\), expected \(8, 2\)"),
    "router against A": (lambda p: write(p, put("router.weight", torch.ones(3, 7))), r"router.weight has shape \(3, 7\), expected \(3, 6\)"),
    "unknown config field": (lambda p: write(p, metadata={"styleinject_config": json.dumps({"r": 2, "magic": 1})}), "unknown field 'magic'"),
    "config is no object": (lambda p: write(p, metadata={"styleinject_config": "[]"}), "expected an object, found list"),
    "config is no json": (lambda p: write(p, metadata={"styleinject_config": "{"}), "styleinject_config"),
    "bad value": (lambda p: write(p, metadata={"styleinject_config": json.dumps({"r": 2, "n_styles": 3, "sta": "b"})}), "sta: expected one of"),
    "newer version": (lambda p: write(p, metadata={"styleinject_version": "3"}), "styleinject_version is 3"),
    "integers": (lambda p: write(p, put("B", torch.ones(8, 2, dtype=torch.int32))), "dtype torch.int32"),
    "lora without up": (lambda p: save_file({"lora_unet_conv_in.lora_down.weight": torch.ones(2, 3)}, p), "up matrix is missing"),
    "lora ranks": (lambda p: save_file({"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 4)}, p), "ranks disagree"),
    "text encoder only": (lambda p: save_file({"lora_te_x.lora_down.weight": torch.ones(2, 3)}, p), "none for a U-Net layer"),
    "peft's dora": (lambda p: save_file({"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 2), "a.lora_magnitude_vector.weight": torch.ones(1)}, p), r"a: magnitudes have shape \(1,\) beside Linear 3->3"),
    "lora with biases": (lambda p: save_file({"a.lora_A.default.weight": torch.ones(2, 3), "a.lora_B.default.weight": torch.ones(3, 2), "a.lora_B.default.bias": torch.ones(2)}, p), r"a: the change of the bias has shape \(2,\) beside Linear 3->3"),
    "dora": (lambda p: save_file({"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 2), "a.dora_scale": torch.ones(1)}, p), r"a: dora_scale has shape \(1,\) beside Linear 3->3"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_get_one_clear_error(tmp_path, kind):
    make, message = BAD_FILES[kind]
    path = tmp_path / "style.safetensors"
    make(path)
    with pytest.raises(AdapterFileError, match=message) as caught:
        load_adapter(path)
    assert "style.safetensors" in str(caught.value)


def test_pickles_by_suffix(tmp_path):
    torch.save({}, tmp_path / "a.pt")
    with pytest.raises(AdapterFileError, match=r"a.pt: only .safetensors"):
        load_adapter(tmp_path / "a.pt")


def test_saving_is_atomic(tmp_path, monkeypatch):
    """A disk that fills up leaves the former file whole and no temporary one."""
    path = tmp_path / "a.safetensors"
    save_adapter(adapter(0), path)
    before = path.read_bytes()

    def full(tensors, name, metadata):
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("styleinject_core.files.atomic.save_file", full)
    with pytest.raises(AdapterFileError, match=r"a.safetensors: could not be written.*No space left"):
        save_adapter(adapter(1), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    broken = adapter()
    broken.layers[TO_Q].B.data[0, 0] = float("inf")
    with pytest.raises(AdapterFileError, match="B has NaN or Inf"):
        save_adapter(broken, path)
    with pytest.raises(AdapterFileError, match="ends in .safetensors"):
        save_adapter(adapter(), tmp_path / "a.pt")
    with pytest.raises(AdapterFileError, match="could not be written"):
        save_adapter(adapter(), tmp_path / "no" / "a.safetensors")
    assert path.read_bytes() == before


@pytest.mark.parametrize(("styles", "count"), [(1, 3_338_368), (4, 8_411_392), (16, 28_703_488)])
def test_parameter_counts_are_the_papers(styles, count):
    """Table IV: SD 1.5, to_q and to_v, r = 32."""
    with torch.device("meta"):
        made = Adapter.create(ARCHITECTURES["sd15"].shapes(), AdapterConfig(r=32, n_styles=styles))
    assert len(made.names) == 64
    assert made.parameter_count() == count
    assert architecture_of(made) is ARCHITECTURES["sd15"]


@pytest.mark.parametrize(("rank", "count"), [(32, 3_188_736), (128, 12_754_944), (512, 51_019_776)])
def test_lora_parameter_counts_are_the_papers(rank, count):
    with torch.device("meta"):
        made = Adapter.create(ARCHITECTURES["sd15"].shapes(), AdapterConfig(r=rank, n_styles=1, sta="none"))
    assert made.parameter_count() == count


def test_target():
    assert parse(TO_Q).target == "to_q"
    assert parse("mid_block.resnets.0.conv1").target == "conv1"
    assert parse("a.attn1.to_out.0").target == "to_out.0"
    assert parse("conv_in").target == "conv_in"


def test_golden_output(tmp_path):
    """One layer's output from a saved file, pinned: a change of what files mean is seen here."""
    config = AdapterConfig(r=2, n_styles=2, alpha=1.0, target_modules=("all",))
    made = Adapter.create({"to_q": LayerShape(3, 2)}, config)
    for p in made.parameters():
        p.data = torch.linspace(-0.5, 0.5, p.numel()).view(p.shape)
    save_adapter(made, tmp_path / "a.safetensors")
    host = torch.nn.ModuleDict({"to_q": torch.nn.Linear(3, 2)})
    host["to_q"].weight.data = torch.tensor([[1.0, -1.0, 0.5], [0.25, 2.0, -1.0]])
    host["to_q"].bias.data = torch.tensor([0.5, -0.5])
    x = torch.tensor([[[1.0, 2.0, 3.0], [-1.0, 0.5, 2.0], [0.0, 1.0, -1.0]]])
    expected = torch.tensor([[-0.078895, 1.653348], [-0.172493, -3.702431], [-0.277744, 4.419125]])  # by hand, in numpy
    with torch.no_grad(), attach(host, load_adapter(tmp_path / "a.safetensors")):
        found = host["to_q"](x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
