"""DiffuseKronA: the paper's counts, the change against an independent A ⊗ B, what a call costs and keeps, and files."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from styleinject_core import Adapter, AdapterConfig, AdapterFileError, LayerShape, attach, load_adapter, save_adapter
from styleinject_core.cli import main
from styleinject_core.functional import dispatch, fold, reference, stack
from styleinject_core.functional.host import HostLayer
from styleinject_core.functional.update import prepare
from styleinject_core.hosts.architectures import ARCHITECTURES
from styleinject_core.methods.kronecker import KroneckerConfig, KroneckerLayer
from styleinject_core.selector import select

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


# --- the design's table ----------------------------------------------------------------------------------------------


def count(base: str, config) -> tuple[int, int]:
    """(layers, numbers) of an adapter on an architecture, without a number of it in memory."""
    with torch.device("meta"):
        adapter = Adapter.create(ARCHITECTURES[base].shapes(), config)
    return len(adapter.names), adapter.parameter_count()


@pytest.mark.parametrize(
    ("p", "numbers"),
    [
        (64, 14_960_640),
        (128, 7_534_080),
        (256, 3_874_560),
        (512, 2_152_320),
        (1024, 1_506_240),
        (2048, 1_613_280),
        (4096, 2_526_960),
    ],
)
def test_counts_of_sdxl(p, numbers):
    assert count("sdxl", KroneckerConfig((64, p // 64))) == (560, numbers)


@pytest.mark.parametrize(("factors", "numbers"), [((64, 4), 398_048), ((64, 8), 248_176)])
def test_counts_of_sd15(factors, numbers):
    assert count("sd15", KroneckerConfig(factors)) == (128, numbers)


def test_counts_of_lora_on_the_same_layers():
    lora = AdapterConfig(r=4, n_styles=1, sta="none", target_modules=PROJECTIONS)
    assert count("sdxl", lora) == (560, 5_806_080) and count("sd15", lora) == (128, 797_184)
    assert pytest.approx(1 - 0.333, abs=1e-3) == 3_874_560 / 5_806_080  # a third fewer, the paper's claim


@pytest.mark.parametrize(("base", "numbers", "layers"), [("sdxl", 3_874_560, 560), ("sd15", 398_048, 128)])
def test_init_writes_them(tmp_path, capsys, base, numbers, layers):
    out = tmp_path / "new.safetensors"
    command = ["init", "--base", base, "--method", "kronecker", "--factors", "64,4", "--targets", ",".join(PROJECTIONS)]
    assert main([*command, str(out)]) == 0
    assert f"{layers} layers" in capsys.readouterr().out
    tensors = load_file(out)
    assert len(tensors) == 2 * layers and sum(t.numel() for t in tensors.values()) == numbers
    assert all(key.startswith("lora_unet_") and key.endswith((".lokr_w1", ".lokr_w2")) for key in tensors)
    with safe_open(out, "pt") as file:
        assert file.metadata()["modelspec.architecture"] == f"{ARCHITECTURES[base].modelspec}/kronecker"
    assert main(["info", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "DiffuseKronA for Stable Diffusion" in shown and "factors      64 x 4" in shown and "rank" not in shown
    assert main(["info", "--json", str(out)]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["method"] == "kronecker" and summary["config"]["factors"] == [64, 4] and summary["parameters"] == numbers


def test_defaults_are_the_papers(tmp_path):
    assert main(["init", "--base", "demo", "--method", "kronecker", str(tmp_path / "a.safetensors")]) == 0
    config = load_adapter(tmp_path / "a.safetensors").config
    assert isinstance(config, KroneckerConfig) and config.factors == (64, 4)
    assert config.target_modules == ("queries", "keys", "values", "outputs")
    shapes = ARCHITECTURES["sd15"].shapes()
    assert select(shapes, ",".join(config.target_modules)) == select(shapes, ",".join(PROJECTIONS))


# --- the change ------------------------------------------------------------------------------------------------------


def plain(A: Tensor, B: Tensor, permuted: bool) -> Tensor:
    """A ⊗ B by its definition, and by what the released program computes (ΔW[r·a1 + s, i·b2 + j] = up[r, j] · down[i, s])."""
    if permuted:
        return torch.einsum("rj...,is->rsij...", B, A.mT).flatten(2, 3).flatten(0, 1)
    return torch.einsum("ij,rc...->irjc...", A, B).flatten(2, 3).flatten(0, 1)


FACTORS = [(1, 1), (2, 4), (8, 2), (3, 12), (24, 1), (1, 12), (24, 12)]  # of 24 outputs, 12 inputs
CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "stride 2": {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
    "dilated": {"kernel_size": (1, 3), "padding": (0, 2), "dilation": 2},
    "1x1": {"kernel_size": 1, "bias": False},
    "1x1, stride 2": {"kernel_size": 1, "stride": 2},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
}


def layer_of(module: nn.Module, factors: tuple[int, int], permuted: bool) -> KroneckerLayer:
    shape = LayerShape.of(module)
    layer = KroneckerLayer(shape, KroneckerConfig(factors, permuted=permuted)).to(module.weight.dtype)
    assert tuple(layer.A.shape) == factors
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def check(module: nn.Module, x: Tensor, factors: tuple[int, int], permuted: bool) -> None:
    """Every form, with and without gradients, is the frozen layer with W0 + 0.7 ΔW."""
    layer = layer_of(module, factors, permuted)
    delta = plain(layer.A, layer.B, permuted)
    torch.testing.assert_close(layer.delta().double(), delta, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        expected = torch.func.functional_call(module, {"weight": module.weight + 0.7 * delta}, x)
    frozen = HostLayer(layer.shape, module, module.weight, module.bias, module)
    weights = [layer.weights(lambda p: p, dma=0.7, sta=0.0)]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            forms = [reference, stack, dispatch]
            forms += [fold] if fold.can_fold(frozen, prepare(weights)) else []
            assert grad or fold in forms or getattr(module, "padding_mode", "zeros") != "zeros"
            for form in forms:
                torch.testing.assert_close(form.forward(x, frozen, weights), expected)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(factors, permuted, bias):
    torch.manual_seed(0)
    module = nn.Linear(12, 24, bias).double().requires_grad_(False)
    for batch, tokens in ((3, 1), (1, 7), (3, 50)):
        check(module, torch.randn(batch, tokens, 12, dtype=torch.float64), factors, permuted)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions(kind, factors, permuted):
    torch.manual_seed(0)
    module = nn.Conv2d(12, 24, **CONVOLUTIONS[kind]).double().requires_grad_(False)
    for batch, height, width in ((3, 1, 1), (1, 5, 4), (3, 11, 12)):
        check(module, torch.randn(batch, 12, height, width, dtype=torch.float64), factors, permuted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factors", [(8, 2), (3, 12)])
def test_in_half_precision(factors, dtype):
    torch.manual_seed(0)
    for module, x in ((nn.Linear(12, 24), torch.randn(2, 9, 12)), (nn.Conv2d(12, 24, 3, padding=1), torch.randn(2, 12, 5, 5))):
        module, x = module.to(dtype).requires_grad_(False), x.to(dtype)
        layer = layer_of(module, factors, permuted=False).requires_grad_(False)
        frozen = HostLayer(layer.shape, module, module.weight, module.bias, module)
        exact = F.linear if isinstance(module, nn.Linear) else lambda *args: F.conv2d(*args, padding=1)
        weight = module.weight.double() + plain(layer.A.double(), layer.B.double(), False)
        expected = exact(x.double(), weight, module.bias.double())
        for form in (stack, fold):
            out = form.forward(x, frozen, [layer.weights(lambda p: p, dma=1.0, sta=0.0)])
            assert out.dtype == dtype
            error = (out.double() - expected).abs().max() / expected.abs().max()
            assert error < 4 * torch.finfo(dtype).eps


# --- what it costs ---------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that anything returned."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.entries = max(self.entries, out.numel() if isinstance(out, Tensor) else 0)
        return out


@pytest.mark.parametrize(
    ("factors", "multiplications"),
    [
        ((64, 4), 1280 * 20 + 4 * 1280),  # B first: k·b1 + a2·d
        ((4, 64), 1280 * 4 + 20 * 1280),  # A first: k·a1 + b2·d
        ((32, 32), 1280 * 32 + 40 * 1280),  # k·a1 + b2·d, as b1 = 40
        ((1280, 1), 1280 * 1 + 1 * 1280),  # a LoRA of rank 1: (a (1 b)ᵀ)
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_two_thin_products_in_the_cheaper_order(factors, multiplications, grad):
    """Multiplications of one token, counted by torch, and no matrix of W0's size."""
    module = nn.Linear(1280, 1280, device="meta").requires_grad_(False)
    with torch.device("meta"):
        layer = KroneckerLayer(LayerShape(1280, 1280), KroneckerConfig(factors))
        x = torch.randn(1, 1, 1280)
    (change,) = prepare([layer.weights(lambda p: p, dma=1.0, sta=0.0)])
    host = HostLayer(layer.shape, module, module.weight, None, module)
    with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter, Largest() as largest:
        change.beside(torch.zeros(1, 1, 1280, device="meta"), x, host, owned=False)
    assert counter.get_total_flops() == 2 * multiplications
    assert largest.entries < 1280 * 1280


@pytest.mark.parametrize(
    ("factors", "stride", "multiplications"),
    [
        ((64, 4), 1, 1280 * 20 * 9 + 4 * 1280),
        ((4, 64), 1, 1280 * 4 + 4 * 20 * 320 * 9),
        ((4, 64), 2, 4 * 1280 * 4 + 4 * 20 * 320 * 9),  # A on four input pixels for each output pixel
    ],
)
def test_of_a_convolution_too(factors, stride, multiplications):
    module = nn.Conv2d(1280, 1280, 3, stride, 1, device="meta").requires_grad_(False)
    with torch.device("meta"):
        layer = KroneckerLayer(LayerShape(1280, 1280, (3, 3)), KroneckerConfig(factors))
        x = torch.randn(1, 1280, 8 * stride, 8 * stride)
    (change,) = prepare([layer.weights(lambda p: p, dma=1.0, sta=0.0)])
    host = HostLayer(layer.shape, module, module.weight, None, module)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        change.beside(torch.zeros(1, 1280, 8, 8, device="meta"), x, host, owned=False)
    assert counter.get_total_flops() == 2 * 64 * multiplications


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("factors", [(8, 2), (3, 12)])
def test_training_keeps_the_input_alone(factors, permuted):
    module = nn.Linear(12, 24).double().requires_grad_(False)
    layer, x = layer_of(module, factors, permuted), torch.randn(2, 40, 12, dtype=torch.float64, requires_grad=True)
    kept = set()

    def pack(tensor):
        kept.add((tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()))
        return tensor

    with attach(module, Adapter({"": layer}, layer.config)), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = module(x)
    large = {pointer for pointer, size in kept if size > 24 * 12 * 8}  # beyond weights and factors
    assert large == {x.untyped_storage().data_ptr()}
    gradients = torch.autograd.grad(out.sin().sum(), [x, layer.A, layer.B])
    expected = F.linear(x, module.weight + plain(layer.A, layer.B, permuted), module.bias)
    for found, wanted in zip(gradients, torch.autograd.grad(expected.sin().sum(), [x, layer.A, layer.B]), strict=True):
        torch.testing.assert_close(found, wanted)


# --- factors, files --------------------------------------------------------------------------------------------------


def test_factors_that_do_not_divide_take_the_next_smaller_divisors_and_say_so_once(caplog):
    shapes = {f"blocks.{k}.to_q": LayerShape(30, 24) for k in range(5)}
    with caplog.at_level(logging.WARNING):
        adapter = Adapter.create(shapes, KroneckerConfig((7, 4), target_modules=("to_q",)), "mine")
    assert {tuple(layer.A.shape) for layer in adapter.layers.values()} == {(6, 3)}
    assert {tuple(layer.B.shape) for layer in adapter.layers.values()} == {(4, 10)}
    (record,) = caplog.records
    expected = "; ".join(f"blocks.{k}.to_q: factors [7, 4] became [6, 3]" for k in range(3))
    assert record.getMessage() == f"mine: {expected} and 2 layers more"


@pytest.mark.parametrize("factors", [(4,), (4, 4, 4), (0, 4), (4, -1), (True, 4), (4.0, 4), "44"])
def test_factors_out_of_range(factors):
    with pytest.raises(ValueError, match="^factors: expected two integers of at least 1, found "):
        KroneckerConfig(factors)


@pytest.fixture
def adapter() -> Adapter:
    torch.manual_seed(0)
    adapter = Adapter.create(
        ARCHITECTURES["demo"].shapes(), KroneckerConfig((8, 4), target_modules=("self & to_q", "mid & conv"))
    )
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.B.normal_()
    return adapter


def test_a_new_adapters_initial_values(adapter):
    layer = KroneckerLayer(LayerShape(4096, 4096), KroneckerConfig((64, 64)))
    assert not layer.B.any() and layer.A.std().item() == pytest.approx(64**-0.5, rel=0.05)


def rewritten(path: Path, change) -> Path:
    """The file with other tensors or another header."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


def test_the_authors_order_of_rows_is_kept_in_our_files_and_read_by_nobody_else(tmp_path):
    permuted = KroneckerConfig((8, 4), permuted=True, target_modules=("self & to_q",))
    adapter = Adapter.create(ARCHITECTURES["demo"].shapes(), permuted)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.B.normal_()
    save_adapter(adapter, tmp_path / "a.safetensors")
    assert all(".kronecker_permuted_" in key for key in load_file(tmp_path / "a.safetensors"))
    loaded = load_adapter(tmp_path / "a.safetensors")
    for name, layer in loaded.layers.items():
        assert layer.config.permuted
        torch.testing.assert_close(layer.delta(), plain(adapter.layers[name].A, adapter.layers[name].B, True))


def test_a_factor_is_missing(adapter, tmp_path):
    save_adapter(adapter, tmp_path / "a.safetensors")
    key = next(key for key in load_file(tmp_path / "a.safetensors") if key.endswith("lokr_w2"))
    path = rewritten(tmp_path / "a.safetensors", lambda tensors, _: tensors.pop(key))
    with pytest.raises(AdapterFileError, match=r"a\.safetensors: .*: .*w2.* is missing"):
        load_adapter(path)


def test_factors_that_contradict_the_config(adapter, tmp_path):
    save_adapter(adapter, tmp_path / "a.safetensors")

    def other(_, metadata):
        metadata["styleinject_config"] = json.dumps({**json.loads(metadata["styleinject_config"]), "factors": [2, 2]})

    with pytest.raises(AdapterFileError, match=r": A is \(8, 4\), but the config's factors \(2, 2\) give \(2, 2\) on a Linear"):
        load_adapter(rewritten(tmp_path / "a.safetensors", other))


def test_factors_of_another_layers_sizes(adapter):
    from styleinject_core import AdapterMismatchError

    host = nn.ModuleDict({"to_q": nn.Linear(6, 6)})
    layer = next(iter(adapter.layers.values()))
    with pytest.raises(AdapterMismatchError, match="to_q: adapter made for Linear 96->96, model has Linear 6->6"):
        attach(host, Adapter({"to_q": layer}, layer.config))


def test_both_orders_of_rows_for_one_layer(adapter, tmp_path):
    save_adapter(adapter, tmp_path / "a.safetensors")

    def both(tensors, _):
        key = next(key for key in tensors if key.endswith("lokr_w1"))
        tensors[key.replace(".lokr_w1", ".kronecker_permuted_A")] = tensors[key].clone()

    with pytest.raises(AdapterFileError, match="both"):
        load_adapter(rewritten(tmp_path / "a.safetensors", both))


def test_lora_keys_for_the_same_layer(adapter, tmp_path):
    save_adapter(adapter, tmp_path / "a.safetensors")

    def both(tensors, _):
        module = next(key for key in tensors if key.endswith("lokr_w1")).removesuffix(".lokr_w1")
        tensors |= {f"{module}.lora_down.weight": torch.randn(4, 96), f"{module}.lora_up.weight": torch.randn(96, 4)}

    with pytest.raises(AdapterFileError, match="LoRA"):
        load_adapter(rewritten(tmp_path / "a.safetensors", both))
