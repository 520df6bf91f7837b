"""Attention in all the ways in which torch's modules offer it: the same outputs, and gradients as autograd has them."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.capture.capture import Capture
from kronfisher.capture.graph import walk
from tests.helpers.checks import assert_exact
from tests.helpers.networks import Written

N, T, S, E = 4, 3, 5, 6  # data, queries, keys, width


def inputs(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


PADDING = torch.arange(S) >= torch.tensor([5, 3, 4, 2])[:, None]
CAUSAL = torch.triu(torch.ones(T, T, dtype=torch.bool), 1)

# Name → (options of the module, does it attend to something else, arguments of the call)
WAYS = {
    "self": ({}, False, {}),
    "self without weights": ({}, False, {"need_weights": False}),
    "self, weights of each head": ({}, False, {"average_attn_weights": False}),
    "self, no bias": ({"bias": False}, False, {}),
    "cross": ({}, True, {}),
    "cross, other widths": ({"kdim": 2, "vdim": 3}, True, {}),
    "cross, other widths, no bias": ({"kdim": 2, "vdim": 3, "bias": False}, True, {"need_weights": False}),
    "padding": ({}, True, {"key_padding_mask": PADDING}),
    "mask": ({}, False, {"attn_mask": CAUSAL}),
    "causal": ({}, False, {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    "mask of numbers": ({}, False, {"attn_mask": inputs(T, T)}),
    "masks of every head": ({}, False, {"attn_mask": inputs(N * 2, T, T)}),
    "additional keys": ({"add_bias_kv": True}, False, {}),
    "zero attention and additional keys": ({"add_bias_kv": True, "add_zero_attn": True}, True, {}),
}


def build(name, batch_first):
    options, cross, call = WAYS[name]
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, 2, batch_first=batch_first, **options)
    nn.init.normal_(module.out_proj.bias) if module.out_proj.bias is not None else None
    other = inputs(N, S, E)
    widths = options.get("kdim", E), options.get("vdim", E)

    def forward(m, x):
        key, value = (other[..., : widths[0]], other[..., -widths[1] :].sin()) if cross else (x, x)
        if cross and widths == (E, E):
            value = key  # as between an encoder and a decoder
        triple = (x, key, value) if batch_first else tuple(each.transpose(0, 1) for each in (x, key, value))
        if not cross:
            triple = (triple[0],) * 3
        answer = m.attention(*triple, **call)[0]
        return (answer if batch_first else answer.transpose(0, 1)).tanh().flatten(1)

    return Written(forward, attention=module), inputs(N, T, E)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", WAYS)
def test_every_way(name, batch_first):
    model, x = build(name, batch_first)
    plain = model(x)
    with Capture(dict(model.named_parameters())) as capture:
        seen = model(x)
    assert torch.allclose(seen, plain, atol=1e-6)
    assert walk(capture.recording, seen).unclaimed == {}
    fisher = assert_exact(model, x, fit=kf.Full(across_layers=True))
    assert fisher.dim == sum(p.numel() for p in model.parameters())
    assert_exact(model, x, fit="diagonal")
    assert_exact(model, x)
    packed = "kdim" not in WAYS[name][0]
    kfac = kf.estimate(model, x, kf.Gaussian(), strict=True)
    projections = [block for block in kfac.blocks if "proj" in block]
    assert len(projections) == 4, projections
    assert ("attention.in_proj_weight[0:6, :]" in projections) == packed
    assert all(kfac[block].structure.startswith("kronecker") for block in projections)


def test_dropout_draws_as_it_does_without_us():
    model = nn.MultiheadAttention(E, 2, dropout=0.5, batch_first=True)
    x = inputs(N, T, E)
    torch.manual_seed(3)
    plain = model(x, x, x)[0]
    torch.manual_seed(3)
    with Capture(dict(model.named_parameters())):
        seen = model(x, x, x)[0]
    assert torch.allclose(plain, seen, atol=1e-6)


def test_a_single_sequence_without_an_axis_for_data():
    model = Written(lambda m, x: m.a(x[0], x[0], x[0])[0][None].flatten(1), a=nn.MultiheadAttention(E, 3))
    assert_exact(model, inputs(1, T, E), fit=kf.Full(across_layers=True))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_layers(batch_first, training, norm_first):
    """In eval mode torch would take a fused path, which hides everything."""
    layer = nn.TransformerEncoderLayer(E, 2, 7, 0, "gelu", batch_first=batch_first, norm_first=norm_first)

    def forward(m, x):
        x = x if batch_first else x.transpose(0, 1)
        return (m.t(x) if batch_first else m.t(x).transpose(0, 1)).flatten(1)

    model = Written(forward, t=layer).train(training)
    x = inputs(N, T, E)
    assert_exact(model, x, fit=kf.Full(across_layers=True))
    assert_exact(model, x, fit="diagonal")
    assert len(kf.estimate(model, x, kf.Gaussian(), strict=True).blocks) == 3 + 1 + 2 + 4
    model.t.self_attn.requires_grad_(False)
    model.t.linear1.requires_grad_(False)
    assert_exact(model, x, fit=kf.Full(across_layers=True))


def test_encoder_and_decoder_with_padding():
    torch.manual_seed(0)
    model = nn.Transformer(E, 2, 1, 1, 5, 0, batch_first=True)
    padding = PADDING[:, :S]
    whole = Written(
        lambda m, x: m.t(x, x[:, :T].cos(), src_key_padding_mask=padding, memory_key_padding_mask=padding).flatten(1),
        t=model,
    ).eval()
    x = inputs(N, S, E)
    kf.estimate(whole, x, kf.Gaussian(), strict=True)
    assert_exact(whole, x, fit="diagonal", tolerance=1e-4)


def test_learned_queries_meet_the_examples_where_they_are_expanded():
    attention = nn.MultiheadAttention(E, 2, batch_first=True)
    model = Written(
        lambda m, x: m.a(m.queries.expand(len(x), -1, -1), x, x)[0].flatten(1), a=attention, queries=torch.randn(2, E)
    )
    for fit in ("diagonal", kf.Full(across_layers=True)):
        assert_exact(model, inputs(N, T, E), fit=fit)
    assert kf.coverage(model, inputs(N, T, E)).complete


def test_packed_blocks_do_not_depend_on_the_order_of_batches():
    model, x = build("self", True)
    whole = kf.estimate(model, x, kf.Gaussian(), labels="exact").to_dense()
    parts = kf.estimate(model, [x[:1], x[1:]], kf.Gaussian(), labels="exact").to_dense()
    assert torch.allclose(whole, parts, atol=1e-6)
