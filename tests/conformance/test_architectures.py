"""Architectures as people bring them: runs at first try, and the exact matrix is that of single data."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronfisher as kf
from kronfisher.likelihoods import Draws
from tests.helpers.networks import Written
from tests.helpers.optional import require
from tests.helpers.truth import exact_fisher

TOKENS = torch.randint(3, 16, (3, 6), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 17, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12,
    "max_position_embeddings": 16,
}  # fmt: skip
BOTH = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :4]}
HEARD = {"input_features": IMAGES[:, 0, :4], "decoder_input_ids": TOKENS[:, :4]}
BIAS = r"relative_position_bias_table|relative_attention_bias"
# class, configuration, its options, batch, which parameters are left to the fallback
EXTERNAL = {
    "T5ForConditionalGeneration": (
        "T5Config", {"vocab_size": 17, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2},
        BOTH, BIAS,
    ),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SIZES, {"input_ids": TOKENS}, ""),
    "MistralForCausalLM": ("MistralConfig", {**SIZES, "num_key_value_heads": 1}, {"input_ids": TOKENS}, ""),
    "GemmaForCausalLM": (
        "GemmaConfig", {**SIZES, "num_key_value_heads": 1, "head_dim": 4}, {"input_ids": TOKENS}, "",
    ),
    "AlbertForMaskedLM": (
        "AlbertConfig", {**SIZES, "num_hidden_layers": 2, "embedding_size": 4}, {"input_ids": TOKENS}, "",
    ),
    "DistilBertForSequenceClassification": (
        "DistilBertConfig",
        {"vocab_size": 17, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 12, "max_position_embeddings": 16},
        {"input_ids": TOKENS}, "",
    ),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        {"vocab_size": 17, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "num_mel_bins": 4,
         "max_source_positions": 8, "max_target_positions": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        HEARD, "",
    ),
    "ConvNextForImageClassification": (
        "ConvNextConfig", {"hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
        {"pixel_values": IMAGES}, "",
    ),
    "SwinForImageClassification": (
        "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": 4, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
        {"pixel_values": IMAGES}, BIAS,
    ),
}  # fmt: skip


def logits(model, batch):
    return model(**batch).logits, None


@pytest.mark.parametrize("kind", EXTERNAL)
def test_networks_of_transformers(kind):
    transformers = require("transformers")
    config, options, batch, fallback = EXTERNAL[kind]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**options)).eval().double()
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    likelihood = kf.Gaussian()
    fisher = kf.estimate(model, [batch], likelihood, forward=logits)  # as a new user would
    alone = [name for name, block in fisher.info.blocks.items() if block.method.startswith("fallback")]
    assert bool(alone) == bool(fallback) and all(re.search(fallback, name) for name in alone)
    full = kf.estimate(model, [batch], likelihood, forward=logits, fit=kf.Full(across_layers=True), seed=3)
    drawn = likelihood.sampled(logits(model, batch)[0].detach(), None, Draws(3))
    tolerance = 1e-8 if kind == "GemmaForCausalLM" else 1e-10  # its norms are in float32
    assert_drawn(model, logits(model, batch)[0], drawn, full, tolerance)


def assert_drawn(model, outputs, drawn, fisher, tolerance=1e-10):
    """The matrix of labels drawn is that of the gradients of single data, one after the other."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    truth = torch.zeros_like(fisher.to_dense())
    for k in range(len(outputs)):
        alone = torch.zeros_like(drawn)
        alone[k] = drawn[k]
        found = torch.autograd.grad(outputs, parameters, alone, retain_graph=True, allow_unused=True)
        parts = [p.new_zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
        truth += torch.outer(torch.cat(parts), torch.cat(parts)) / len(outputs)
    assert (fisher.to_dense() - truth).norm() < tolerance * truth.norm()


def unet(m, x):
    a = F.silu(m.down(x))
    b = F.silu(m.norm(m.deeper(a)))
    return m.out(torch.cat([m.up(b), a], dim=1)).flatten(1)


def routed(m, x):
    share = m.router(x).softmax(-1)
    chosen, out = share.argmax(-1), x.new_zeros(len(x), 2)
    for k, expert in enumerate(m.experts):
        rows = (chosen == k).nonzero()[:, 0]
        out = out.index_add(0, rows, expert(x[rows]) * share[rows, k : k + 1])
    return out


def passed(m, x):
    source, target = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 2, 3, 4, 0, 2])
    h = torch.zeros_like(x).index_add(x.dim() - 2, target, x.index_select(x.dim() - 2, source))
    return m.l(x + h).tanh().mean(-2) if x.dim() == 3 else m.l(x + h)


def normed(m, x):
    return m.o(m.s(m.w(x).tanh()).tanh())


PARAMETRISATIONS = nn.utils.parametrizations
OWN = {
    "u-net": (
        lambda: Written(
            unet, down=nn.Conv2d(3, 2, 3, padding=1), deeper=nn.Conv2d(2, 4, 3, stride=2, padding=1),
            norm=nn.GroupNorm(2, 4), up=nn.ConvTranspose2d(4, 2, 2, stride=2), out=nn.Conv2d(4, 2, 1),
        ), IMAGES[:, :, :4, :4], 0,
    ),
    "siamese": (
        lambda: Written(
            lambda m, x: m.h(m.e(x[:, :5]) * m.e(x[:, 5:])),
            e=nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 4)), h=nn.Linear(4, 2),
        ), IMAGES[:, 0, 0, :10], 0,
    ),
    "experts": (
        lambda: Written(routed, router=nn.Linear(4, 3), experts=nn.ModuleList(nn.Linear(4, 2) for _ in range(3))),
        IMAGES[:, 0, :8, :4].flatten(0, 1), 6,
    ),
    "graphs": (lambda: Written(passed, l=nn.Linear(4, 3)), IMAGES[:, 0, :5, :4], 0),
    "language model": (
        lambda: Written(lambda m, x: m.o(m.l(m.e(x))[0]), e=nn.Embedding(17, 4), l=nn.LSTM(4, 5, batch_first=True),
                        o=nn.Linear(5, 3)), TOKENS, 4,
    ),
    "parametrised": (
        lambda: Written(
            normed, w=PARAMETRISATIONS.weight_norm(nn.Linear(5, 6)), s=PARAMETRISATIONS.spectral_norm(nn.Linear(6, 6)),
            o=PARAMETRISATIONS.orthogonal(nn.Linear(6, 6)),
        ), IMAGES[:, 0, 0, :5], 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_networks_written_by_hand(name):
    build, x, most = OWN[name]
    torch.manual_seed(0)
    model, x = build().eval().double(), x.double() if x.is_floating_point() else x
    fisher = kf.estimate(model, x, kf.Gaussian())
    assert sum(block.method.startswith("fallback") for block in fisher.info.blocks.values()) <= most
    full = kf.estimate(model, x, kf.Gaussian(), fit=kf.Full(across_layers=True), labels="exact").to_dense()
    truth = exact_fisher(model, x)
    assert (full - truth).norm() < 1e-10 * truth.norm()


def test_rows_that_hear_of_each_other_are_refused_by_name():
    """Nodes of one graph are no data of their own, and the message says so."""
    model = Written(passed, l=nn.Linear(4, 3), k=nn.Linear(3, 3))

    def forward(m, x):
        h = passed(m, x).relu()
        return m.k(h + h.flip(0))

    model.function = forward
    with pytest.raises(
        kf.UnsupportedError, match=r"l\.weight \(used by linear\).* mixes several examples.*nodes of one graph"
    ):
        kf.estimate(model, IMAGES[0, 0, :5, :4], kf.Gaussian())
