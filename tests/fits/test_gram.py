"""The exact matrix over all parameters, against dense float64 truth."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.errors import MemoryBudgetError
from kronfisher.likelihoods import REGISTRY
from tests.conformance.examples import EXAMPLES
from tests.conformance.problems import DRAWS, SEED, problem
from tests.helpers.close import close
from tests.helpers.truth import jacobian

LABELS = ("exact", "observed", "sampled")
# Every use and every likelihood meet under some labels; conformance runs the rest.
TURNS = [
    (example, likelihood, LABELS[(i + j) % 3])
    for i, example in enumerate(EXAMPLES)
    for j, likelihood in enumerate(list(REGISTRY)[i % 7 :: 7])
]


@pytest.mark.parametrize(("example", "likelihood", "labels"), TURNS)
def test_agrees_with_the_truth_from_either_side(example, likelihood, labels):
    p = problem(example, likelihood)
    fisher = kf.estimate(p.model, p.batch, p.likelihood, fit="gram", labels=labels, samples=DRAWS, seed=SEED)
    truth, vector = p.truth(labels), torch.randn(fisher.dim, dtype=torch.float64)
    top = float(torch.linalg.eigvalsh(truth)[-1])
    close(fisher @ vector, truth @ vector)
    close(fisher.eigenvalues(), torch.linalg.eigvalsh(truth).flip(0), 1e-8)
    for share in (1e-2, 1e-6):
        dense = truth + share * top * torch.eye(len(truth), dtype=torch.float64)
        damped = fisher + share * top
        close(damped.solve(vector), torch.linalg.solve(dense, vector), 1e-8)
        close(damped.logdet(), torch.logdet(dense), 1e-8)
        close(damped.frobenius_norm(), dense.norm(), 1e-8)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def test_batches_have_their_cross_terms_and_files_keep_them(tmp_path):
    model, x = network(), torch.randn(9, 3).double()
    one = kf.estimate(model, x, kf.Categorical(), fit="gram", labels="exact")
    parts = kf.estimate(model, list(x.split([2, 4, 3])), kf.Categorical(), fit=kf.Gram(), labels="exact")
    close(parts.to_dense(), one.to_dense(), 1e-12)
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    close((parts + 0.1).solve(v)["0.weight"], (one + 0.1).solve(v)["0.weight"], 1e-10)
    parts.save(tmp_path / "fisher.safetensors")
    loaded = kf.load(tmp_path / "fisher.safetensors", model)
    assert torch.equal(loaded.to_dense(), parts.to_dense())
    assert "samples x 38" in str(parts.report())


def test_laplace_is_the_dense_one():
    model, x = network(), torch.randn(9, 3).double()
    fisher = kf.estimate(model, (x, torch.randn(9, 2).double()), kf.Gaussian(), fit="gram", labels="exact")
    posterior, jac = kf.Laplace(model, fisher, 1.5), jacobian(model, x[:4], fisher.names)
    dense = fisher.to_dense() * 9 + 1.5 * torch.eye(fisher.dim).double()
    close(posterior.functional_covariance(x[:4])[1], jac @ torch.linalg.solve(dense, jac.mT), 1e-8)
    close(sum(p.logdet() for p in posterior.precisions.values()), torch.logdet(dense), 1e-8)


def test_what_is_too_large_is_refused_with_the_bytes():
    model, x = network(), torch.randn(9, 3).double()
    with pytest.raises(MemoryBudgetError, match="max_rows=8"):
        kf.estimate(model, x, kf.Gaussian(), fit=kf.Gram(max_rows=8))
    kf.estimate(model, x, kf.Gaussian(), fit=kf.Gram(max_rows=9))
    with pytest.raises(MemoryBudgetError, match=r"needs [\d,]+ bytes .* for 9 samples of 32 parameters|38 parameters"):
        kf.estimate(model, x, kf.Gaussian(), fit="gram", memory_budget=4000)
    with pytest.raises(ValueError, match="max_rows"):
        kf.Gram(max_rows=0)


def test_comparisons_take_it_only_when_it_is_named():
    model, x = network(), torch.randn(9, 3).double()
    assert all(row.fit != "gram" for row in kf.compare(model, x, kf.Gaussian(), fits=None).rows)
    assert [row.fit for row in kf.compare(model, x, kf.Gaussian(), fits=["gram"]).rows] == ["gram"]
