"""Weights in several roles, frozen parts, and weights and biases under different fits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronfisher as kf
from kronfisher.capture.capture import Capture
from kronfisher.fits import FITS, resolve
from tests.helpers.checks import assert_exact
from tests.helpers.networks import Written, linears


def test_tied_weights():
    x = torch.randn(5, 4, 3)
    assert_exact(linears(lambda m, x: m.l0(m.l0(x).tanh()).flatten(1), (3, 3)), x)
    other_lengths = linears(lambda m, x: m.l0(x).sum(1) + m.l0(x[:, :2]).tanh().sum(1) + m.l0(x[:, 0]), (3, 3))
    assert_exact(other_lengths, x)
    assert_exact(other_lengths, x, fit="diagonal")
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    other_bias = nn.Sequential(first, nn.Tanh(), second, nn.Flatten())
    for fit in ("full", "diagonal", kf.Full(across_layers=True)):
        assert_exact(other_bias, x, fit=fit)
    assert list(kf.estimate(other_bias, x, kf.Gaussian(), strict=True).blocks) == ["0.weight", "0.bias", "2.bias"]
    second.bias = first.bias
    assert_exact(nn.Sequential(first, nn.Tanh(), second, nn.Flatten()), x)
    shared = nn.Sequential(first, nn.Tanh())
    assert_exact(nn.Sequential(shared, shared, nn.Flatten()), x)
    second.weight = nn.Parameter(torch.randn(3, 3))
    same_bias = nn.Sequential(first, nn.Tanh(), second, nn.Flatten())
    for fit in ("full", "diagonal", kf.Full(across_layers=True)):
        assert_exact(same_bias, x, fit=fit)
    assert list(kf.estimate(same_bias, x, kf.Gaussian(), strict=True).blocks) == ["0.weight", "0.bias", "2.weight"]


def autoencoder():
    """A weight and its transpose, as in tied auto-encoders, with biases of their own."""
    return Written(
        lambda m, x: F.linear(F.linear(x, m.w, m.b).tanh(), m.w.t(), m.c),
        w=torch.randn(4, 3), b=torch.randn(4), c=torch.randn(3),
    )  # fmt: skip


def test_a_weight_in_two_roles_has_a_term_for_each():
    model, x = autoencoder(), torch.randn(5, 3)
    for fit in ("full", "diagonal", kf.Full(across_layers=True)):
        assert_exact(model, x, fit=fit)
    fisher = kf.estimate(model, x, kf.Gaussian(), labels="exact", strict=True)
    assert fisher["w"].structure == "kronecker 3x4 + kronecker 3x4"
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    solved = (fisher + 0.1).solve(v)
    again = (fisher + 0.1) @ solved
    assert all(torch.allclose(again[name], v[name], atol=1e-3) for name in v)
    assert fisher.error(x).relative < 1
    assert kf.estimate(model, x, kf.Gaussian(), fit="ekfac")["w"].trace() > 0


@pytest.mark.parametrize("fit", [name for name in FITS if not resolve(name).exact])
def test_roles_add_up_whatever_the_fit(fit):
    """The block of a tied weight is the sum of those that two weights of the same values have."""
    model, x = autoencoder(), torch.randn(6, 3)
    apart = Written(
        lambda m, x: F.linear(F.linear(x, m.w, m.b).tanh(), m.v, m.c),
        w=model.w.detach(), b=model.b.detach(), v=model.w.detach().t().clone(), c=model.c.detach(),
    )  # fmt: skip
    options = {"fit": {"b": "diagonal", "c": "diagonal", "*": fit}, "labels": "exact"}
    tied, roles = (kf.estimate(m.double(), x.double(), kf.Gaussian(), **options) for m in (model, apart))
    order = torch.arange(12).view(3, 4).t().flatten()
    expected = roles["w"].to_dense() + roles["v"].to_dense()[order][:, order]
    torch.testing.assert_close(tied["w"].to_dense(), expected, rtol=1e-8, atol=1e-10)


def test_embedding_tied_to_the_last_layer():
    model = Written(lambda m, x: (m.e(x).tanh().cumsum(1) @ m.e.weight.t()).flatten(1), e=nn.Embedding(7, 4))
    x = torch.randint(7, (5, 3), generator=torch.Generator().manual_seed(1))
    for fit in ("full", "diagonal"):
        assert_exact(model, x, fit=fit)
    fisher = kf.estimate(model, x, kf.Gaussian(), labels="exact", strict=True)
    assert fisher["e.weight"].structure == "kronecker 4x7 + kronecker 4xdiag(7)"


def test_tied_kfac_is_the_sum_over_all_rows():
    """K-FAC needs no owners: uses with different numbers of positions add up."""
    model = linears(lambda m, x: m.l0(x).sum(1) + m.l0(x[:, :2]).sum(1) * 3, (3, 2), bias=False)
    x = torch.randn(5, 4, 3)
    fisher = kf.estimate(model, x, kf.Gaussian(), labels="exact", fit="kfac")
    rows = torch.cat([x.flatten(0, 1), x[:, :2].flatten(0, 1)])
    assert torch.allclose(fisher["l0.weight"].A, rows.T @ rows / 30, atol=1e-6)
    assert torch.allclose(fisher["l0.weight"].B, (4 * 1 + 2 * 9) * torch.eye(2), atol=1e-5)


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_frozen_halves(frozen):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model.get_parameter(frozen).requires_grad_(False)
    x = torch.randn(5, 3)
    fisher = assert_exact(model, x)
    assert frozen not in fisher.shapes
    assert_exact(model, x, fit={"*.bias": "diagonal", "*": "full"} if "weight" in frozen else {"*": "diagonal"})


def test_frozen_layers_cost_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    with Capture(dict(model.named_parameters())) as capture:
        outputs = model(torch.randn(5, 3))
    assert [call.uses[0].name for call in capture.calls] == ["2.weight"]
    assert outputs.grad_fn.next_functions[1][0] is None  # no gradient flows into the frozen part


def test_weight_and_bias_under_different_fits():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Conv1d(4, 2, 1)), torch.randn(5, 4, 3).transpose(1, 2)
    model = Written(lambda m, x: m.c(m.l(x.transpose(1, 2)).tanh().transpose(1, 2)).flatten(1), l=model[0], c=model[2])
    fisher = assert_exact(model, x, fit={"*.bias": "diagonal", "*": "full"})
    assert list(fisher.blocks) == ["l.weight", "l.bias", "c.weight", "c.bias"]
