"""Every registered method keeps the contract, and a new one is one file and one line."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn

from styleinject_core import Adapter, Applied, LayerShape, attach, load_adapter, methods, save_adapter
from styleinject_core.config import LayerConfig
from styleinject_core.functional import dispatch, fold, reference, stack
from styleinject_core.functional.host import HostLayer
from styleinject_core.functional.update import LowRank, Update, prepare
from styleinject_core.methods.method import AdapterLayer, Method
from styleinject_core.router.recorder import Recorder
from styleinject_core.router.trace import TraceError
from styleinject_core.summary import as_text, summarize
from styleinject_core.train.request import AdapterRequest


class Host(nn.Module):
    """Sizes with few divisors in common, a strided convolution, a 1x1 one, and no bias somewhere."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.conv1 = nn.Conv2d(12, 12, 1, bias=False)
        self.to_q = nn.Linear(12, 20, bias=False)
        self.to_v = nn.Linear(20, 12)

    def forward(self, x):
        x = self.conv1(self.conv_in(x)).flatten(2).mT
        return self.to_v(self.to_q(x).sin())


# --- a method that nobody knows: each channel of the output gets a share of one direction of the input ---------------


@dataclass(frozen=True)
class ToyConfig(LayerConfig):
    gentle: bool = True
    target_modules: tuple[str, ...] = ("all",)
    layers: dict = field(default_factory=dict)

    def __post_init__(self):
        self.check_layers()

    @property
    def method(self):
        return "toy"


@dataclass(frozen=True, eq=False)
class ToyWeights:
    u: Tensor
    v: Tensor
    dma: float
    owner: Hashable = None

    @property
    def active(self):
        return self.dma != 0

    folds, needs_mean, live = True, False, ()

    def cast(self, dtype):
        return replace(self, u=self.u.to(dtype), v=self.v.to(dtype))

    @classmethod
    def prepare(cls, several: Sequence[ToyWeights]):
        return several

    def update(self, x, host, mean, hear):
        return Update(changes=(LowRank(self.v[None] * self.dma, self.u[:, None]),))

    def increment(self, x, h, host, hear):
        return self.dma * host.down(x, torch.einsum("d,k...->dk...", self.u, self.v))


class ToyLayer(AdapterLayer):
    PARTS = ("u", "v")

    def initial(self):
        return {"u": torch.zeros(self.shape.out_features), "v": torch.randn(self.shape.weight[1:])}

    def delta(self):
        return torch.einsum("d,k...->dk...", self.u, self.v)

    def weights(self, cast, *, dma, sta, owner=None, precise=None):
        return ToyWeights(cast(self.u), cast(self.v), dma, owner)


def read_toy(parts, stated, problem):
    if parts.keys() != {"u", "v"}:
        raise problem("half a toy")
    u, v = parts["u"], parts["v"]
    kernel = tuple(v.shape[1:]) if v.ndim > 1 else None
    return ToyLayer(LayerShape(v.shape[0], u.shape[0], kernel), stated or ToyConfig(), parts)


TOY = Method(
    name="toy",
    title="Toy",
    layer=ToyLayer,
    config=ToyConfig,
    choices={"toy": {}},
    configure=lambda settings, special: ToyConfig(target_modules=settings.targets),
    suffixes={"u": ".toy_u", "v": ".toy_v"},
    read=read_toy,
    describe=lambda layers: {"toys": str(len(layers))},
)


@pytest.fixture(autouse=True)
def with_a_toy(monkeypatch):
    """The one line of registration."""
    monkeypatch.setitem(methods.METHODS, "toy", TOY)


EVERY = [*methods.choices(), "toy"]


def new(choice: str, host: nn.Module | None = None, **settings) -> Adapter:
    torch.manual_seed(0)
    table = AdapterRequest(**{"method": choice, "rank": 2, "styles": 3, "factors": (6, 4), "targets": ("all",), **settings})
    return Adapter.create(host or Host(), table.config(), choice)


def trained(choice: str, seed: int = 1, **settings) -> Adapter:
    adapter = new(choice, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return adapter


@pytest.fixture
def host():
    torch.manual_seed(3)
    return Host().requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(3, 3, 9, 7, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("choice", EVERY)
def test_identity_when_new(choice, host, x):
    plain = host(x)
    with attach(host, new(choice)):
        torch.testing.assert_close(host(x), plain, rtol=1e-6, atol=1e-6)
    with attach(host, trained(choice)):
        assert not torch.allclose(host(x), plain, atol=1e-3)
    assert torch.equal(host(x), plain) and not any("forward" in m.__dict__ for m in host.modules())


@pytest.mark.parametrize("choice", EVERY)
def test_strength_zero_is_the_host_bit_for_bit(choice, host, x):
    plain = host(x)
    with attach(host, trained(choice), strength=0.0):
        assert torch.equal(host(x), plain)


@pytest.mark.parametrize("dma", [1.0, -0.7])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("choice", EVERY)
def test_the_forms_equal_the_reference(choice, host, x, grad, dma):
    layers, seen = trained(choice).double().layers, inputs(host.double(), x.double())
    for name, layer in layers.items():
        module = host.get_submodule(name)
        frozen = HostLayer(layer.shape, module, module.weight, module.bias, module)
        weights = [layer.weights(lambda p: p, dma=dma, sta=0.6)]
        with torch.set_grad_enabled(grad):
            expected = reference.forward(seen[name], frozen, weights)
            torch.testing.assert_close(stack.forward(seen[name], frozen, weights), expected)
            torch.testing.assert_close(dispatch.forward(seen[name], frozen, weights), expected)
            if fold.can_fold(frozen, prepare(weights)):
                torch.testing.assert_close(fold.forward(seen[name], frozen, weights), expected)
            else:
                assert grad, f"{choice} cannot be folded"


@pytest.mark.parametrize("choice", EVERY)
def test_a_fixed_change_is_its_delta(choice, host, x):
    adapter = trained(choice)
    if not all(layer.fixed for layer in adapter.layers.values()):
        assert adapter.routed and choice in ("styleinject", "dma-only", "sta-only")
        return
    merged = copy.deepcopy(host)
    for name, layer in adapter.layers.items():
        assert layer.delta().shape == layer.shape.weight
        merged.get_submodule(name).weight.add_(-0.5 * layer.delta())
    with attach(host, adapter, strength=-0.5):
        torch.testing.assert_close(host(x), merged(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choice", EVERY)
def test_saved_and_loaded(choice, host, x, tmp_path, dtype):
    adapter = trained(choice).to(dtype)
    save_adapter(adapter, tmp_path / "a.safetensors", {"modelspec.author": "me"})
    loaded = load_adapter(tmp_path / "a.safetensors")
    assert set(loaded.names) == set(adapter.names) and loaded.config == adapter.config and not loaded.skipped
    assert loaded.metadata["modelspec.author"] == "me"
    for name, layer in adapter.layers.items():
        again = loaded.layers[name]
        assert type(again) is type(layer) and again.shape == layer.shape and again.config == layer.config
        for part, value in layer.tensors().items():
            assert torch.equal(again.tensors()[part], value)
    assert summarize(loaded)["kind"] == methods.METHODS[adapter.config.method].title
    assert as_text(summarize(loaded))


@pytest.mark.parametrize("choice", EVERY)
def test_gradients_equal_the_references(choice, host, x):
    host, x, adapter = host.double(), x.double(), trained(choice).double()
    target, grads = torch.randn_like(host(x)), []
    for name, layer in adapter.layers.items():
        module = host.get_submodule(name)
        y = inputs(host, x)[name]
        frozen = HostLayer(layer.shape, module, module.weight, module.bias, module)
        for form in (reference, dispatch):
            out = form.forward(y, frozen, [layer.weights(lambda p: p, dma=0.9, sta=1.1)])
            grads.append(torch.autograd.grad(out.square().mean(), list(layer.parameters()), allow_unused=True))
        for expected, found in zip(*grads[-2:], strict=True):
            if found is not None:  # a router of one style, whose s is 1 whatever it says
                torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    with attach(host, adapter):
        (host(x) - target).square().mean().backward()
    assert all(
        p.grad is not None
        for layer in adapter.layers.values()
        for part, p in layer.tensors().items()
        if part != "router_weight"
    )


@dataclass(frozen=True, eq=False)
class MaskedWeights(ToyWeights):
    """A toy that acts on some positions only, and rescales their statistics."""

    mask: Tensor | None = None
    folds = False

    def update(self, x, host, mean, hear):
        gain = self.u.expand(x.shape[0], -1) * self.dma
        return replace(super().update(x, host, mean, hear), gain=gain, mask=self.mask)


@pytest.mark.parametrize("name", ["to_q", "conv_in"])
def test_a_mask_leaves_the_rest_of_the_picture_alone(host, x, name):
    """Inside: the update as it is, by the statistics of the whole picture; outside, to the bit, the others' alone."""
    layer, module, y = trained("toy").layers[name], host.get_submodule(name), inputs(host, x)[name]
    frozen = HostLayer(layer.shape, module, module.weight, module.bias, module)
    everywhere = torch.ones(1, *module(y).shape[2:]) if layer.shape.is_conv else torch.ones(1, y.shape[1], 1)
    mask = everywhere[None].clone() if layer.shape.is_conv else everywhere.clone()
    mask.view(-1)[: mask.numel() // 2] = 0
    other = layer.weights(lambda p: -2 * p, dma=0.5, sta=1.0)
    toys = [MaskedWeights(layer.u, layer.v, 0.8, mask=m) for m in (None, mask)]
    with torch.no_grad():
        alone = stack.forward(y, frozen, [other])
        whole, half = (dispatch.forward(y, frozen, [other, toy]) for toy in toys)
    inside = mask.expand_as(half).bool()
    assert torch.equal(half[~inside], alone[~inside]) and not torch.allclose(half[inside], alone[inside], atol=1e-2)
    torch.testing.assert_close(half[inside], whole[inside], rtol=1e-5, atol=1e-5)


def test_methods_stack_on_one_layer_in_any_order(host, x):
    with torch.no_grad():
        plain = host.to_q(y := inputs(host, x)["to_q"])
        adapters = [Applied(trained(choice, seed), 0.8, layers="to_q") for seed, choice in enumerate(EVERY)]
        parts = []
        for applied in adapters:
            with attach(host, applied):
                parts.append(host.to_q(y) - plain)
        for order in (adapters, adapters[::-1]):
            with attach(host, order):
                torch.testing.assert_close(host.to_q(y), plain + sum(parts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("choice", ["lora", "kronecker", "toy"])
def test_router_tools_refuse_a_method_without_router(choice):
    adapter = trained(choice)
    with pytest.raises(TraceError, match=f"{choice} has no style router .it is a {adapter.kind}."):
        Recorder(adapter, adapter.style_names)


def test_a_method_that_does_not_exist():
    with pytest.raises(ValueError, match="method: expected one of styleinject, lora, kronecker, .*, found 'dora'"):
        AdapterRequest(method="dora")


def inputs(host: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What every layer of the bare host is given."""
    seen: dict[str, Tensor] = {}
    handles = [
        m.register_forward_pre_hook(lambda m, args, n=n: seen.setdefault(n, args[0])) for n, m in host.named_modules() if n
    ]
    with torch.no_grad():
        host(x)
    for handle in handles:
        handle.remove()
    return seen
