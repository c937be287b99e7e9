"""DEADiff's maths against independent forms: transformers' Q-Former and CLIP, Pillow, and plain equations in float64."""

from __future__ import annotations

import math

import deadiff_models as models
import pytest
import torch
from torch.nn import functional as F

from styleinject_core import deadiff
from styleinject_core.deadiff import SD15, Reference, Tokens, TokensError, mix, side_by_side
from styleinject_core.deadiff.qformer import QFormer, Stream, TokenProjection
from styleinject_core.deadiff.rows import build_rows, check_mask, joint_attention, mask_bias, repeats
from styleinject_core.deadiff.vision import MEAN, STD, VisionTower, normalized, squash
from styleinject_core.selector import SelectorError

TINY = models.tiny_config(deadiff)


def tokens(stream="style", images=1, count=4, width=24, seed=0, model_id="", labels=()):
    return Tokens(torch.randn(images, count, width, generator=torch.Generator().manual_seed(seed)), stream, model_id, labels)


def test_parameter_counts_are_the_papers():
    counts = deadiff.Deadiff(SD15, device="meta").counts()
    assert counts["i_to"] == 19_169_280
    assert counts["all"] == 378_308_608  # 378.3 M
    sites = SD15.sites
    assert sum(site.width for site in sites) == 12_480
    assert [k for k, site in enumerate(sites) if site.stream == "content"] == [4, 5, 6, 7, 8]
    assert sum(site.stream == "style" for site in sites) == 11


def test_the_q_former_is_transformers_at_full_size():
    transformers = pytest.importorskip("transformers")
    settings = transformers.Blip2QFormerConfig(
        cross_attention_frequency=1, encoder_hidden_size=1024, use_qformer_text_input=True, vocab_size=30523
    )
    own = models.randomize(QFormer(SD15)).eval()
    with torch.device("meta"):
        oracle = transformers.Blip2QFormerModel(settings)
    state = {}
    for name, value in own.state_dict().items():
        if name in ("queries", "text"):
            continue
        for ours, theirs in (
            ("layers.", "encoder.layer."), ("norm.", "LayerNorm."), (".attention.", ".attention.X."), (".cross.", ".crossattention.X."),
            (".query_ffn.rise", ".intermediate_query.dense"), (".text_ffn.rise", ".intermediate.dense"),
            (".query_ffn.fall", ".output_query.dense"), (".text_ffn.fall", ".output.dense"),
            (".query_ffn.", ".output_query."), (".text_ffn.", ".output."),
            ("X.out.", "output.dense."), ("X.LayerNorm.", "output.LayerNorm."), ("X.", "attention."),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        state["layernorm." + name.split(".")[-1] if name.startswith("LayerNorm") else name] = value
    oracle.load_state_dict(state, assign=True, strict=True)
    image = torch.randn(2, 257, 1024, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        embeddings = torch.cat([own.queries, own.text]).expand(2, -1, -1)
        expected = oracle.eval()(query_embeds=embeddings, query_length=16, encoder_hidden_states=image).last_hidden_state
        found = own(image)
    assert found.shape == (2, 16, 768)
    torch.testing.assert_close(found, expected[:, :16], atol=1e-5, rtol=1e-5)


def test_the_projection_is_its_equation():
    projection = models.randomize(TokenProjection(SD15)).double()
    p = dict(projection.state_dict())
    x = torch.randn(2, 16, 768, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centered = x - x.mean(-1, keepdim=True)
    normed = centered / (centered.square().mean(-1, keepdim=True) + 1e-12).sqrt() * p["norm.weight"] + p["norm.bias"]
    z = normed @ p["rise.weight"].T + p["rise.bias"]
    expected = x + (z / (1 + (-1.702 * z).exp())) @ p["fall.weight"].T + p["fall.bias"]
    torch.testing.assert_close(projection(x), expected, atol=1e-10, rtol=1e-10)


def test_weights_in_half_precision_compute_in_float32():
    stream = models.randomize(Stream(TINY)).half()
    features = torch.randn(1, 257, 1024, generator=torch.Generator().manual_seed(0))
    found = stream(features.half())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, stream.float()(features.half()), atol=1e-6, rtol=1e-6)


def test_the_text_reaches_the_queries():
    """They pass through the self-attention of every layer: another word gives other tokens."""
    model = models.random_model(deadiff, TINY)
    features = torch.randn(1, 257, 1024, generator=torch.Generator().manual_seed(0))
    before = model.encode(features, "style").values
    with torch.no_grad():
        model.streams["style"].qformer.text.neg_()
    assert (model.encode(features, "style").values - before).abs().max() > 1e-3


def test_the_vision_tower_is_clips_first_23_blocks():
    transformers = pytest.importorskip("transformers")
    tower = models.randomize(VisionTower()).eval()
    with torch.no_grad():
        for name, value in tower.named_parameters():
            if name.endswith(("ln_1.weight", "ln_2.weight")) or name == "ln_pre.weight":
                value += 1
    settings = transformers.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14, image_size=224,
        hidden_act="quick_gelu",
    )  # fmt: skip
    with torch.device("meta"):
        oracle = transformers.CLIPVisionModel(settings)
    wanted, state = set(oracle.state_dict()), {}
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in wanted) else ""
    for name, value in tower.state_dict().items():
        if ".attn.in_proj_" in name:
            block, kind = name.split(".attn.in_proj_")
            for part, rows in zip(("q", "k", "v"), value.chunk(3), strict=True):
                state[f"{block}.self_attn.{part}_proj.{kind}"] = rows
            continue
        state[name] = value
    renamed = {}
    for name, value in state.items():
        for ours, theirs in (
            ("transformer.resblocks.", "encoder.layers."), (".attn.out_proj", ".self_attn.out_proj"), (".ln_1.", ".layer_norm1."),
            (".ln_2.", ".layer_norm2."), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"), ("ln_pre", "pre_layrnorm"),
            ("conv1", "embeddings.patch_embedding"), ("class_embedding", "embeddings.class_embedding"),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        renamed[prefix + name.replace("positional_embedding", "embeddings.position_embedding.weight")] = value
    last = {name: torch.zeros(oracle.state_dict()[name].shape) for name in wanted - set(renamed)}
    assert all("layers.23." in name or "post_layernorm" in name or "position_ids" in name for name in last), sorted(last)[:3]
    oracle.load_state_dict(renamed | last, assign=True)
    embeddings = (oracle.vision_model if prefix else oracle).embeddings
    embeddings.position_ids = torch.arange(257).unsqueeze(0)  # no part of the state; it lies on the meta device
    images = torch.rand(1, 224, 224, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = oracle.eval()(normalized(images), output_hidden_states=True).hidden_states[-2]
        found = tower(normalized(images))
    assert found.shape == (1, 257, 1024)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(512, 744), (100, 37), (224, 224), (1, 1)])
def test_the_squash_is_pillows(size):
    import numpy as np
    from PIL import Image

    noise = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    images = F.avg_pool2d(noise, 3, 1, 1).movedim(1, -1) if min(size) > 2 else noise.movedim(1, -1)
    levels = (images[0] * 255).round().byte().numpy()
    expected = np.asarray(Image.fromarray(levels).resize((224, 224), Image.Resampling.BICUBIC), dtype=int)
    found = (squash(images)[0] * 255).round().int().numpy()
    assert abs(found - expected).max() <= 1
    assert abs(found - expected).mean() < 0.02
    pixels = normalized(squash(images))
    torch.testing.assert_close(pixels[0, 1, 5, 7], (torch.tensor(found[5, 7, 1] / 255) - MEAN[1]).float() / STD[1])


def test_a_reference_mask_hides_what_is_outside():
    images = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    found = squash(images, mask)
    assert (found[0, :, 120:] - torch.tensor(MEAN)).abs().max() < 1 / 255
    torch.testing.assert_close(found[:, :, :100], squash(images)[:, :, :100])
    with pytest.raises(TokensError, match="mask is empty"):
        squash(images, torch.zeros(1, 64, 64))
    with pytest.raises(TokensError, match="3 masks for 1 reference"):
        squash(images, torch.ones(3, 64, 64))
    with pytest.raises(TokensError, match="NaN or Inf"):
        squash(images.where(images > 0.5, torch.nan))


# --- the joint attention -------------------------------------------------------------------------------------------


def plain_attention(q, k, v, heads):
    """softmax over all keys by hand, loops and float64."""
    B, _, C = q.shape
    d = C // heads
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            logits = q[b, :, part] @ k[b, :, part].T / math.sqrt(d)
            weights = logits.exp() / logits.exp().sum(1, keepdim=True)
            out[b, :, part] = weights @ v[b, :, part]
    return out


def layer(seed=0, B=2, N=12, L=77, C=32, context=64):
    g = torch.Generator().manual_seed(seed)
    wq, wk, wv = (torch.randn(C, n, generator=g, dtype=torch.float64) / math.sqrt(n) for n in (C, context, context))
    x, text = (torch.randn(B, n, w, generator=g, dtype=torch.float64) for n, w in ((N, C), (L, context)))
    return x @ wq.T, text @ wk.T, text @ wv.T


@pytest.mark.parametrize("weight", [0.3, 1.0, 2.0])
def test_the_rows_make_the_papers_joint_attention(weight):
    model = models.random_model(deadiff, TINY).double()
    own = tokens(model_id=model.stream_id("style"))
    rows = Reference(model, own, weight_style=weight).rows()[TINY.layers[0][0]]
    q, k, v = layer()
    roles = ("positive", "negative")
    appended = [torch.cat([x, r.for_call(roles, 2, 77, x)], 1) for x, r in ((k, rows.keys), (v, rows.values))]
    assert appended[0].shape == (2, 81, 32)
    img = torch.stack([own.values[0].double(), torch.zeros(4, 24, dtype=torch.float64)])  # zeros in the negative row
    key, value = (weight * img @ model.to_kv[0][part].T for part in ("i_to_k", "i_to_v"))
    expected = plain_attention(q, torch.cat([k, key], 1), torch.cat([v, value], 1), 8)
    torch.testing.assert_close(joint_attention(q, *appended, 8), expected, atol=1e-6, rtol=1e-6)
    text_alone = plain_attention(q, k, v, 8)
    assert (expected - text_alone).abs()[0].max() > 0.02
    assert (expected - text_alone).abs()[1].max() > 0.005  # null tokens are not nothing


def test_the_idle_stream_and_a_weight_of_0_are_null_tokens():
    model = models.random_model(deadiff, TINY)
    own = tokens()
    rows = Reference(model, style=own).rows()
    style, content = (TINY.layers[k][0] for k in (0, 1))
    assert rows[style].keys.positive.abs().max() > 0.1
    for part in (rows[content].keys, rows[content].values):
        assert part.positive.shape == (1, 4, 64) and part.positive.abs().max() == 0
    silent = Reference(model, style=own, content=tokens("content", seed=1), weight_style=0).rows()
    assert silent[style].keys.positive.abs().max() == 0
    assert silent[content].values.positive.abs().max() > 0.1
    assert not Reference(model, style=own, weight_style=0).active
    assert Reference(model, style=own, content=tokens("content"), weight_style=0).active


def test_a_repeated_context_changes_nothing():
    """ComfyUI repeats a short prompt to the length of a longer one: as many copies of the tokens keep their share exact."""
    q, k, v = layer()
    extra = torch.randn(2, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    once = joint_attention(q, torch.cat([k, extra], 1), torch.cat([v, extra], 1), 8)
    copies = repeats(154, 77)
    again = joint_attention(
        q, torch.cat([k, k, extra.repeat(1, copies, 1)], 1), torch.cat([v, v, extra.repeat(1, copies, 1)], 1), 8
    )
    torch.testing.assert_close(again, once, atol=1e-12, rtol=1e-12)
    half = joint_attention(q, torch.cat([k, k, extra], 1), torch.cat([v, v, extra], 1), 8)
    assert (half - once).abs().max() > 1e-2  # without them it is another picture
    assert [repeats(n, 77) for n in (8, 77, 154, 231, 308, 100)] == [1, 1, 2, 3, 4, 1]
    assert repeats(8, 8) == 1


def test_a_mask_is_joint_inside_and_text_alone_outside():
    q, k, v = layer(B=1, N=16)
    extra = torch.randn(1, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    keys, values = torch.cat([k, extra], 1), torch.cat([v, extra], 1)
    mask = torch.zeros(1, 32, 32)
    mask[:, :16] = 1
    bias = mask_bias(mask, 4, 4, 77, 4).double()
    assert bias.shape == (1, 16, 81)
    found = joint_attention(q, keys, values, 8, bias)
    torch.testing.assert_close(found[:, :8], joint_attention(q, keys, values, 8)[:, :8], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found[:, 8:], joint_attention(q, k, v, 8)[:, 8:], atol=1e-12, rtol=1e-12)
    with pytest.raises(TokensError, match="mask is empty"):
        check_mask(torch.zeros(1, 8, 8))
    with pytest.raises(TokensError, match="NaN"):
        check_mask(torch.full((1, 8, 8), torch.nan))


def test_rows_by_role_and_by_image():
    positive, negative = torch.arange(6.0).view(3, 2, 1), torch.full((1, 2, 1), -1.0)
    found = build_rows(positive, negative, ("negative", "positive"), 8, 1)[..., 0]
    assert found.tolist() == [[-1, -1]] * 4 + [[0, 1], [2, 3], [4, 5], [0, 1]]  # a fourth image starts over
    assert build_rows(positive[:1], negative, (), 2, 2)[..., 0].tolist() == [[0, 1, 0, 1]] * 2
    assert build_rows(positive[:1], negative, ("unknown",), 2, 1)[..., 0].tolist() == [[0, 1]] * 2
    with pytest.raises(TokensError, match="5 rows cannot be 2 equal parts"):
        build_rows(positive, negative, ("negative", "positive"), 5, 1)


def test_rows_are_kept_between_steps_and_follow_the_call():
    model = models.random_model(deadiff, TINY)
    keys = Reference(model, style=tokens()).rows()[TINY.layers[0][0]].keys
    like = torch.zeros(2, 77, 32)
    first = keys.for_call(("positive", "negative"), 2, 77, like)
    assert keys.for_call(("positive", "negative"), 2, 77, like) is first
    assert torch.equal(keys.for_call(("negative", "positive"), 2, 77, like), first.flip(0))
    assert keys.for_call(("positive",), 1, 154, like[:1].half()).dtype == torch.float16


# --- tokens ------------------------------------------------------------------------------------------------------


def test_mixing():
    a, b = tokens(seed=1, labels=("a.png",)), tokens(seed=2, labels=("b.png",))
    torch.testing.assert_close(mix([a, b], [3, 1]).values, 0.75 * a.values + 0.25 * b.values)
    assert mix([a, b], [3, 1]).labels == ("a.png", "b.png")
    torch.testing.assert_close(mix([a, b], [2, -1]).values, 2 * a.values - b.values)
    many = tokens(images=3, seed=3)
    assert mix([a, many], [1, 1]).images == 3
    assert many.averaged().images == 1
    assert many.side_by_side().values.shape == (1, 12, 24)
    torch.testing.assert_close(side_by_side([a, b]).values, torch.cat([a.values, b.values], 1))
    for bad, weights, message in (
        ([a, b], [1, -1], "sum above 0"),
        ([a, b], [1, math.nan], "sum above 0"),
        ([a], [1, 1], "1 sets of tokens and 2 weights"),
        ([], [], "no tokens"),
        ([a, tokens("content")], [1, 1], "different streams"),
        ([a, tokens(width=12)], [1, 1], "different widths cannot be put together: 24, 12"),
        ([a, tokens(count=8)], [1, 1], "4 and 8: put them side by side"),
        ([tokens(images=2), tokens(images=3)], [1, 1], "for 2 and for 3 images"),
        ([tokens(model_id="x"), tokens(model_id="y")], [1, 1], "different DEADiff files cannot be put together: x, y"),
    ):
        with pytest.raises(TokensError, match=message):
            mix(bad, weights)


def test_tokens_refuse_what_is_none():
    with pytest.raises(TokensError, match="NaN or Inf"):
        Tokens(torch.full((1, 4, 24), torch.nan), "style")
    with pytest.raises(TokensError, match="stream 'both'"):
        Tokens(torch.zeros(1, 4, 24), "both")
    with pytest.raises(TokensError, match=r"shape \(4, 24\)"):
        Tokens(torch.zeros(4, 24), "style")


def test_references_refuse_what_does_not_fit():
    model, other = models.random_model(deadiff, TINY), models.random_model(deadiff, TINY, seed=1)
    features = torch.randn(1, 257, 1024, generator=torch.Generator().manual_seed(0))
    own = model.encode(features, "style", "a.png")
    assert own.model_id == model.stream_id("style") != other.stream_id("style")
    assert "4 style tokens (a.png)" in own.described()
    for arguments, message in (
        ({"model": other, "style": own}, "made by another DEADiff file"),
        ({"model": model, "content": own}, "expected content tokens, found style"),
        ({"model": model, "style": tokens(width=12)}, "12 wide, random0 has tokens of 24"),
        ({"model": model}, "no tokens to apply"),
        ({"model": model, "style": own, "weight_style": 2.5}, "weight_style is 2.5, expected 0 to 2"),
        ({"model": model, "style": own, "weight_content": math.nan}, "weight_content is nan"),
        ({"model": model, "style": own, "layer_weights": "up = 3"}, "is 3, expected -2 to 2"),
        ({"model": model, "style": own, "negative_style": tokens(count=8)}, "8 style tokens, more than the 4"),
    ):
        with pytest.raises(TokensError, match=message):
            Reference(**arguments)
    with pytest.raises(SelectorError, match="conv"):
        Reference(model, own, layer_weights="conv = 0.5")
    with pytest.raises(TokensError, match="returns 257 x 1024 numbers an image, found 577 x 1024"):
        model.encode(torch.zeros(1, 577, 1024), "style")


def test_weights_per_stream_layer_and_part():
    model = models.random_model(deadiff, TINY)
    reference = Reference(
        model,
        tokens(),
        tokens("content", seed=1),
        weight_style=0.5,
        weight_content=2,
        layer_weights="up = 0.5; mid & to_v = *-1",
    )
    plain = Reference(model, tokens(), tokens("content", seed=1)).rows()
    rows = reference.rows()
    for place, keys, values in ((0, 0.5, 0.5), (1, 2, 2), (2, 2, -2), (3, 0.25, 0.25), (6, 0.25, 0.25)):
        name = TINY.layers[place][0]
        torch.testing.assert_close(rows[name].keys.positive, keys * plain[name].keys.positive)
        torch.testing.assert_close(rows[name].values.positive, values * plain[name].values.positive)


def test_a_negative_reference_takes_the_place_of_the_zeros():
    model = models.random_model(deadiff, TINY)
    two = side_by_side([tokens(seed=1), tokens(seed=2)])
    rows = Reference(model, two, negative_style=tokens(seed=3)).rows()[TINY.layers[0][0]]
    expected = model.key_values(tokens(seed=3), 0)[0]
    torch.testing.assert_close(rows.keys.negative[:, :4], expected)
    assert rows.keys.negative[:, 4:].abs().max() == 0  # as many rows as the positive has


def test_the_constants_are_small_and_stand_alone():
    model = models.random_model(deadiff, TINY)
    rows = Reference(model, tokens()).rows()
    del model.to_kv
    total = sum(r.nbytes() for r in rows.values())
    style = sum(site.width for site in TINY.sites if site.stream == "style")
    assert 2 * 4 * 4 * style <= total < 2 * 4 * 4 * style + 200  # K and V, 4 tokens, 4 bytes; zeros are one number
