"""What a style layer looks at where the image's tokens share a sequence with others, or are those of several frames."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from styleinject_core import Adapter, AdapterConfig, Applied, Attachment, LayerShape, load_adapter, save_adapter
from styleinject_core.call import Listener, ModelCall, Tokens
from styleinject_core.functional import dispatch, reference, stack
from styleinject_core.functional.host import HostLayer
from styleinject_core.methods.styleinject import StyleInjectLayer

K, D = 6, 10
POOLS = ("mean", "sum", "token")
STAS = ("multiplicative", "additive", "none")


def trained(parameters) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)


def plainly(layer, module, x, image, dma=1.0, sta=1.0):
    """The method on one sequence (L, k), token by token: statistics of the tokens in `image`, AdaIN for those alone."""
    h = module(x)
    mean, deviation = h[image].mean(0), h[image].std(0, correction=0)
    logits = x @ layer.router_weight.T + layer.router_bias
    pooled = {"mean": lambda z: z.mean(0), "sum": lambda z: z.sum(0)}.get(layer.config.router_pool)
    out = h.clone()
    for position in range(len(x)):
        s = (logits[position] if pooled is None else pooled(logits[image])).softmax(-1)
        down = sum(s[i] * layer.A[i] @ x[position] for i in range(len(s)))
        out[position] += dma * layer.config.scale * layer.B @ down
        if position in image and layer.hyper_weight is not None:
            modulation = layer.hyper_weight @ s + layer.hyper_bias
            sigma = deviation.clamp(min=layer.config.eps)
            new = sigma * (1 + modulation) if layer.config.sta == "multiplicative" else sigma + modulation
            out[position] += sta * ((h[position] - mean) / sigma * new + mean - h[position])
    return out


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("sta", STAS)
@pytest.mark.parametrize("where", [(0, 7), (4, 12), (3, 9)], ids=str)
def test_statistics_are_the_images(pool, sta, where):
    torch.manual_seed(1)
    module, x = nn.Linear(K, D).double(), torch.randn(3, 12, K).double() + 0.5
    layer = StyleInjectLayer(LayerShape(K, D), AdapterConfig(r=2, n_styles=3, alpha=3.0, router_pool=pool, sta=sta)).double()
    trained(layer.parameters())
    weights = layer.weights(lambda p: p, dma=0.7, sta=1.3)
    host = HostLayer(LayerShape(K, D), module.forward, module.weight, module.bias, module, tokens=slice(*where))
    with torch.no_grad():
        expected = torch.stack([plainly(layer, module, row, range(*where), 0.7, 1.3) for row in x])
        for form in (reference, stack, dispatch):
            torch.testing.assert_close(form.forward(x, host, [weights]), expected, rtol=1e-10, atol=1e-10)
        everywhere = HostLayer(LayerShape(K, D), module.forward, module.weight, module.bias, module)
        differs = pool != "token" or sta != "none"  # each token by itself, and no statistics: nothing to look at
        assert torch.allclose(reference.forward(x, everywhere, [weights]), expected) != differs


def test_gradients_are_the_references():
    module, x = nn.Linear(K, D).double(), torch.randn(2, 9, K).double()
    layer = StyleInjectLayer(LayerShape(K, D), AdapterConfig(r=2, n_styles=3)).double()
    trained(layer.parameters())
    host = HostLayer(LayerShape(K, D), module.forward, module.weight, module.bias, module, tokens=slice(2, 6))
    found = []
    for form in (reference, stack):
        loss = form.forward(x, host, [layer.weights(lambda p: p, dma=1.0, sta=1.0)]).square().sum()
        found.append(torch.autograd.grad(loss, tuple(layer.parameters())))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


class Block(nn.Module):
    """One block of a transformer: a fused layer on a sequence of everything, and the prompt's own."""

    def __init__(self):
        super().__init__()
        self.single_blocks = nn.ModuleList([nn.ModuleDict({"linear1": nn.Linear(K, D)})])
        self.double_blocks = nn.ModuleList([nn.ModuleDict({"txt_mlp": nn.Linear(K, D)})])

    def forward(self, x):
        return self.single_blocks[0]["linear1"](x), self.double_blocks[0]["txt_mlp"](x)


SINGLE, TEXT = "single_blocks.0.linear1", "double_blocks.0.txt_mlp"


def adapted(block, *tokens_of_adapters: str) -> Attachment:
    adapters = []
    for tokens in tokens_of_adapters:
        adapter = Adapter.create(block, AdapterConfig(r=2, n_styles=3, target_modules=("all",), tokens=tokens), tokens)
        adapter.double()
        trained(adapter.parameters())
        adapters.append(adapter)
    return Attachment(block, [Applied(adapter) for adapter in adapters])


def run(block, x, tokens, *tokens_of_adapters: str, listeners=()):
    attachment = adapted(block, *tokens_of_adapters)
    with torch.no_grad(), attachment, attachment.in_call(ModelCall(tokens=tokens, listeners=listeners)):
        out = block(x)
    return out, [dict(item.adapter.layers.items()) for item in attachment.applied]


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block().double()


@pytest.fixture
def x():
    return torch.randn(2, 14, K, generator=torch.Generator().manual_seed(3)).double() + 1


def expected_of(layer, module, x, *images):
    """Each frame's tokens by that frame's statistics, the others by those of all frames."""
    rows = []
    for row in x:
        everywhere = [position for image in images for position in image]
        out = plainly(layer, module, row, everywhere)
        for image in images:
            out[list(image)] = plainly(layer, module, row, image)[list(image)]
        rows.append(out)
    return torch.stack(rows)


def test_each_adapter_looks_at_what_it_was_made_for(block, x):
    tokens, module = Tokens(8, after=2, frames=2), block.single_blocks[0]["linear1"]  # 4 of the prompt, 2 x 4, 2 of a reference
    seen = {"image": [range(4, 12)], "frame": [range(4, 8), range(8, 12)], "all": [range(14)]}
    with torch.no_grad():
        bare, changes = module(x), 0
        for kind, images in seen.items():
            (single, text), (layers,) = run(block, x, tokens, kind)
            expected = expected_of(layers[SINGLE], module, x, *images)
            torch.testing.assert_close(single, expected)
            changes = changes + expected - bare
            own = block.double_blocks[0]["txt_mlp"]  # sees the prompt alone: all of what it sees, as in a U-Net
            torch.testing.assert_close(text, expected_of(layers[TEXT], own, x, range(14)))
        together, _ = run(block, x, tokens, *seen)
        torch.testing.assert_close(together[0], bare + changes)


def test_frames_alone(block, x):
    (single, _), (layers,) = run(block, x[:, :12], Tokens(12, frames=3), "frame")
    images = [range(4), range(4, 8), range(8, 12)]
    with torch.no_grad():
        expected = expected_of(layers[SINGLE], block.single_blocks[0]["linear1"], x[:, :12], *images)
    torch.testing.assert_close(single, expected)
    (clip, _), _ = run(block, x[:, :12], Tokens(12, frames=3), "image")
    (plain, _), _ = run(block, x[:, :12], None, "image")
    assert torch.equal(clip, plain) and not torch.allclose(clip, single)


def test_a_sequence_that_cannot_hold_the_image_is_looked_at_whole(block, x):
    with_others, _ = run(block, x, Tokens(20), "image")
    plain, _ = run(block, x, None, "image")
    assert torch.equal(with_others[0], plain[0])


@pytest.mark.parametrize(("tokens", "length", "where"), [
    (Tokens(8), 14, slice(6, 14)), (Tokens(8, after=2), 14, slice(4, 12)), (Tokens(8, leading=True), 14, slice(0, 8)),
    (Tokens(8), 8, slice(0, 8)), (Tokens(8), 7, None), (Tokens(8, after=2), 9, None),
], ids=str)  # fmt: skip
def test_where_they_are(tokens, length, where):
    assert tokens.within(length) == where


class Heard(Listener):
    """One style alone, and what was heard and measured."""

    def __init__(self):
        self.recorded, self.sizes = {}, {}

    def steer(self, layer, s):
        return torch.zeros_like(s).index_fill_(-1, torch.tensor([1]), 1.0)

    def record(self, layer, s):
        assert layer not in self.recorded, "heard twice"
        self.recorded[layer] = s

    def measures(self, layer):
        return True

    def measure(self, layer, s, x, h, host, weights):
        self.sizes[layer] = (tuple(s.shape), tuple(x.shape), None if h is None else tuple(h.shape))


@pytest.mark.parametrize("kind", ["image", "frame"])
def test_listeners_hear_of_images(block, x, kind):
    """One row per image, whatever its frames; and steered is steered."""
    heard = Heard()
    tokens = Tokens(8, after=2, frames=2)
    (single, _), (layers,) = run(block, x, tokens, kind, listeners=(heard,))
    shape = (2, 3) if kind == "image" else (2, 2, 3)
    assert heard.recorded[SINGLE].shape == shape and (heard.recorded[SINGLE][..., 1] == 1).all()
    assert heard.sizes[SINGLE] == ((2, 3) if kind == "image" else (2, 8, 3), (2, 8, K), (2, 8, D))
    layer = layers[SINGLE]
    with torch.no_grad():
        layer.router_weight.zero_()
        layer.router_bias.copy_(torch.tensor([-1e3, 1e3, -1e3]))
        images = [range(4, 12)] if kind == "image" else [range(4, 8), range(8, 12)]
        expected = expected_of(layer, block.single_blocks[0]["linear1"], x, *images)
    torch.testing.assert_close(single[:, 4:12], expected[:, 4:12])


def test_it_is_kept_in_files(tmp_path, block):
    for tokens in ("image", "frame", "all"):
        adapter = Adapter.create(block, AdapterConfig(r=2, n_styles=2, target_modules=("all",), tokens=tokens), "ink")
        save_adapter(adapter, tmp_path / "ink.safetensors")
        assert load_adapter(tmp_path / "ink.safetensors").config.tokens == tokens
        assert ("tokens" in adapter.config.to_dict()) == (tokens != "image")
    with pytest.raises(ValueError, match="tokens: expected one of image, frame, all, found 'text'"):
        AdapterConfig(tokens="text")
