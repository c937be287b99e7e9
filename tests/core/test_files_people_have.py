"""Files of other programs, without ComfyUI: PEFT's and diffusers' own results, the authors' DiffuseKronA, and what is refused."""

from __future__ import annotations

import copy
import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from styleinject_core import (
    Adapter,
    AdapterConfig,
    AdapterFileError,
    AdapterMismatchError,
    LayerShape,
    attach,
    load_adapter,
    save_adapter,
)
from styleinject_core.files.keys import parse
from styleinject_core.functional import dispatch, reference
from styleinject_core.functional.host import HostLayer
from styleinject_core.methods.kronecker import KroneckerLayer

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


class Block(nn.Module):
    """A Linear, a convolution, a norm, an embedding and a Conv1d."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(12, 20)
        self.to_k = nn.Linear(12, 20, bias=False)
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.LayerNorm(12)
        self.embedding = nn.Embedding(7, 12)
        self.deep = nn.Conv1d(12, 12, 3, padding=1)

    def forward(self, x):
        tokens = self.norm(self.conv(x).flatten(2).mT)
        tokens = tokens + self.embedding(torch.arange(tokens.shape[1]) % 7)
        return self.to_q(self.deep(tokens.mT).mT) * self.to_k(tokens).sigmoid()


@pytest.fixture
def host():
    torch.manual_seed(3)
    return Block().requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(5))


def drawn(*shape, seed=0, std=0.4):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


# --- PEFT and diffusers ------------------------------------------------------------------------------------------------

PEFT_CONFIGS = {
    "alpha 16 at rank 4": {"r": 4, "lora_alpha": 16},
    "alpha 1 at rank 4": {"r": 4, "lora_alpha": 1},
    "rank-stabilized": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"conv": 24, "^to_k": 3}},
    "regular expressions": {"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_[qk]": 2.5}},
    "biases": {"r": 4, "lora_alpha": 12, "lora_bias": True, "target_modules": ["to_q", "conv"]},
    "DoRA": {"r": 4, "lora_alpha": 6, "use_dora": True},
}


@pytest.mark.parametrize("kept", ["beside, as adapter_model", "beside, renamed", "in the header"])
@pytest.mark.parametrize("config", PEFT_CONFIGS)
def test_pefts_own_result(tmp_path, host, x, config, kept):
    """What PEFT computes from what PEFT has saved, alpha in a file beside it, or in the header as diffusers has it."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(**{"target_modules": ["to_q", "to_k", "conv"], **PEFT_CONFIGS[config]})
    model = peft.get_peft_model(copy.deepcopy(host), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                scale = 1.0 if "magnitude" in name else 0.4
                parameter.copy_(
                    drawn(*parameter.shape, seed=len(name), std=0.3) + (parameter if "magnitude" in name else 0)
                ).mul_(scale)
        expected = model(x)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    if kept == "beside, renamed":
        path = path.rename(tmp_path / "mine.safetensors")
    elif kept == "in the header":
        listed = {k: list(v) if isinstance(v, set) else v for k, v in settings.to_dict().items()}
        (tmp_path / "adapter_config.json").unlink()
        save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(listed, default=str)})
    plain = host(x)
    with torch.no_grad(), attach(host, load_adapter(path)):
        found = host(x)
    assert (expected - plain).abs().max() > 0.02
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


LYCORIS_OF_PEFT = {
    "LoHa": ("LoHaConfig", {"r": 4, "alpha": 10, "use_effective_conv2d": True}),
    "LoHa, flat": ("LoHaConfig", {"r": 3, "alpha": 1, "rank_pattern": {"to_k": 2}}),
    "LoKr": ("LoKrConfig", {"r": 2, "alpha": 6}),
    "LoKr, both": ("LoKrConfig", {"r": 1, "alpha": 3, "decompose_both": True, "use_effective_conv2d": True}),
    "LoKr, full": ("LoKrConfig", {"r": 16, "alpha": 8}),
}


@pytest.mark.parametrize("kind", LYCORIS_OF_PEFT)
def test_pefts_loha_and_lokr(tmp_path, host, x, kind):
    peft = pytest.importorskip("peft")
    name, given = LYCORIS_OF_PEFT[kind]
    settings = getattr(peft, name)(**{"target_modules": ["to_q", "to_k", "conv"], "init_weights": True, **given})
    model = peft.get_peft_model(copy.deepcopy(host), settings)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "hada_" in key or "lokr_" in key:
                parameter.copy_(drawn(*parameter.shape, seed=len(key), std=0.5))
        expected = model(x)
    model.save_pretrained(tmp_path)
    with torch.no_grad(), attach(host, load_adapter(tmp_path / "adapter_model.safetensors")):
        found = host(x)
    assert (expected - host(x)).abs().max() > 0.02
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_config_of_another_file_is_not_taken(tmp_path, host):
    """A folder of many LoRAs may hold somebody's adapter_config.json: other ranks or targets are not this file's."""
    save_file({"to_q.lora_A.weight": drawn(4, 12), "to_q.lora_B.weight": drawn(20, 4)}, tmp_path / "mine.safetensors")
    for config in ({"r": 8, "lora_alpha": 1}, {"r": 4, "lora_alpha": 1, "target_modules": ["to_v"]}, {"r": 4}, [], {"r": "x"}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        assert load_adapter(tmp_path / "mine.safetensors").layers["to_q"].config.scale == 1
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 1, "target_modules": ["to_q", "to_v"]}))
    assert load_adapter(tmp_path / "mine.safetensors").layers["to_q"].config.scale == 0.25
    (tmp_path / "mine.safetensors").rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 1}))
    with pytest.raises(AdapterFileError, match=r"adapter_model.safetensors: to_q: file has rank 4, adapter_config.json says 8"):
        load_adapter(tmp_path / "adapter_model.safetensors")


def test_alpha_tensors_come_before_the_header(tmp_path):
    tensors = {"to_q.lora_A.weight": drawn(4, 12), "to_q.lora_B.weight": drawn(20, 4), "to_q.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 32})})
    assert load_adapter(tmp_path / "a.safetensors").layers["to_q"].config.scale == 0.5


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("{", "lora_adapter_metadata: Expecting"),
        ("[1]", "lora_adapter_metadata: expected a table, found list"),
        (json.dumps({"unet.r": 4, "unet.lora_alpha": "8"}), "lora_alpha is '8'"),
        (json.dumps({"r": 0, "lora_alpha": 8}), "r is 0"),
        (json.dumps({"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_q": None}}), "alpha_pattern is"),
        ('{"r": 4, "lora_alpha": 1e999}', "lora_alpha is inf"),
        (json.dumps({"r": 4, "lora_alpha": 8, "alpha_pattern": {"(a+)+b": 1}}), "too complicated to be tried"),
        (json.dumps({"r": 4, "lora_alpha": 8, "alpha_pattern": {"[": 1}}), "not a regular expression"),
        ("[" * 100_000, "lora_adapter_metadata: nested too deep"),
        ('{"r": 4, "r": 5, "lora_alpha": 8}', "lora_adapter_metadata: r is in it twice"),
    ],
)
def test_headers_that_cannot_be_read(tmp_path, stated, message):
    tensors = {"unet.to_q.lora_A.weight": drawn(4, 12), "unet.to_q.lora_B.weight": drawn(20, 4)}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": stated})
    with pytest.raises(AdapterFileError, match="a.safetensors.*") as error:
        load_adapter(tmp_path / "a.safetensors")
    assert message in str(error.value)


@pytest.mark.parametrize("settings", [{"r": 4, "lora_alpha": 16}, {"r": 4, "lora_alpha": 4, "use_rslora": True},
                                      {"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_k": 1}, "rank_pattern": {"to_v": 2}}], ids=str)  # fmt: skip
def test_diffusers_own_result(tmp_path, settings):
    """A U-Net of diffusers with PEFT's layers, saved by its pipeline class with the metadata it writes."""
    peft, diffusers = pytest.importorskip("peft"), pytest.importorskip("diffusers")
    unet = tiny_unet()
    plain = copy.deepcopy(unet)
    unet.add_adapter(peft.LoraConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"], **settings))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(drawn(*parameter.shape, seed=len(name)))
    layers = peft.get_peft_model_state_dict(unet)
    config = unet.peft_config["default"].to_dict()
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, layers, unet_lora_adapter_metadata=config)
    given = torch.randn(2, 4, 8, 8), torch.tensor([3, 3]), torch.randn(2, 5, 12)
    with torch.no_grad():
        expected, without = unet(*given).sample, plain(*given).sample
        with attach(plain, load_adapter(tmp_path / "pytorch_lora_weights.safetensors")):
            found = plain(*given).sample
    assert (expected - without).abs().max() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- methods that are read ---------------------------------------------------------------------------------------------

CHANGES = {
    "LoHa": {"to_q.hada_w1_a": (20, 3), "to_q.hada_w1_b": (3, 12), "to_q.hada_w2_a": (20, 3), "to_q.hada_w2_b": (3, 12)},
    "LoHa of a convolution": {"conv.hada_w1_a": (12, 2), "conv.hada_w1_b": (2, 27), "conv.hada_w2_a": (12, 2), "conv.hada_w2_b": (2, 27)},
    "LoHa, Tucker": {"conv.hada_t1": (2, 2, 3, 3), "conv.hada_t2": (2, 2, 3, 3), "conv.hada_w1_a": (2, 12), "conv.hada_w1_b": (2, 3),
                     "conv.hada_w2_a": (2, 12), "conv.hada_w2_b": (2, 3)},
    "LoKr": {"to_q.lokr_w1": (4, 3), "to_q.lokr_w2": (5, 4)},
    "LoKr, factored": {"to_q.lokr_w1_a": (4, 2), "to_q.lokr_w1_b": (2, 3), "to_q.lokr_w2_a": (5, 2), "to_q.lokr_w2_b": (2, 4)},
    "LoKr of a convolution": {"conv.lokr_w1": (4, 3), "conv.lokr_w2": (3, 9)},
    "LoKr, Tucker": {"conv.lokr_w1": (4, 1), "conv.lokr_t2": (2, 2, 3, 3), "conv.lokr_w2_a": (2, 3), "conv.lokr_w2_b": (2, 3)},
    "LoRA, mid": {"conv.lora_down.weight": (2, 3, 1, 1), "conv.lora_mid.weight": (2, 2, 3, 3), "conv.lora_up.weight": (12, 2, 1, 1)},
    "LoRA as a matrix": {"conv.lora_down.weight": (2, 27), "conv.lora_up.weight": (12, 2)},
    "LoRA as a convolution": {"to_q.lora_down.weight": (2, 12, 1, 1), "to_q.lora_up.weight": (20, 2, 1, 1)},
    "LoRA as a 3x3 convolution": {"deep.lora_down.weight": (2, 12, 1, 3), "deep.lora_up.weight": (12, 2, 1, 1)},
    "LoKr of an embedding": {"embedding.lokr_w1": (7, 3), "embedding.lokr_w2": (1, 4)},
    "LoRA of an embedding": {"embedding.lora_down.weight": (2, 12), "embedding.lora_up.weight": (7, 2)},
    "LoRA of a Conv1d": {"deep.lora_down.weight": (2, 12, 3), "deep.lora_up.weight": (12, 2, 1)},
    "LoRA and a bias": {"to_q.lora_down.weight": (2, 12), "to_q.lora_up.weight": (20, 2), "to_q.diff_b": (20,)},
    "difference": {"conv.diff": (12, 3, 3, 3), "conv.diff_b": (12,), "to_k.diff": (20, 12)},
    "norm": {"norm.diff": (12,), "norm.diff_b": (12,)},
    "LyCORIS' norm": {"norm.w_norm": (12,), "norm.b_norm": (12,)},
    "DoRA by rows": {"to_q.lora_down.weight": (2, 12), "to_q.lora_up.weight": (20, 2), "to_q.dora_scale": (20, 1)},
    "DoRA by columns": {"conv.lora_down.weight": (2, 27), "conv.lora_up.weight": (12, 2), "conv.dora_scale": (1, 3, 1, 1)},
    "PEFT's DoRA": {"to_k.lora_A.weight": (2, 12), "to_k.lora_B.weight": (20, 2), "to_k.lora_magnitude_vector.weight": (20,)},
}  # fmt: skip


def file_of(path, kind, alpha=None):
    tensors = {key: drawn(*shape, seed=k, std=0.6) for k, (key, shape) in enumerate(CHANGES[kind].items())}
    if alpha is not None:
        tensors |= {f"{module}.alpha": torch.tensor(alpha) for module in {key.split(".")[0] for key in tensors}}
    save_file(tensors, path)
    return path


def merged(host, adapter, strength):
    """The host with every change in its weights: by `change` and `shift`, which the test of ComfyUI's loader checks."""
    out = copy.deepcopy(host)
    for name, layer in adapter.layers.items():
        module = out.get_submodule(name)
        shape = LayerShape.of(module) or LayerShape.of_other(module)
        fitting = layer.on(shape)
        weight = module.weight.data
        module.weight.data = weight + strength * fitting.change(weight)
        if fitting.shift() is not None:
            module.bias.data = module.bias.data + strength * fitting.shift()
    return out


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_beside_the_layer_is_the_change_in_its_weight(tmp_path, host, x, kind, strength):
    adapter = load_adapter(file_of(tmp_path / "a.safetensors", kind))
    plain, before = host(x), {name: set(m.__dict__) for name, m in host.named_modules()}
    parameters = {name: id(p) for name, p in host.named_parameters()}
    expected = merged(host, adapter, strength)(x)
    with attach(host, adapter, strength):
        found = host(x)
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(host(x), plain) and {name: set(m.__dict__) for name, m in host.named_modules()} == before
    assert {name: id(p) for name, p in host.named_parameters()} == parameters


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "kind",
    [kind for kind in CHANGES if "norm" not in kind and "embedding" not in kind and "Conv1d" not in kind and "3x3" not in kind],
)
def test_the_forms_equal_the_reference(tmp_path, host, x, kind, grad):
    for name, layer in load_adapter(file_of(tmp_path / "a.safetensors", kind, alpha=1.5)).double().layers.items():
        module = host.get_submodule(name).double()
        fitting = layer.on(LayerShape.of(module))
        y = x.double() if fitting.shape.is_conv else drawn(2, 6, 12).double()
        frozen = HostLayer(fitting.shape, module, module.weight, module.bias, module)
        weights = [fitting.weights(lambda p: p, dma=0.7, sta=1.0)]
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(dispatch.forward(y, frozen, weights), reference.forward(y, frozen, weights))


@pytest.mark.parametrize("kind", CHANGES)
def test_saved_again_they_are_the_same(tmp_path, host, x, kind):
    first = load_adapter(file_of(tmp_path / "a.safetensors", kind, alpha=1.5))
    save_adapter(first, tmp_path / "b.safetensors")
    again = load_adapter(tmp_path / "b.safetensors")
    assert set(again.names) == set(first.names)
    with attach(host, first):
        expected = host(x)
    with attach(host, again):
        torch.testing.assert_close(host(x), expected)


def test_biases_of_layers_without_one_are_named(tmp_path, host, x):
    tensors = {"to_k.diff": drawn(20, 12), "to_k.diff_b": drawn(20)}
    save_file(tensors, tmp_path / "a.safetensors")
    with attach(host, load_adapter(tmp_path / "a.safetensors")) as attached:
        assert "changes of biases that these layers of the model do not have (1): to_k" in str(attached)
        host(x)


# --- the authors' DiffuseKronA -----------------------------------------------------------------------------------------


def of_the_authors(path, d=20, k=12, a1=4, a2=3):
    """As the released program saves it: down (a2, a1), up (b1, b2), on attention processors."""
    tensors = {}
    for number, projection in enumerate(("q", "k", "v", "out")):
        key = f"unet.{BLOCK}.attn1.processor.to_{projection}_lora"
        tensors[f"{key}.down.weight"] = drawn(a2, a1, seed=number)
        tensors[f"{key}.up.weight"] = drawn(d // a1, k // a2, seed=9 + number)
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize(("a1", "a2"), [(4, 3), (5, 2), (4, 6), (2, 2)])
def test_files_of_diffusekronas_program_keep_its_order_of_rows(tmp_path, a1, a2):
    tensors = of_the_authors(tmp_path / "a.safetensors", a1=a1, a2=a2)
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert f"{BLOCK}.attn1.to_out.0" in adapter.names
    key = f"unet.{BLOCK}.attn1.processor.to_q_lora"
    down, up = tensors[f"{key}.down.weight"], tensors[f"{key}.up.weight"]
    expected = torch.einsum("rj,is->rsij", up, down).reshape(20, 12)  # [r·a1 + s, i·b2 + j] = up[r, j] · down[i, s]
    layer = adapter.layers[f"{BLOCK}.attn1.to_q"].on(LayerShape(12, 20))
    assert isinstance(layer, KroneckerLayer) and layer.config.permuted
    torch.testing.assert_close(layer.delta(), expected)
    save_adapter(adapter, tmp_path / "b.safetensors")
    again = load_adapter(tmp_path / "b.safetensors").layers[f"{BLOCK}.attn1.to_q"].on(LayerShape(12, 20))
    torch.testing.assert_close(again.delta(), expected)


def test_a_common_rank_by_chance_is_told_by_the_models_layer(tmp_path):
    of_the_authors(tmp_path / "a.safetensors", d=16, k=16, a1=4, a2=4)  # up (4, 4), down (4, 4): a LoRA on 4 channels, too
    host = nn.ModuleDict({"to_q": nn.Linear(16, 16)})
    adapter = load_adapter(tmp_path / "a.safetensors")
    name = f"{BLOCK}.attn1.to_q"
    with attach(host, adapter, layers="to_q", names={name: "to_q"}) as attached:
        assert isinstance(attached.sites[0][0].layer, KroneckerLayer)


# --- what is refused, by its name --------------------------------------------------------------------------------------

UNSUPPORTED = {
    "OFT": ({"a.oft_blocks": (2, 3, 3)}, "OFT or BOFT is not supported"),
    "PEFT's OFT": ({"a.oft_R.weight": (2, 3, 3)}, "OFT is not supported"),
    "BOFT": ({"a.oft_blocks": (2, 2, 3, 3), "a.rescale": (3, 1)}, "OFT or BOFT is not supported"),
    "PEFT's BOFT": ({"a.boft_R": (2, 2, 3, 3), "a.boft_s": (3, 1)}, "BOFT is not supported"),
    "GLoRA": ({f"a.{part}.weight": (3, 3) for part in ("a1", "a2", "b1", "b2")}, "GLoRA is not supported"),
    "IA3": ({"a.ia3_l": (3, 1)}, "IA3 is not supported"),
    "VeRA": ({"a.vera_lambda_b": (3,), "a.vera_lambda_d": (3,)}, "VeRA is not supported"),
    "AdaLoRA": ({"a.lora_A.weight": (2, 3), "a.lora_B.weight": (3, 2), "a.lora_E": (2, 1)}, "AdaLoRA is not supported"),
    "Control LoRA": ({"a.lora_A.weight": (2, 3), "a.lora_B.weight": (3, 2), "a.reshape_weight": (2,)}, "widens layers is not supported"),
    "set_weight": ({"a.set_weight": (3,)}, "set_weight) is not supported"),
    "alpha alone": ({"a.alpha": ()}, "alpha without the matrices it belongs to"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_what_is_not_supported_is_called_by_its_name(tmp_path, kind):
    shapes, message = UNSUPPORTED[kind]
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError) as error:
        load_adapter(tmp_path / "a.safetensors")
    assert message in str(error.value) and str(error.value).startswith("a.safetensors: none of its 1 layers")


@pytest.mark.parametrize("kind", [kind for kind in UNSUPPORTED if kind != "alpha alone"])
def test_beside_what_is_supported_it_is_named(tmp_path, host, kind):
    shapes, message = UNSUPPORTED[kind]
    tensors = {key: torch.ones(shape) for key, shape in shapes.items()}
    supported = {
        f"{name}.lora_{side}.weight": torch.ones(shape)
        for name in ("to_q", "to_k")
        for side, shape in (("down", (2, 12)), ("up", (20, 2)))
    }
    save_file({**tensors, **supported}, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert (
        list(adapter.unused) == ["a"] and adapter.unused["a"] in message + " is not supported"
    ) or message in adapter.unused["a"]
    with attach(host, adapter) as attached:
        assert "2 of 3 layers matched (67%)" in str(attached) and message in str(attached)
    more = {key.replace("a.", "b.", 1): value.clone() for key, value in tensors.items()}
    save_file({**tensors, **more, **{k: v for k, v in supported.items() if "to_q" in k}}, tmp_path / "b.safetensors")
    with pytest.raises(AdapterFileError, match="only 1 of its 3 layers can be used"):
        load_adapter(tmp_path / "b.safetensors")


def test_a_control_lora_for_flux_is_refused_whole(tmp_path):
    """What widens the input and replaces norms is worth nothing in part."""
    shapes = {
        f"double_blocks.{n}.img_attn.qkv.lora_{side}.weight": shape
        for n in range(9)
        for side, shape in (("A", (2, 3)), ("B", (9, 2)))
    }
    shapes |= {"img_in.lora_A.weight": (2, 6), "img_in.lora_B.weight": (3, 2), "single_blocks.0.norm.key_norm.scale": (3,)}
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="a.safetensors: this is a Control LoRA for Flux"):
        load_adapter(tmp_path / "a.safetensors")


def test_a_tensor_of_no_known_kind_is_named(tmp_path, host):
    save_file({"to_q.diff": torch.ones(20, 12), "to_q.magic": torch.ones(1)}, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert adapter.unused == {"to_q.magic": "a tensor of a kind that is not known"}


def test_less_than_half_in_the_model_is_an_error_that_says_why(tmp_path, host):
    tensors = {f"{name}.diff": torch.ones(20, 12) for name in ("to_q", "other.0", "other.1")}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    with pytest.raises(
        AdapterMismatchError,
        match=r"a: 1 of 3 layers matched \(33%\), which is less than half.*not in this model \(2\): other.0",
    ):
        attach(host, adapter)
    attach(host, adapter, layers="to_q").detach()


TWICE = {
    "two adapters of PEFT": ({"a.lora_A.one.weight": (2, 3), "a.lora_B.one.weight": (3, 2), "b.lora_A.two.weight": (2, 3), "b.lora_B.two.weight": (3, 2)},
                             "2 adapters in one file (one, two)"),
    "one with a name and one without": ({"a.lora_A.one.weight": (2, 3), "a.lora_B.one.weight": (3, 2), "b.lora_A.weight": (2, 3), "b.lora_B.weight": (3, 2)},
                                        "two adapters in one file, 'one' and one without a name"),
    "two spellings of a part": ({"a.lora_A.weight": (2, 3), "a.lora_down.weight": (2, 3), "a.lora_B.weight": (3, 2)}, "are the same part of one layer, twice"),
    "two spellings of a layer": ({f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q.lora_down.weight": (2, 3), f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q.lora_up.weight": (3, 2),
                                  f"unet.{BLOCK}.attn1.to_q.lora_A.weight": (2, 3), f"unet.{BLOCK}.attn1.to_q.lora_B.weight": (3, 2)}, "are two spellings of one layer"),
    "LoRA and LoKr": ({"a.lora_A.weight": (2, 3), "a.lora_B.weight": (3, 2), "a.lokr_w1": (1, 1), "a.lokr_w2": (3, 3)}, "the file has both LoKr and LoRA for this layer"),
    "LoRA and a difference": ({"a.lora_A.weight": (2, 3), "a.lora_B.weight": (3, 2), "a.diff": (3, 3)}, "the file has both LoRA and difference for this layer"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TWICE)
def test_nothing_is_there_twice(tmp_path, kind):
    shapes, message = TWICE[kind]
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError) as error:
        load_adapter(tmp_path / "a.safetensors")
    assert message in str(error.value) and str(error.value).startswith("a.safetensors: ")


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_key_that_is_in_the_header_twice(tmp_path):
    entry = '"a.diff":{"dtype":"F32","shape":[1,1],"data_offsets":[%d,%d]}'
    text = "{" + entry % (0, 4) + "," + entry % (4, 8) + "}"
    with pytest.raises(AdapterFileError, match="a.safetensors: header: a.diff is in it twice"):
        load_adapter(raw(tmp_path / "a.safetensors", text.encode(), bytes(8)))


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LAYER = {"a.styleinject_A": entry("F16", [1, 1, 1], 0, 2), "a.styleinject_B": entry("F16", [1, 1], 2, 4)}
DAMAGED = {
    "an alpha of two numbers": ({"a.lora_A.weight": entry("F16", [1, 1], 0, 2), "a.lora_B.weight": entry("F16", [1, 1], 2, 4), "a.alpha": entry("F16", [2], 4, 8)}, "alpha is [0.0, 0.0]"),
    "a complex alpha": ({"a.lora_A.weight": entry("F16", [1, 1], 0, 2), "a.lora_B.weight": entry("F16", [1, 1], 2, 4), "a.alpha": entry("C64", [], 4, 12)}, "alpha"),
    "an alpha beyond every number": ({"__metadata__": {"styleinject_config": '{"alpha": 1' + "0" * 400 + "}"}, **LAYER}, "alpha"),
    "a config nested too deep": ({"__metadata__": {"styleinject_config": "[" * 5000}, **LAYER}, "nested too deep"),
    "style names nested too deep": ({"__metadata__": {"styleinject.style_names": "[" * 5000}, **LAYER}, ""),
    "a dtype that torch does not know": ({"a.styleinject_A": entry("F4", [1, 1, 2], 0, 1), "a.styleinject_B": entry("F16", [1, 1], 1, 3)}, ""),
    "a LoRA of rank 0": ({"a.lora_A.weight": entry("F16", [0, 1], 0, 0), "a.lora_B.weight": entry("F16", [1, 0], 0, 0)}, "rank"),
    "rank 0": ({"a.styleinject_A": entry("F16", [1, 0, 1], 0, 0), "a.styleinject_B": entry("F16", [1, 0], 0, 0)}, ""),
    "no styles": ({"a.styleinject_A": entry("F16", [0, 1, 1], 0, 0), "a.styleinject_B": entry("F16", [1, 1], 0, 2)}, ""),
    "a kernel of 0": ({"a.styleinject_A": entry("F16", [1, 1, 1, 0, 3], 0, 0), "a.styleinject_B": entry("F16", [1, 1], 0, 2)}, ""),
    "a text encoder's alone": ({f"text_model.{key}": value for key, value in LAYER.items()}, "all are of a text encoder"),
    "a version of 4301 digits": ({"__metadata__": {"styleinject_version": "9" * 4301}, **LAYER}, "styleinject_version"),
    "a version in superscript": ({"__metadata__": {"styleinject_version": "\u00b2"}, **LAYER}, "styleinject_version"),
    "no header": (b"[]", "damaged"),
    "metadata that is no text": ({"__metadata__": {"a": 1}, **LAYER}, "damaged"),
    "offsets beyond the file": ({"a.diff": entry("F32", [4, 4], 0, 64)}, "damaged"),
    "a shape that contradicts its offsets": ({"a.diff": entry("F32", [4, 4], 0, 4)}, "damaged"),
    "a shape of huge numbers": ({"a.diff": entry("F32", [2**62, 2**62], 0, 4)}, "damaged"),
    "a shape of no numbers": ({"a.diff": entry("F32", ["4", 1], 0, 4)}, "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_are_named(tmp_path, kind):
    header, message = DAMAGED[kind]
    path = raw(tmp_path / "style.safetensors", header, bytes(12 if "complex" in kind else 8 if "two" in kind else 4))
    if not isinstance(header, bytes):
        ends = [value["data_offsets"][1] for key, value in header.items() if key != "__metadata__"]
        path = raw(path, header, bytes(min(max(ends), 64) if "offsets beyond" not in kind else 4))
    if kind == "style names nested too deep":
        assert load_adapter(path).style_names == ("style 1",)
        return
    with pytest.raises(AdapterFileError) as error:
        load_adapter(path)
    assert str(error.value).startswith("style.safetensors: ") and message in str(error.value) and len(str(error.value)) < 1000


def test_long_names_and_many_styles_take_no_time(tmp_path):
    import time

    name = "lora_" * 40_000
    save_file(
        {f"{name}.lora_A.weight": torch.ones(1, 2), f"{name}.lora_B.weight": torch.ones(2, 1)}, tmp_path / "a.safetensors"
    )
    made = {"q.styleinject_A": torch.ones(100_000, 1, 1), "q.styleinject_B": torch.ones(1, 1),
            "q.styleinject_router.weight": torch.zeros(100_000, 1), "q.styleinject_router.bias": torch.zeros(100_000)}  # fmt: skip
    save_file(made, tmp_path / "b.safetensors")
    start = time.process_time()
    assert load_adapter(tmp_path / "a.safetensors").names
    assert load_adapter(tmp_path / "b.safetensors").layers["q"].config.n_styles == 100_000
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("key", "module", "part", "adapter"),
    [
        ("a.b.lora_A.weight", "a.b", "down", ""),
        ("a.b.lora_B.style.weight", "a.b", "up", "style"),
        ("a.attn1.processor.to_q_lora.up.weight", "a.attn1.processor.to_q", "up", ""),
        ("double_blocks.3.processor.qkv_lora2.down.weight", "double_blocks.3.txt_attn.qkv", "down", ""),
        ("single_blocks.3.processor.proj_lora.up.weight", "single_blocks.3.linear2", "up", ""),
        ("a.lora_magnitude_vector.default", "a", "magnitude", "default"),
        ("a.styleinject_router.weight", "a", "router.weight", ""),
    ],
)
def test_keys(key, module, part, adapter):
    found = parse(key)
    assert (found.module, found.part, found.adapter) == (module, part, adapter)


def tiny_unet():
    """A U-Net of diffusers with one attention, a few channels wide."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4,
    ).requires_grad_(False)  # fmt: skip


def test_lora_files_of_ours_are_loras_for_diffusers(tmp_path):
    """`method = "lora"` is written with kohya's keys and alpha; tests/nodes asks ComfyUI's loader."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    unet, given = tiny_unet(), (torch.randn(2, 4, 8, 8), torch.tensor([3, 3]), torch.randn(2, 5, 12))
    config = AdapterConfig(r=2, n_styles=1, sta="none", alpha=1.0, target_modules=("to_q", "to_k", "to_v", "to_out"))
    made = Adapter.create(unet, config)
    for n, layer in enumerate(made.layers.values()):
        layer.B.data.copy_(drawn(*layer.B.shape, seed=n, std=1.0))
    save_adapter(made, tmp_path / "a.safetensors")
    with torch.no_grad():
        plain = unet(*given).sample
        with attach(unet, made):
            expected = unet(*given).sample
        pipeline = diffusers.StableDiffusionPipeline
        state, alphas = pipeline.lora_state_dict(tmp_path, weight_name="a.safetensors", unet_config=unet.config)
        pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet)
        found = unet(*given).sample
    assert (expected - plain).abs().max() > 0.02
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
