"""A reference on a real diffusers U-Net: against an attention processor that computes the paper's equations, beside adapters,
and off again without a trace."""

from __future__ import annotations

import deadiff_models as models
import pytest
import torch

from styleinject_core import Adapter, AdapterConfig, attach, deadiff
from styleinject_core.call import ModelCall
from styleinject_core.deadiff import Reference, ReferenceAttachment, ReferenceMismatchError, Tokens, TokensError, referenced

TINY = models.tiny_config(deadiff)
ROLES = ("negative", "positive")


@pytest.fixture(scope="module")
def unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    channels = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64, attention_head_dim=4, **channels
    ).requires_grad_(False).double().eval()  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return models.random_model(deadiff, TINY, scale=2.0)


def tokens(stream="style", seed=0, count=4, images=1):
    return Tokens(torch.randn(images, count, 24, generator=torch.Generator().manual_seed(seed)), stream)


def inputs(batch=2, length=77):
    g = torch.Generator().manual_seed(3)
    x, text = torch.randn(batch, 4, 8, 8, generator=g).double(), torch.randn(batch, length, 64, generator=g).double()
    return x, torch.tensor(500), text


def run(unet, *given):
    return unet(*(given or inputs())).sample


class PaperAttention:
    """Section "joint attention" of the paper, written out: [text; image] keys and values, one softmax, per head."""

    def __init__(self, model, place, tokens, weight):
        self.weights, self.tokens, self.weight = model.to_kv[place], tokens, weight

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        img = torch.stack([torch.zeros_like(self.tokens), self.tokens]).double()  # zeros in the negative row
        k = torch.cat([attn.to_k(encoder_hidden_states), self.weight * img @ self.weights["i_to_k"].double().T], 1)
        v = torch.cat([attn.to_v(encoder_hidden_states), self.weight * img @ self.weights["i_to_v"].double().T], 1)
        q, width = attn.to_q(hidden_states), k.shape[-1] // attn.heads
        heads = []
        for part in (slice(h * width, (h + 1) * width) for h in range(attn.heads)):
            logits = torch.einsum("bnc,bmc->bnm", q[..., part], k[..., part]) / width**0.5
            heads.append(torch.einsum("bnm,bmc->bnc", logits.softmax(-1), v[..., part]))
        return attn.to_out[0](torch.cat(heads, -1))


@pytest.mark.parametrize("content", [None, tokens("content", seed=1)])
def test_a_u_net_with_a_reference_is_the_papers(unet, model, content):
    reference = Reference(model, tokens(), content, weight_style=0.8, weight_content=1.5)
    with referenced(unet, reference) as attachment:
        found = run(unet)
    assert "5 style + 2 content layers matched" in str(attachment)
    modules, former = dict(unet.named_modules()), unet.attn_processors
    for place, site in enumerate(TINY.sites):
        own = (tokens() if site.stream == "style" else content or tokens()).values[0]
        weight = 0.8 if site.stream == "style" else 1.5 if content else 0.0
        modules[site.name].set_processor(PaperAttention(model, place, own, weight))
    try:
        expected = run(unet)
    finally:
        unet.set_attn_processor(former)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert (found - run(unet)).abs().amax((1, 2, 3)).min() > 1e-3  # both rows change, the negative one by null tokens


def test_it_leaves_no_trace(unet, model):
    before, base = [dict(m.__dict__) for m in unet.modules()], run(unet)
    with referenced(unet, Reference(model, tokens())):
        assert not torch.equal(run(unet), base)
    with pytest.raises(RuntimeError, match="stop"), referenced(unet, Reference(model, tokens())):
        raise RuntimeError("stop")
    assert torch.equal(run(unet), base)
    assert [dict(m.__dict__) for m in unet.modules()] == before


def test_weight_0_is_the_host_bit_for_bit_and_a_small_one_is_not(unet, model):
    base = run(unet)
    with referenced(unet, Reference(model, tokens(), weight_style=0)) as attachment:
        assert attachment is None
        assert torch.equal(run(unet), base)
    with referenced(unet, Reference(model, tokens(), weight_style=1e-9)):
        assert (run(unet) - base).abs().max() > 1e-3  # null tokens keep their share of the softmax


def test_a_repeated_prompt_draws_the_same(unet, model):
    x, t, text = inputs()
    with referenced(unet, Reference(model, tokens())):
        once = run(unet, x, t, text)
        again = run(unet, x, t, text.repeat(1, 3, 1))
    torch.testing.assert_close(again, once, atol=1e-10, rtol=1e-10)


def test_two_references_are_appended_in_any_order(unet, model):
    first, second = Reference(model, tokens(seed=1)), Reference(model, tokens(seed=2))
    with referenced(unet, first), referenced(unet, second):
        found = run(unet)
    both = deadiff.side_by_side([tokens(seed=1), tokens(seed=2)])
    with referenced(unet, Reference(model, both)):
        torch.testing.assert_close(found, run(unet), atol=1e-10, rtol=1e-10)
    a, b = ReferenceAttachment(unet, first), ReferenceAttachment(unet, second)
    base = run(unet)
    call = ModelCall(find_roles=lambda: ROLES)
    with a.in_call(call), b.in_call(call):
        b.install(), a.install()
        torch.testing.assert_close(run(unet), found, atol=1e-10, rtol=1e-10)
        b.detach()
        with referenced(unet, first):
            pass  # a third one came and went in between
        a.detach(), a.detach()
    assert torch.equal(run(unet), base)


def test_adapters_see_the_text_alone(unet, model):
    """StyleInject's statistics and router on to_k and to_v are those of the text, whichever came first."""
    torch.manual_seed(0)
    adapter = Adapter.create(
        unet, AdapterConfig(r=2, n_styles=3, router_pool="mean", target_modules=("attn2.to_k", "attn2.to_v"))
    )
    for parameter in adapter.parameters():
        parameter.data.copy_(0.3 * torch.randn_like(parameter))
    layer, returned = unet.get_submodule(f"{TINY.layers[0][0]}.to_k"), []
    text = inputs()[2]
    with attach(unet, adapter):
        alone = layer(text)
        with referenced(unet, Reference(model, tokens())):
            returned.append(layer(text))
            after = run(unet)
    with referenced(unet, Reference(model, tokens())), attach(unet, adapter):
        returned.append(layer(text))
        assert torch.equal(run(unet), after)
    for rows in returned:
        assert rows.shape[1] == 81
        assert torch.equal(rows[:, :77], alone)


def test_a_reference_for_each_image(unet, model):
    several = tokens(images=2)
    x, t, text = (v if v.ndim == 0 else v[:1].repeat(4, *[1] * (v.ndim - 1)) for v in inputs())
    with referenced(unet, Reference(model, several)):
        found = run(unet, x, t, text)
    for k in range(2):
        one = Tokens(several.values[k : k + 1], "style")
        with referenced(unet, Reference(model, one)):
            expected = run(unet, x, t, text)
        torch.testing.assert_close(found[k::2], expected[k::2], atol=1e-10, rtol=1e-10)
    assert (found[2] - found[3]).abs().max() > 1e-4
    with pytest.raises(TokensError, match="3 rows cannot be 2 equal parts"), referenced(unet, Reference(model, several)):
        run(unet, x[:3], t, text[:3])


def test_a_host_that_does_not_fit_stays_as_it_is(unet, model):
    base = run(unet)
    narrow = models.random_model(deadiff, models.tiny_config(deadiff, context=32))
    with pytest.raises(ReferenceMismatchError, match=r"to_k: made for Linear 32->32, this model has Linear 64->32"):
        ReferenceAttachment(unet, Reference(narrow, tokens()))
    layers = (*models.TINY_LAYERS[:-1], ("up_blocks.1.attentions.9.transformer_blocks.0.attn2", 32))
    longer = models.random_model(deadiff, models.tiny_config(deadiff, layers=layers))
    with pytest.raises(
        ReferenceMismatchError, match="tokens for 7 cross-attentions, this model has none at up_blocks.1.attentions.9"
    ):
        ReferenceAttachment(unet, Reference(longer, tokens()))
    attachment = ReferenceAttachment(unet, Reference(model, tokens()))
    with (
        pytest.raises(TokensError, match="text has 4 rows and the batch 2 images"),
        attachment.in_call(ModelCall(images=2)),
        attachment,
    ):
        run(unet, *(v if v.ndim == 0 else v.repeat(2, *[1] * (v.ndim - 1)) for v in inputs()))
    assert torch.equal(run(unet), base)


def test_gradients_reach_the_u_nets_adapters_through_the_joint_attention(unet, model):
    adapter = Adapter.create(unet, AdapterConfig(r=2, n_styles=1, target_modules=("attn2.to_k",))).double()
    with attach(unet, adapter), referenced(unet, Reference(model, tokens())):
        run(unet).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
