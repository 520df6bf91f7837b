"""Residuals as a likelihood: the loss, the matrix, and what is refused."""

import pytest
import torch

import kronfisher as kf
from kronfisher.errors import DataError, NumericalError, UnsupportedError
from tests.helpers.close import close
from tests.helpers.residuals import laplacian, network, rows


def terms(model, x):
    return {"equation": laplacian(model, x) - 1, "boundary": model(x[:3])}


def problem():
    torch.manual_seed(0)
    return network(2, 3, 1), torch.rand(6, 2).double()


@pytest.mark.parametrize("options", [{"weights": {"equation": 2.0, "boundary": 0.5}},
                                     {"noise": {"equation": 0.3, "boundary": 0.1}}], ids=str)  # fmt: skip
def test_loss_and_matrix_by_their_formulas(options):
    (model, x), likelihood = problem(), kf.Residuals(**options)
    found = terms(model, x)
    e, b = found["equation"], found["boundary"].flatten()
    if "weights" in options:
        scales = [(2.0 / len(e)) ** 0.5, (0.5 / len(b)) ** 0.5]
        close(likelihood.loss(found), 0.5 * (2.0 * e.square().mean() + 0.5 * b.square().mean()), 1e-14)
    else:
        scales = [1 / 0.3, 1 / 0.1]
        close(likelihood.loss(found), 0.5 * ((e / 0.3).square().sum() + (b / 0.1).square().sum()), 1e-14)
    J = rows(torch.cat([e * scales[0], b * scales[1]]), model)
    forward = {"forward": lambda model, batch: (terms(model, batch), None)}
    for fit in ("gram", kf.Full(across_layers=True)):
        fisher = kf.estimate(model, x, likelihood, fit=fit, labels="exact", **forward)
        assert fisher.count == 1
        close(fisher.to_dense(), J.mT @ J)
    twice = kf.estimate(model, [x, x], likelihood, fit="gram", labels="exact", **forward)
    assert twice.count == 2
    close(twice.to_dense(), J.mT @ J)
    diagonal = kf.estimate(model, x, likelihood, fit="kfac", labels="exact", **forward)
    named = torch.cat([part.flatten() for part in diagonal.diagonal().values()])
    close(named[:6], (J.mT @ J).diagonal()[:6])  # the first weight meets second derivatives: its exact diagonal
    assert "fallback" in str(diagonal.report())
    observed = kf.estimate(model, x, likelihood, fit="gram", labels="observed", **forward)
    own = J * torch.cat([e * scales[0], b * scales[1]])[:, None]
    close(observed.to_dense(), own.mT @ own)


def test_terms_of_one_forward_pass_have_rows_of_their_own():
    """A system of equations: seen refused, because a position of the network has a part in several residuals."""
    torch.manual_seed(0)
    model, x, likelihood = network(2, 4, 2), torch.rand(5, 2).double(), kf.Residuals(noise={"flow": 0.5, "data": 0.1})

    def system(model, batch):
        batch = batch.clone().requires_grad_()
        u = model(batch)
        slope = [torch.autograd.grad(u[:, k].sum(), batch, create_graph=True)[0] for k in (0, 1)]
        first = u[:, 0] * slope[0][:, 0] + slope[1][:, 1] - 1
        return {"flow": torch.stack([first, slope[0].sum(1)], 1), "data": u[1:, 0] - u[:-1, 1]}, None

    J = rows(likelihood.joined(system(model, x)[0]), model)
    named = lambda fisher: torch.cat([part.flatten() for part in fisher.diagonal().values()])  # noqa: E731
    for fit in ("gram", "full", "diagonal", "kfac"):
        fisher = kf.estimate(model, [x, x], likelihood, fit=fit, labels="exact", forward=system)
        close(named(fisher), J.square().sum(0), 1e-12)
        if fit == "gram":
            close(fisher.to_dense(), J.mT @ J, 1e-12)
    assert "several residuals" in str(fisher.report())
    best = kf.estimate(model, x, likelihood, fit="kfoc", labels="exact", forward=system)
    assert best["0.weight"].structure.startswith("kronecker")
    with pytest.raises(UnsupportedError, match="strict=True"):
        kf.estimate(model, x, likelihood, labels="exact", forward=system, strict=True)


def test_a_posterior_of_noisy_residuals_is_the_dense_one():
    (model, x), likelihood = problem(), kf.Residuals(noise={"equation": 0.3, "boundary": 0.1})
    forward = lambda model, batch: (terms(model, batch), None)  # noqa: E731
    fisher = kf.estimate(model, x, likelihood, fit="gram", labels="exact", forward=forward)
    posterior = kf.Laplace(model, fisher, 2.0)
    dense = fisher.to_dense() + 2 * torch.eye(fisher.dim).double()
    close(sum(p.logdet() for p in posterior.precisions.values()), torch.logdet(dense), 1e-8)
    field = kf.Laplace(model, fisher, 2.0, forward=lambda model, batch: (model(batch), None))
    J = rows(model(x)[:, 0], model)  # weights, which the derivatives met in their own way, meet the field in the usual
    close(field.functional_variance(x)[1][:, 0], (J @ torch.linalg.solve(dense, J.mT)).diagonal(), 1e-8)


BAD = {
    "empty": (DataError, "'boundary' are \\[0, 1\\]", lambda e, b: {"equation": e, "boundary": b[:0]}),
    "complex": (DataError, "real and imaginary parts", lambda e, b: {"equation": e, "boundary": b + 0j}),
    "a mean": (DataError, "one row for every point", lambda e, b: {"equation": e.mean(), "boundary": b}),
    "unknown": (DataError, "differing: other", lambda e, b: {"equation": e, "boundary": b, "other": b}),
    "missing": (DataError, "differing: boundary", lambda e, b: {"equation": e}),
    "a tensor": (DataError, "needs a mapping", lambda e, b: e),
    "not finite": (NumericalError, "1 of 6 residuals 'equation'",
                   lambda e, b: {"equation": torch.where(torch.arange(6) == 2, torch.inf, e), "boundary": b}),
    "no graph": (UnsupportedError, "residuals 'equation', 'boundary' have no graph",
                 lambda e, b: {"equation": e.detach(), "boundary": b.detach()}),
    "one without": (UnsupportedError, "residuals 'equation' have no graph .* create_graph=True",
                    lambda e, b: {"equation": e.detach(), "boundary": b}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_residuals_are_refused_by_name_and_nothing_is_lost(case):
    kind, message, change = BAD[case]
    model, x = problem()
    likelihood = kf.Residuals({"equation": 1.0, "boundary": 1.0})
    with pytest.raises(kind, match=message):
        kf.estimate(model, x, likelihood, forward=lambda m, b: (change(*terms(m, b).values()), None))
    optimizer = kf.NaturalGradient(model, likelihood, fit="gram")
    optimizer.step(lambda: terms(model, x))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(kind, match=message):
        optimizer.step(lambda: change(*terms(model, x).values()))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert float(optimizer.step(lambda: terms(model, x))) > 0


def test_settings_that_make_no_sense():
    for options in ({}, {"weights": {}}, {"weights": {"a": 0.0}}, {"noise": {"a": float("nan")}},
                    {"weights": {"a": "x"}}, {"weights": {"a": 1.0}, "noise": {"a": 1.0}}):  # fmt: skip
        with pytest.raises(ValueError, match="Residuals"):
            kf.Residuals(**options)
    with pytest.raises(DataError, match="forward=lambda"):
        model, x = problem()
        kf.estimate(model, x, kf.Residuals({"a": 1.0}))
