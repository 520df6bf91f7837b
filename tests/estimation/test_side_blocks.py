"""Vectors and tables beside the layers: their price is bounded by the network's, and said; by name they are dense."""

import copy
import time

import pytest
import torch
from torch import nn

import kronfisher as kf
from tests.helpers.networks import Written
from tests.helpers.truth import exact_fisher

N = 6


def network(width=12, length=10, scale=False, seed=0):
    """Tokens to which a table of positions is added, or which are scaled by one, and a small last layer."""
    torch.manual_seed(seed)

    def forward(m, x):
        return m.o((m.l(x) * m.p if scale else m.l(x) + m.p).tanh().mean(1))

    table = torch.randn(1, length, width)
    return Written(forward, l=nn.Linear(3, width), p=table, o=nn.Linear(width, 2)).double()


def tokens(length=10, n=N):
    return torch.randn(n, length, 3, generator=torch.Generator().manual_seed(n)).double()


def truth_of(model, x, name):
    places, start = {}, 0
    for each, p in model.named_parameters():
        places[each] = slice(start, start := start + p.numel())
    return exact_fisher(model, x)[places[name], places[name]]


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("fit", ["kfac", "kfoc", "ekfac", "tkfac"])
def test_a_table_that_would_cost_more_than_the_network_has_its_exact_diagonal(fit, scale):
    model, x = network(scale=scale), tokens()
    fisher = kf.estimate(model, [x[:2], x[2:]], kf.Gaussian(), fit=fit, labels="exact")
    truth = truth_of(model, x, "p")
    assert fisher["p"].kind == "diagonal" and fisher["l.weight"].kind != "diagonal"
    assert torch.allclose(fisher.diagonal()["p"].flatten(), truth.diagonal(), rtol=1e-9)
    text = " ".join(str(fisher.report()).split())
    assert "p: diagonal, because a dense factor of 120 rows takes" in text and "keeps it in full" in text
    assert "diagonal" in fisher.report().coverage
    assert fisher.error(x).blocks["p"] == pytest.approx(
        float((truth - truth.diagonal().diag()).norm() / truth.norm()), rel=1e-6
    )
    coverage = kf.coverage(model, x, fit=fit)
    assert {row.parameter: row.structure for row in coverage.rows}["p"] == "diagonal" and coverage.complete
    assert any(line.startswith("p: diagonal, because") for line in str(coverage).splitlines())


@pytest.mark.parametrize("fit", ["kfac", "kfoc"])
def test_what_was_asked_for_by_name_is_had_in_full(fit):
    model, x = network(), tokens()
    fisher = kf.estimate(model, x, kf.Gaussian(), fit={"p": fit, "*": fit}, labels="exact")
    assert torch.allclose(fisher["p"].to_dense(), truth_of(model, x, "p"), rtol=1e-6, atol=1e-12)
    assert fisher.report().coverage == "100.0 % by layers"
    assert kf.coverage(model, x, fit={"p": fit, "*": fit}).cuts == ()


def test_the_price_is_that_of_all_data_and_memory_counts_too():
    """Products with many samples pay for one factorisation; what is left is that the factor must not be the largest."""
    model, x = network(width=9, length=8), tokens(length=8)

    def deep(m, x):
        h = m.inner.l(x) + m.inner.p
        for _ in range(60):
            h = m.again(h).tanh()
        return m.inner.o(h.mean(1))

    used = Written(deep, inner=model, again=nn.Linear(9, 9)).double()
    one, many = kf.coverage(used, x), kf.coverage(used, [x] * 5000)
    assert "operations" in one.cuts[0] and "numbers, and all parameters together" in many.cuts[0]
    assert "operations" in kf.coverage(used, iter([x] * 5000)).cuts[0]  # nobody knows how many there are
    wide = Written(lambda m, x: m.b(deep(m.used, x)), b=nn.Linear(2, 5000), used=used).double()
    assert kf.coverage(wide, [x] * 5000).cuts == ()


def test_small_vectors_stay_dense():
    model = nn.Sequential(nn.Linear(3, 64), nn.LayerNorm(64), nn.Tanh(), nn.Linear(64, 2)).double()
    fisher = kf.estimate(model, tokens()[:, 0], kf.Gaussian(), labels="exact")
    assert fisher["1.weight"].kind != "diagonal" and fisher.report().coverage == "100.0 % by layers"


def test_training_bounds_it_by_the_batch_says_so_and_resumes():
    model, x, y = network(), tokens(), torch.arange(N) % 2
    optimizer = kf.NaturalGradient(model, kf.Categorical(), fit="kfac", step=kf.QuadraticModel())
    for _ in range(3):
        optimizer.step(lambda: model(x), y)
    assert optimizer.parts.statistics.uncovered == {}
    assert "p: diagonal, because a dense factor of 120 rows takes" in str(optimizer.report())
    again = network()
    again.load_state_dict(model.state_dict())
    resumed = kf.NaturalGradient(again, kf.Categorical(), fit="kfac", step=kf.QuadraticModel())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        assert float(optimizer.step(lambda: model(x), y)) == float(resumed.step(lambda: again(x), y))
    asked = kf.NaturalGradient(again, kf.Categorical(), fit={"p": "kfac", "*": "kfac"}, step=kf.QuadraticModel())
    asked.step(lambda: again(x), y)
    assert "because" not in str(asked.report())


def test_a_table_of_4096_numbers_takes_no_longer_than_the_rest():
    torch.manual_seed(0)
    model = Written(
        lambda m, x: m.o((m.l(x) + m.p).tanh().mean(1)),
        l=nn.Linear(64, 64),
        p=torch.randn(1, 64, 64),
        o=nn.Linear(64, 3),
    )
    x = torch.randn(8, 64, 64)
    began = time.process_time()
    fisher = kf.estimate(model, x, kf.Gaussian())
    (fisher + 1e-3).solve({name: torch.ones_like(p) for name, p in model.named_parameters()})
    assert time.process_time() - began < 5  # the factor alone takes half a minute to decompose
