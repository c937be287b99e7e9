"""Routers that read the prompt: the equations, where the prompt comes from, files, training, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from styleinject_core import Adapter, AdapterConfig, AdapterMismatchError, LayerShape, attach
from styleinject_core.call import Listener, ModelCall, averaged
from styleinject_core.files.errors import AdapterFileError
from styleinject_core.files.format import save_adapter
from styleinject_core.files.header import read_header
from styleinject_core.files.reader import load_adapter
from styleinject_core.functional import dispatch, reference, stack
from styleinject_core.functional.host import HostLayer
from styleinject_core.layers import UnsupportedLayerError
from styleinject_core.methods.styleinject import StyleInjectLayer
from styleinject_core.site import PromptError
from styleinject_core.train.data.source import LatentSource
from styleinject_core.train.models.noise import DiscreteSchedule
from styleinject_core.train.models.training_model import TrainingModel
from styleinject_core.train.objectives.tasks import FineTune
from styleinject_core.train.random_numbers import RandomNumbers
from styleinject_core.train.settings import TrainSettings

C = 6  # features of the text conditioning


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    return module


def host_of(module: nn.Module, prompt: torch.Tensor | None) -> HostLayer:
    return HostLayer(LayerShape.of(module), module.forward, module.weight, module.bias, module, prompt=prompt)


def expected(x, h, layers, prompt):
    """h* of layers of several adapters, written from the equations alone."""
    conv = x.ndim == 4
    where = (2, 3) if conv else (1,)
    total = h.clone()
    for layer in layers:
        c = layer.config
        tokens = x.flatten(2).mT if conv else x
        logits = layer.router_bias
        if c.router_input == "both":
            logits = tokens @ layer.router_weight.T + layer.router_bias
            pool = {"paper": "sum" if conv else "token"}.get(c.router_pool, c.router_pool)
            logits = logits.mean(1) if pool == "mean" else logits.sum(1) if pool == "sum" else logits
        told = prompt @ layer.router_prompt.T
        s = (logits + (told[:, None] if logits.ndim == 3 else told)).softmax(-1)

        def spread(values, conv=conv):
            return values if values.ndim == 3 else values[:, :, None, None] if conv else values[:, None]

        gain = spread(s @ layer.hyper_weight.T + layer.hyper_bias)
        total = total + gain * (h - h.mean(where, keepdim=True))
        for i, A in enumerate(layer.A):
            low = nn.functional.conv2d(x, A, padding=1) if conv else x @ A.T
            up = torch.einsum("brhw,dr->bdhw", low, layer.B) if conv else low @ layer.B.T
            total = total + spread(s[..., i : i + 1]) * up
    return total


@pytest.mark.parametrize("reads", ["prompt", "both"])
@pytest.mark.parametrize("pool", ["mean", "sum", "paper"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["tokens", "one token", "convolution", "one pixel"])
def test_every_form_equals_the_equations(kind, pool, reads, count):
    conv = kind in ("convolution", "one pixel")
    module = nn.Conv2d(4, 5, 3, padding=1) if conv else nn.Linear(4, 5)
    sizes = {"tokens": (3, 130, 4), "one token": (3, 1, 4), "convolution": (3, 4, 7, 5), "one pixel": (3, 4, 1, 1)}
    randomized(module).double()
    x = torch.randn(sizes[kind], generator=torch.Generator().manual_seed(1)).double()
    prompt = torch.randn(3, C, generator=torch.Generator().manual_seed(2)).double()
    config = AdapterConfig(r=2, n_styles=3, router_pool=pool, router_input=reads, prompt_features=C)
    layers = [randomized(StyleInjectLayer(LayerShape.of(module), config), k).double() for k in range(count)]
    weights = [layer.weights(lambda p: p, dma=1.0, sta=1.0) for layer in layers]
    with torch.no_grad():
        truth = expected(x, module(x), layers, prompt)
        for form in (reference, stack, dispatch):
            torch.testing.assert_close(form.forward(x, host_of(module, prompt), weights), truth, rtol=1e-9, atol=1e-9)


def test_rows_of_one_image_have_its_prompt():
    module = randomized(nn.Linear(4, 5))
    prompt, x = torch.randn(2, C), torch.randn(6, 3, 4)
    host = host_of(module, prompt)
    assert torch.equal(host.prompt_of(x), prompt[[0, 0, 0, 1, 1, 1]])
    with pytest.raises(ValueError, match="2 prompts for 5 rows"):
        host.prompt_of(x[:5])


def test_the_prompt_is_its_tokens_mean_and_those_that_a_mask_leaves_out_do_not_count():
    text = torch.randn(2, 5, C).half()
    torch.testing.assert_close(averaged(text), text.float().mean(1))
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    told = averaged(text, mask)
    torch.testing.assert_close(told[0], text[0, :2].float().mean(0))
    torch.testing.assert_close(told[1], text[1].float().mean(0))
    # a mask of something else
    torch.testing.assert_close(averaged(text, torch.ones(2, 9)), text.float().mean(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(4, 4), nn.Linear(C, 4), nn.Linear(C, 4)


class Network(nn.Module):
    """Called as diffusers' U-Nets are."""

    def __init__(self):
        super().__init__()
        self.down_blocks = nn.ModuleList([nn.Module()])
        self.down_blocks[0].attn1 = nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_v": nn.Linear(4, 4)})
        self.down_blocks[0].attn2 = Attention()

    def forward(self, x, _t, encoder_hidden_states=None):
        tokens, layers = x.flatten(2).mT, self.down_blocks[0]
        h = tokens + layers.attn1["to_q"](tokens).tanh() + layers.attn1["to_v"](tokens)
        if encoder_hidden_states is not None:
            h = h + layers.attn2.to_v(encoder_hidden_states).mean(1, keepdim=True)
        return h.mT.reshape(x.shape)


class Heard(Listener):
    def __init__(self):
        self.s = {}

    def record(self, layer, s):
        self.s[layer] = s


@pytest.fixture
def network():
    return randomized(Network()).requires_grad_(False)


def adapter_of(network, reads="prompt", **config):
    config = AdapterConfig(r=2, n_styles=3, router_input=reads, target_modules=("self",), **config)
    return randomized(Adapter.create(network, config, "painter"), 3)


def test_a_new_adapter_takes_the_width_of_the_prompt_from_the_cross_attention(network):
    adapter = adapter_of(network)
    assert adapter.config.prompt_features == C
    assert all(set(layer.tensors()) >= {"router_prompt", "router_bias"} for layer in adapter.layers.values())
    assert all(layer.router_weight is None and layer.styles == 3 and not layer.fixed for layer in adapter.layers.values())
    plain = nn.ModuleDict({"to_q": nn.Linear(4, 4)})
    with pytest.raises(UnsupportedLayerError, match="prompt_features: router_input 'prompt' needs the width"):
        Adapter.create(plain, AdapterConfig(r=2, router_input="prompt", target_modules=("to_q",)))
    with pytest.raises(ValueError, match="prompt_features: is 6, and router_input 'layer' reads no prompt"):
        AdapterConfig(prompt_features=6)


@pytest.mark.parametrize("named", [True, False], ids=["by name", "by position"])
def test_it_reads_what_the_network_is_called_with(network, named):
    adapter, heard = adapter_of(network), Heard()
    x, text = torch.randn(2, 4, 3, 3), torch.randn(2, 7, C)
    before = [dict(module.__dict__) for module in network.modules()]
    with attach(network, adapter) as attachment, attachment.in_call(ModelCall(listeners=(heard,))):
        for words in (text, text.flip(0)):
            network(x, 1, encoder_hidden_states=words) if named else network(x, 1, words)
            for name, layer in adapter.layers.items():
                told = words.mean(1) @ layer.router_prompt.T + layer.router_bias
                torch.testing.assert_close(heard.s[name], told.softmax(-1))
    assert [dict(module.__dict__) for module in network.modules()] == before and not network._forward_pre_hooks


def test_a_network_without_a_prompt_or_with_another_one_is_refused(network):
    x = torch.randn(2, 4, 3, 3)
    base = network(x, 1)
    with attach(network, adapter_of(network)) as attachment:
        with pytest.raises(PromptError, match="painter: its router reads the prompt, and this model is called without text"):
            network(x, 1)
        other = attachment.in_call(ModelCall(prompt=torch.randn(2, 9)))
        with pytest.raises(PromptError, match=r"painter: .* text conditioning of 6 features, this model's has 9"), other:
            network(x, 1)
        attachment.set_strength(0.0)
        assert torch.equal(network(x, 1), base)
    assert torch.equal(network(x, 1), base)


def test_two_adapters_of_which_one_reads_the_prompt(network):
    x, text = torch.randn(2, 4, 3, 3), torch.randn(2, 7, C)
    reading, plain = adapter_of(network, "both"), adapter_of(network, "layer", router_pool="sum")
    base = network.down_blocks[0].attn1["to_q"]
    tokens = x.flatten(2).mT
    h = base(tokens)
    with attach(network, reading) as attachment, attachment.in_call(ModelCall(prompt=averaged(text))):
        first = base(tokens) - h
    with attach(network, plain):
        second = base(tokens) - h
    with attach(network, [plain, reading]) as attachment, attachment.in_call(ModelCall(prompt=averaged(text))):
        torch.testing.assert_close(base(tokens) - h, first + second)


@pytest.mark.parametrize("reads", ["prompt", "both"])
def test_files(tmp_path, network, reads):
    path, adapter = tmp_path / "a.safetensors", adapter_of(network, reads)
    save_adapter(adapter, path)
    assert read_header(path).metadata["styleinject_version"] == "2", "which older versions refuse"
    loaded = load_adapter(path)
    assert loaded.config == adapter.config
    for name, layer in adapter.layers.items():
        assert loaded.layers[name].tensors().keys() == layer.tensors().keys()
        assert all(torch.equal(value, layer.tensors()[part]) for part, value in loaded.layers[name].tensors().items())


@pytest.mark.parametrize(
    ("config", "part", "message"),
    [
        ({"router_input": "layer", "prompt_features": 0}, None, "router_input 'both', config says 'layer'"),
        ({"router_input": "prompt"}, None, "router_input 'both', config says 'prompt'"),
        ({"prompt_features": 7}, None, "prompt_features 6, config says 7"),
        ({}, torch.zeros(2, C), r"router.prompt has shape \(2, 6\), expected \(3, 6\)"),
        ({}, torch.zeros(C), r"router.prompt has shape \(6,\), expected \(3, 6\)"),
    ],
)
def test_a_file_that_contradicts_itself(tmp_path, network, config, part, message):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = tmp_path / "a.safetensors"
    save_adapter(adapter_of(network, "both"), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["styleinject_config"] = json.dumps({**json.loads(metadata["styleinject_config"]), **config})
    tensors = load_file(path)
    if part is not None:
        tensors[next(key for key in tensors if key.endswith("router.prompt"))] = part
    save_file(tensors, path, metadata)
    with pytest.raises(AdapterFileError, match=message):
        load_adapter(path)


class Model(TrainingModel):
    def predict(self, noisy, times, conditioning):
        return self.denoiser(noisy, times, conditioning["context"])

    def blocks(self):
        return {"down_blocks.0.attn1.to_v": self.denoiser.down_blocks[0].attn1["to_v"]}


@pytest.mark.parametrize("labels", [None, [0, 2, -1, 1]])
def test_training_teaches_it_also_where_blocks_run_again(network, labels):
    """Gradients with checkpointing are those without: the second run has the prompt, and the styles that were given."""
    schedule = DiscreteSchedule(torch.linspace(0.99, 0.01, 20), "epsilon")
    generator = torch.Generator().manual_seed(5)
    latents, text = torch.randn(4, 4, 3, 3, generator=generator), torch.randn(4, 7, C, generator=generator)
    gradients = []
    for again in (False, True):
        adapter = adapter_of(network, "both").requires_grad_(True)
        settings = TrainSettings(1, 4, gradient_checkpointing=again, caption_dropout=0.0)
        source = LatentSource(list(latents), {"context": text}, batch_size=4, seed=0, styles=labels)
        task = FineTune(Model(network, schedule), source, settings, style_dropout=0.0)
        with task.installed(adapter):
            task.loss(RandomNumbers(0, 0)).backward()
        gradients.append({name: p.grad for name, p in adapter.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    assert all(g.abs().max() > 0 for name, g in gradients[0].items() if "router_prompt" in name)


def test_an_adapter_for_other_sizes_is_still_told_by_its_layers(network):
    other = randomized(Network())
    other.down_blocks[0].attn1["to_q"] = nn.Linear(8, 8)
    with pytest.raises(AdapterMismatchError):
        attach(other, adapter_of(network))
