"""stack, fold and dispatch equal the reference on every kind of layer, odd shapes and low precisions included."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from styleinject_core import AdapterConfig, LayerShape
from styleinject_core.functional import dispatch, fold, reference, stack
from styleinject_core.functional.host import HostLayer
from styleinject_core.functional.update import prepare
from styleinject_core.methods.styleinject import StyleInjectLayer
from styleinject_core.site import HostProgram

LINEARS = [(1, 1, 5, 7), (3, 1, 16, 8), (2, 77, 24, 12), (3, 65, 8, 33), (2, 130, 32, 64)]  # B, L, k, d
CONVS = [  # B, k, H, W, d, kernel, stride, padding, dilation, padding mode
    (1, 4, 1, 1, 6, 3, 1, 1, 1, "zeros"),
    (3, 5, 9, 7, 4, 3, 1, 1, 1, "zeros"),
    (2, 6, 8, 8, 7, 3, 2, 1, 1, "zeros"),
    (2, 6, 9, 11, 7, (3, 1), (1, 2), (1, 0), 1, "zeros"),
    (2, 3, 12, 10, 5, 3, 1, 2, 2, "zeros"),
    (2, 3, 7, 7, 5, 5, 3, 4, 1, "zeros"),
    (2, 4, 16, 16, 8, 1, 1, 0, 1, "zeros"),
    (2, 4, 8, 8, 8, 3, 1, "same", 1, "zeros"),
    (2, 4, 8, 8, 8, 3, 1, 1, 1, "circular"),
    (2, 4, 8, 6, 8, 3, 2, 1, 1, "reflect"),
]
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}


def linear_case(batch, tokens, k, d, bias=True):
    return nn.Linear(k, d, bias=bias), torch.randn(batch, tokens, k) + 0.5


def conv_case(batch, k, height, width, d, kernel, stride, padding, dilation, mode, bias=True):
    module = nn.Conv2d(k, d, kernel, stride, padding, dilation, bias=bias, padding_mode=mode)
    return module, torch.randn(batch, k, height, width) + 0.5


CASES = [(linear_case, c) for c in LINEARS] + [(conv_case, c) for c in CONVS]


def trained_layer(module, seed=0, **config):
    """A layer adapter whose every parameter is away from its initial value."""
    torch.manual_seed(seed)
    layer = StyleInjectLayer(LayerShape.of(module), AdapterConfig(**config))
    for p in layer.parameters():
        p.data.copy_(torch.randn_like(p) * (0.3 if p is layer.hyper_weight or p is layer.hyper_bias else 0.5))
    return layer


def weights(layer, x, dma=1.0, sta=1.0):
    return layer.weights(lambda p: p.to(x.dtype), dma=dma, sta=sta)


def test_half_precision_does_not_shift_channels():
    """Channels with a mean far from 0: what bfloat16 leaves of 1 + G must be what μ is scaled by."""
    torch.manual_seed(0)
    module = nn.Linear(32, 24)
    with torch.no_grad():
        module.bias.fill_(20.0)
    layer = trained_layer(module, r=2, n_styles=2)
    with torch.no_grad():
        layer.hyper_weight.mul_(0.05)
        layer.hyper_bias.mul_(0.05)
        layer.B.zero_()
    x = torch.randn(2, 400, 32)
    half, y = copy.deepcopy(module).bfloat16(), x.bfloat16()
    out = stack.forward(y, host_of(half), [weights(layer, y)]).double()
    same = copy.deepcopy(half).double()
    expected = reference.forward(y.double(), host_of(same), [weights(layer, y.double())])
    shift = (out - expected).mean(1).abs().max() / expected.std(1).mean()
    rounding = (half(y).double() - same(y.double())).mean(1).abs().max() / expected.std(1).mean()
    assert shift < 4 * rounding + 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_additive_statistics_of_a_constant_channel(dtype):
    """σ = 0: G is huge, and h - μ is 0."""
    module = nn.Linear(6, 5).to(dtype)
    layer = trained_layer(module.float(), r=2, n_styles=2, sta="additive")
    module.to(dtype)
    with torch.no_grad():
        layer.hyper_bias.fill_(3.0)
    x = torch.randn(1, 1, 6).to(dtype)
    assert stack.forward(x, host_of(module), [weights(layer, x)]).isfinite().all()


def test_a_replaced_convolution_is_asked_itself():
    """As nodes for seamless textures replace it: around the border, not zeros."""
    module, x = conv_case(2, 4, 8, 6, 8, 3, 1, 1, 1, "zeros")
    layer = trained_layer(module, r=2, n_styles=2)
    wrapped = nn.Conv2d(4, 8, 3, 1, 1, padding_mode="circular")
    wrapped.load_state_dict(module.state_dict())
    expected = reference.forward(x, host_of(wrapped), [weights(layer, x)])

    def circular(image, weight, bias):
        return nn.functional.conv2d(nn.functional.pad(image, (1, 1, 1, 1), mode="circular"), weight, bias)

    module._conv_forward = circular
    assert not HostProgram().readable(module, x)
    torch.testing.assert_close(module(x), wrapped(x))
    blind = HostLayer(LayerShape.of(module), module.forward, None, None, module)
    for form in (stack, dispatch, reference):
        torch.testing.assert_close(form.forward(x, blind, [weights(layer, x)]), expected, rtol=1e-4, atol=1e-5)


def host_of(module):
    return HostLayer(LayerShape.of(module), module.forward, module.weight, module.bias, module)


def relative_error(value, truth):
    return ((value.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30)).item()


def oracle(x, module, layers, **strengths):
    """The reference in float64, on weights and input as the low precision has rounded them."""
    double, module = x.double(), copy.deepcopy(module).double()
    layers = [copy.deepcopy(layer).double() for layer in layers]
    return reference.forward(double, host_of(module), [weights(layer, double, **strengths) for layer in layers])


def check(module, x, layers, dtype, form, **strengths):
    module, x = module.to(dtype), x.to(dtype)
    layers = [layer.to(dtype) for layer in layers]
    with torch.no_grad():
        result = form.forward(x, host_of(module), [weights(layer, x, **strengths) for layer in layers])
        truth = oracle(x, module, layers, **strengths)
    assert result.dtype == dtype and result.shape == truth.shape
    assert relative_error(result, truth) < BOUNDS[dtype]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    ("build", "case", "pool"),
    [(b, c, p) for b, c in CASES for p in ("mean", "sum", "token", "paper") if b is linear_case or p != "token"],
    ids=str,
)
@pytest.mark.parametrize("sta", ["multiplicative", "additive", "none"])
@pytest.mark.parametrize("styles", [1, 3])
def test_stack_equals_reference(build, case, bias, sta, pool, styles):
    module, x = build(*case, bias=bias)
    layer = trained_layer(module, r=4, n_styles=styles, sta=sta, router_pool=pool, alpha=6.0)
    check(module, x, [layer], torch.float32, stack)
    check(module, x, [layer], torch.float32, dispatch)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("build", "case"), CASES, ids=str)
@pytest.mark.parametrize(("sta", "styles"), list(itertools.product(["multiplicative", "none"], [1, 5])))
def test_fold_equals_reference(build, case, bias, sta, styles):
    module, x = build(*case, bias=bias)
    layer = trained_layer(module, r=3, n_styles=styles, sta=sta, alpha=2.0)
    if not fold.can_fold(host_of(module), prepare([weights(layer, x)])):
        assert module.padding_mode != "zeros" or module.padding == "same"
        return
    check(module, x, [layer], torch.float32, fold)
    check(module, x, [layer], torch.float64, fold)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [stack, fold], ids=["stack", "fold"])
@pytest.mark.parametrize(("build", "case"), [CASES[2], CASES[3], (conv_case, CONVS[1]), (conv_case, CONVS[2])], ids=str)
def test_precisions(build, case, form, dtype):
    module, x = build(*case)
    check(module, x, [trained_layer(module, r=4, n_styles=3)], dtype, form)


@pytest.mark.parametrize("form", [stack, fold, dispatch], ids=["stack", "fold", "dispatch"])
@pytest.mark.parametrize(("build", "case"), [(linear_case, (2, 77, 24, 12)), (conv_case, CONVS[1])], ids=["linear", "conv"])
def test_several_adapters_add_up_in_any_order(build, case, form):
    module, x = build(*case)
    layers = [trained_layer(module, seed, r=seed + 2, n_styles=seed + 1) for seed in range(3)]
    strengths = [(1.0, 0.5), (-0.7, 1.3), (0.0, 2.0)]
    host = host_of(module)
    with torch.no_grad():
        h = module(x).double()
        parts = [weights(layer, x, dma=d, sta=s) for layer, (d, s) in zip(layers, strengths, strict=True)]
        increments = sum(oracle(x, module, [layer], dma=d, sta=s) - h
                         for layer, (d, s) in zip(layers, strengths, strict=True))  # fmt: skip
        for order in itertools.permutations(range(3)):
            result = form.forward(x, host, [parts[k] for k in order])
            assert relative_error(result, h + increments) < 1e-5


def test_mixed_kinds_on_one_layer():
    """Token routing, additive STA and plain LoRA beside each other: only stack can, and dispatch chooses it."""
    module, x = linear_case(2, 20, 12, 9)
    layers = [
        trained_layer(module, 0, r=2, n_styles=3, router_pool="token"),
        trained_layer(module, 1, r=3, n_styles=2, sta="additive"),
        trained_layer(module, 2, r=4, n_styles=1, sta="none"),
        trained_layer(module, 3, r=1, n_styles=4),
    ]
    check(module, x, layers, torch.float32, dispatch)


@pytest.mark.parametrize("form", [reference, stack], ids=["reference", "stack"])
@pytest.mark.parametrize(("build", "case"), CASES, ids=str)
def test_identity_at_init(build, case, form):
    module, x = build(*case)
    layer = StyleInjectLayer(LayerShape.of(module), AdapterConfig(r=4, n_styles=3))
    out = form.forward(x, host_of(module), [weights(layer, x)])
    torch.testing.assert_close(out, module(x), rtol=1e-6, atol=1e-6)
    if form is stack:
        assert torch.equal(out, module(x))


@pytest.mark.parametrize(("build", "case"), CASES, ids=str)
def test_strength_zero_is_the_host_bit_for_bit(build, case):
    module, x = build(*case)
    layer = trained_layer(module, r=4, n_styles=3)
    out = dispatch.forward(x, host_of(module), [weights(layer, x, dma=0.0, sta=0.0)])
    assert torch.equal(out, module(x))


def test_gradients_equal_the_references():
    for build, case in [(linear_case, (2, 130, 8, 6)), (conv_case, CONVS[1])]:
        module, x = build(*case)
        module, x = module.double(), x.double().requires_grad_()
        layer = trained_layer(module, r=3, n_styles=4).double()
        target = torch.randn_like(module(x))
        grads = []
        for form in (reference, dispatch):
            loss = (form.forward(x, host_of(module), [weights(layer, x)]) - target).square().sum()
            grads.append(torch.autograd.grad(loss, [x, *layer.parameters()]))
        for expected, found in zip(*grads, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", [stack, fold], ids=["stack", "fold"])
@pytest.mark.parametrize(
    ("build", "case"), [(linear_case, (2, 130, 8, 6)), (conv_case, CONVS[6]), (conv_case, CONVS[2])], ids=str
)
def test_gradients_on_a_frozen_layer(build, case, form):
    """What training takes, for several adapters and strengths: nothing of the frozen layer, everything else."""
    module, x = build(*case)
    module, x = module.double().requires_grad_(False), x.double().requires_grad_()
    layers = [trained_layer(module, seed, r=3, n_styles=seed + 1, alpha=4.0).double() for seed in range(3)]
    target = torch.randn_like(module(x))
    grads = []
    for candidate in (reference, form):
        parts = [weights(layer, x, dma=0.7, sta=1.2) for layer in layers]
        loss = (candidate.forward(x, host_of(module), parts) - target).square().sum()
        grads.append(torch.autograd.grad(loss, [x, *(p for layer in layers for p in layer.parameters())], allow_unused=True))
    for expected, found in zip(*grads, strict=True):
        assert (expected is None) == (found is None)  # the router of a single style changes nothing
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5)], ids=str)
@pytest.mark.parametrize("wanted", ["everything", "parameters", "x"])
def test_by_token_keeps_no_projection_of_every_style_for_the_backward_pass(shape, wanted):
    """Gradients are the reference's all the same; a training keeps about x and h of each token, not n times r numbers more."""
    module, x = nn.Linear(7, 6).double().requires_grad_(False), torch.randn(*shape, 7, dtype=torch.float64)
    layer = trained_layer(module, r=4, n_styles=50, router_pool="token").double().requires_grad_(wanted != "x")
    x.requires_grad_(wanted != "parameters")
    leaves, kept = [*([x] if wanted != "parameters" else []), *(layer.parameters() if wanted != "x" else ())], set()

    def keep(tensor):
        kept.add((tensor.untyped_storage().data_ptr(), tensor.numel()))
        return tensor

    gradients = []
    for form in (reference, stack):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = form.forward(x, host_of(module), [weights(layer, x)]).pow(2).sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    assert max(numel for pointer, numel in kept if pointer not in own) <= shape[0] * shape[1] * 50


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("build", "case"), [(linear_case, (2, 130, 32, 16)), (linear_case, (2, 77, 24, 48)), (conv_case, CONVS[1])], ids=str
)
def test_float32_adapter_under_mixed_precision(build, case, base, autocast):
    """On a bfloat16 model, and under autocast on any: outputs agree with and without gradients, which come in float32."""
    module, x = build(*case)
    module = module.to(base).requires_grad_(False)
    layer = trained_layer(module, r=4, n_styles=3)
    x = x if autocast else x.to(base)  # under autocast normalization layers give float32, whatever the model's dtype
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = dispatch.forward(x, host_of(module), [weights(layer, x)])
        out.float().square().mean().backward()
        with torch.no_grad():
            inferred = dispatch.forward(x, host_of(module), [weights(layer, x)])
    copied = copy.deepcopy(layer)
    truth = oracle(x, module, [copied])
    bound = BOUNDS[torch.bfloat16 if autocast else base]
    assert out.dtype == inferred.dtype == (torch.bfloat16 if autocast else base)
    assert relative_error(out, truth) < bound and relative_error(inferred, truth) < bound
    copied = copied.double()
    copied.zero_grad()
    x = x.double()
    exact = reference.forward(x, host_of(copy.deepcopy(module).double()), [weights(copied, x)])
    exact.square().mean().backward()
    for found, expected in zip(layer.parameters(), copied.parameters(), strict=True):
        assert found.grad.dtype == torch.float32
        assert (found.grad - expected.grad).norm() < bound * expected.grad.norm()


def test_router_is_precise_under_autocast():
    """Logits in float32: in bfloat16 probabilities would be off by a hundredth."""
    module, x = linear_case(2, 20, 64, 8)
    layer, seen = trained_layer(module, r=2, n_styles=4), []
    part = layer.weights(lambda p: p.to(torch.bfloat16).float(), dma=1.0, sta=1.0)
    x = x.bfloat16().float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        dispatch.forward(x, host_of(module), [part], lambda weights, s: seen.append(s) or s)
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0], part.plain_route(x, host_of(module)), rtol=1e-5, atol=1e-6)


def test_dispatch_folds_only_where_it_may():
    module, x = linear_case(2, 300, 16, 8)
    layer = trained_layer(module, r=2, n_styles=3)
    with torch.no_grad():
        assert dispatch.prefers_fold(x, host_of(module), prepare([weights(layer, x)]))
        assert not dispatch.prefers_fold(x[:, :4], host_of(module), prepare([weights(layer, x)]))
        unreadable = HostLayer(LayerShape.of(module), module.forward, None, None, module)
        assert not dispatch.prefers_fold(x, unreadable, prepare([weights(layer, x)]))
    assert not dispatch.prefers_fold(x, host_of(module), prepare([weights(layer, x)])), "training must keep the graph"
    module.requires_grad_(False)
    assert dispatch.prefers_fold(x, host_of(module), prepare([weights(layer, x)])), "many positions: fold keeps x alone"
    assert not dispatch.prefers_fold(x[:, :20], host_of(module), prepare([weights(layer, x)]))
    conv, image = conv_case(*CONVS[1])
    assert not dispatch.prefers_fold(image, host_of(conv.requires_grad_(False)), prepare([weights(trained_layer(conv), image)]))


@pytest.mark.parametrize("made_in", [True, False], ids=["inference", "ordinary"])
@pytest.mark.parametrize("used_in", [True, False], ids=["inference", "ordinary"])
def test_what_was_stacked_can_be_used_alone(made_in: bool, used_in: bool) -> None:
    """Two adapters at some steps and one of them at others, loaded in inference mode, as ComfyUI does."""
    from styleinject_core.functional.stacked import stacked

    with torch.inference_mode(made_in):
        values = [torch.randn(3, 4) for _ in range(2)]
        parameters = [torch.nn.Parameter(value.clone(), requires_grad=False) for value in values]
    with torch.inference_mode(used_in), torch.no_grad():
        assert stacked(parameters) and stacked(parameters)
        assert torch.equal(parameters[0].as_strided((2, 3, 4), (12, 4, 1)), torch.stack(values)), "one storage"
        for parameter, value in zip(parameters, values, strict=True):
            assert torch.equal(parameter, value)
            assert torch.equal(parameter.T, value.T), "it can be viewed"


def test_parameters_made_in_different_modes_are_not_stacked() -> None:
    from styleinject_core.functional.stacked import stacked

    with torch.inference_mode():
        one = torch.nn.Parameter(torch.randn(3, 4), requires_grad=False)
    assert stacked([one, torch.nn.Parameter(torch.randn(3, 4), requires_grad=False)]) is False
