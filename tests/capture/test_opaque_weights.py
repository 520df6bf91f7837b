"""Trainable paths beside weights that nobody can look into, and blocks that are run again: treated as any others."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronfisher as kf
from tests.helpers.checks import assert_exact
from tests.helpers.networks import Written

N = 6


def data(*shape):
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(sum(shape))).double()


def test_adapters_behind_a_function_of_its_own_and_a_frozen_weight():
    """Quantised weights: integers that an autograd function multiplies with, and a trainable path of low rank."""

    class Quantised(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, code):
            ctx.save_for_backward(code)
            return x @ code.to(x.dtype).T / 8

        @staticmethod
        def backward(ctx, gradient):
            (code,) = ctx.saved_tensors
            return gradient @ code.to(gradient.dtype) / 8, None

    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            code = torch.randint(-8, 8, (4, 4), dtype=torch.int8)
            self.weight = nn.Parameter(code, requires_grad=False)
            self.a, self.b = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

        def forward(self, x):
            return Quantised.apply(x, self.weight) + self.b(self.a(x))

    torch.manual_seed(0)
    model = nn.Sequential(Adapter(), nn.Tanh(), Adapter(), nn.Tanh(), Adapter()).double()
    for adapter in (model[0], model[2], model[4]):
        adapter.weight = nn.Parameter(adapter.weight.to(torch.int8), requires_grad=False)
    assert kf.coverage(model, data(4)).complete
    assert_exact(model, data(4), fit=kf.Full(across_layers=True), tolerance=1e-9)

    def dense(m, x):
        for adapter in (m.inner[0], m.inner[2], m.inner[4]):
            x = F.linear(x, adapter.weight.double() / 8) + adapter.b(adapter.a(x))
            x = x.tanh() if adapter is not m.inner[4] else x
        return x

    fisher = kf.estimate(model, data(4), kf.Gaussian(), labels="exact", fit="kfac")
    same = kf.estimate(Written(dense, inner=model), data(4), kf.Gaussian(), labels="exact", fit="kfac")
    assert torch.allclose(fisher.to_dense(), same.to_dense(), atol=1e-12)


@pytest.mark.parametrize("fit", ["kfac", "kfoc", "full", "diagonal"])
def test_checkpointed_blocks_are_as_others(fit):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4))
    members = {"i": nn.Linear(4, 4), "block": block, "o": nn.Linear(4, 2)}
    plain = Written(lambda m, x: m.o(m.block(m.i(x))), **members).double()
    saving = Written(
        lambda m, x: m.o(torch.utils.checkpoint.checkpoint(m.block, m.i(x), use_reentrant=False)), **members
    )
    ours, theirs = (kf.estimate(model, data(4), kf.Gaussian(), fit=fit, strict=True) for model in (saving, plain))
    assert torch.allclose(ours.to_dense(), theirs.to_dense(), atol=1e-12)
    assert_exact(saving, data(4), fit=kf.Full(across_layers=True), tolerance=1e-9)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", ["self-attention", "cross-attention", "encoder", "lstm", "gru", "rnn", "cell"])
def test_what_is_run_in_another_way_may_stand_in_a_checkpoint(kind, train):
    """A checkpoint runs its function again without us: the backward pass meets other tensors if we ran another one."""
    torch.manual_seed(0)

    def again(m, *inputs):
        found = torch.utils.checkpoint.checkpoint(m.inner, *inputs, use_reentrant=False)
        return found[0] if isinstance(found, tuple) else found

    run = {
        "self-attention": lambda m, x: again(m, x, x, x),
        "cross-attention": lambda m, x: again(m, x, y := x.sin(), y),
        "cell": lambda m, x: again(m, x[:, 0])[:, None],
    }.get(kind, again)
    inner = {
        "encoder": lambda: nn.TransformerEncoderLayer(4, 2, 5, 0.0, batch_first=True),
        "lstm": lambda: nn.LSTM(4, 4, batch_first=True),
        "gru": lambda: nn.GRU(4, 4, batch_first=True),
        "rnn": lambda: nn.RNN(4, 4, batch_first=True),
        "cell": lambda: nn.GRUCell(4, 4),
    }.get(kind, lambda: nn.MultiheadAttention(4, 2, batch_first=True))()
    model = Written(lambda m, x: m.o(run(m, x).sum(1)), inner=inner, o=nn.Linear(4, 2)).train(train)
    assert_exact(model.double(), torch.randn(3, 2, 4, dtype=torch.float64), fit=kf.Full(across_layers=True))
    if "attention" in kind or kind == "encoder":
        kf.estimate(model, torch.randn(3, 2, 4, dtype=torch.float64), kf.Gaussian(), strict=True)  # no fallback
