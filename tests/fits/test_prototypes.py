"""Prototypes against the formula written out, and what they promise: trace, exactness, batches, determinants."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.operators import Eigen, Prototyped
from tests.helpers.networks import perceptron
from tests.helpers.optional import require


def estimate(model, data, fit, likelihood=None, **options):
    return kf.estimate(model, data, likelihood or kf.Gaussian(0.5), fit=fit, labels="exact", **options)


def data(n, inputs=5):
    return torch.randn(n, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def gradients(model, x, name):
    """Scaled rows of the exact Fisher of a Gaussian with variance 1/2, one for each example and output."""
    weights = [p for n, p in model.named_parameters() if n.startswith(name)]
    rows = []
    for example in x:
        for output in model(example):
            W, b = torch.autograd.grad(output / 0.5**0.5, weights, retain_graph=True)
            rows.append(torch.cat([W, b[:, None]], 1))
    return torch.stack(rows)


@pytest.mark.parametrize(("max_dim", "diagonal"), [(10240, ()), (6, ("2.A",)), (0, ("0.A", "0.B", "2.A", "2.B"))])
def test_is_the_sum_that_its_docstring_says(max_dim, diagonal):
    model, x = perceptron(5, 6, 3, seed=2), data(30)
    fisher = estimate(model, x, kf.Prototypes(ratio=1.0, max_dim=max_dim))
    for name in ("0", "2"):
        X = fisher[f"{name}.weight"]
        assert isinstance(X, Prototyped)
        basis, G = X.rest.basis, gradients(model, x, name)
        assert [f"{name}.{side}" in diagonal for side in "AB"] == [factor.dim() == 2 for factor in (basis.A, basis.B)]
        U_A, U_B = (torch.diag_embed(factor) if factor.dim() == 2 else factor for factor in (basis.A, basis.B))
        turned = U_B[0].mT @ G @ U_A[0]
        Z = X.B[0][:, :, None] * X.A[0][:, None]
        torch.testing.assert_close(Z.flatten(1).norm(dim=1), torch.ones(len(Z)).double())
        along = torch.einsum("koi,moi->km", turned, Z)
        nearest = along.abs().argmax(1)
        own = along.gather(1, nearest[:, None])
        weights = torch.zeros(len(Z)).double().index_add_(0, nearest, own[:, 0].square()) / 30
        rest = (turned - own[:, :, None] * Z[nearest]).square().sum(0).flatten() / 30
        torch.testing.assert_close(X.weights[0], weights)
        torch.testing.assert_close(X.rest.values, rest)
        assert len(Z) < len(G) and bool((weights > 0).any()) and bool((rest > 0).any())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_the_trace_and_is_semidefinite(dtype, reduction):
    model, x = perceptron(5, 6, 3, seed=2).to(dtype), data(40).to(dtype)
    fisher, truth = (estimate(model, x, fit, reduction=reduction) for fit in ("prototypes", "full"))
    assert fisher.dtype == dtype
    torch.testing.assert_close(fisher.trace(), truth.trace(), rtol=10 * torch.finfo(dtype).eps, atol=0)
    assert float(torch.linalg.eigvalsh(fisher.to_dense().double())[0]) > -1e-6 * float(fisher.trace())


def test_exact_where_there_are_no_more_samples_than_prototypes():
    model, x = perceptron(5, 6, 3, seed=2), data(4)
    fisher = estimate(model, x.repeat(3, 1), kf.Prototypes(ratio=10))  # copies of data bring no new gradient
    for name in ("0.weight", "2.weight"):
        torch.testing.assert_close(
            fisher[name].to_dense(), estimate(model, x, "full")[name].to_dense(), rtol=1e-9, atol=1e-11
        )


def test_exact_where_a_factor_has_one_row_whatever_is_kept():
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 1)).double(),
        torch.randn(50, 2, 4),
    )
    fisher, truth = (estimate(model, x.double(), fit) for fit in (kf.Prototypes(samples=5), "full"))
    assert isinstance(fisher["3.weight"], Eigen)
    torch.testing.assert_close(fisher["3.weight"].to_dense(), truth["3.weight"].to_dense(), rtol=1e-9, atol=1e-11)


def test_what_is_kept_does_not_depend_on_batches():
    model, x = perceptron(5, 6, 3, seed=2), data(101)
    whole = estimate(model, x, kf.Prototypes(samples=40), kf.Categorical())
    notes = whole.info.blocks["0.weight"].notes
    assert int(notes.split(" samples")[0].split()[-1]) <= 40 < 202
    for size in (7, 50):
        parts = estimate(model, list(x.split(size)), kf.Prototypes(samples=40), kf.Categorical())
        assert parts.info.blocks["0.weight"].notes == notes
        torch.testing.assert_close(parts.to_dense(), whole.to_dense(), rtol=1e-6, atol=1e-9)


def test_the_determinant_is_nearer_to_the_truth_than_that_of_ekfac_at_any_size(monkeypatch):
    model, x = perceptron(8, 12, 3, seed=2), data(25, 8)
    truth = estimate(model, x, "full").reduced("sum")["0.weight"]
    found = {fit: estimate(model, x, fit).reduced("sum")["0.weight"] for fit in ("kfac", "ekfac", "prototypes")}
    over = {fit: float((X + 0.1).logdet() - (truth + 0.1).logdet()) for fit, X in found.items()}
    assert 0 < over["prototypes"] < 0.75 * min(over["kfac"], over["ekfac"])
    monkeypatch.setattr("kronfisher.operators.operator.DENSE_LIMIT", 10)  # none of it forms the matrix
    X = found["prototypes"] + 0.1
    v = torch.randn(X.dim, 2).double()
    torch.testing.assert_close(X @ X.solve(v), v)
    torch.testing.assert_close(X.inverse().trace(), X.inverse().diagonal().sum())
    assert X.sample(3).shape == (3, X.dim) and float(X.logdet()) == -float(X.inverse().logdet())
    with pytest.raises(kf.UnsupportedError, match="spectrum"):
        X.eigenvalues()


def test_directions_without_curvature_are_counted(monkeypatch):
    model, x = perceptron(5, 6, 3, seed=2), data(4)
    X = estimate(model, x, kf.Prototypes(ratio=10))["0.weight"]
    assert X.nullity() == 36 - 12
    rich = estimate(model, data(200), "prototypes")["0.weight"]
    assert rich.nullity() == 0


def test_evidence_and_its_derivatives_without_a_dense_block(monkeypatch):
    model, x = perceptron(5, 6, 3, seed=2), data(30)
    y = model(x).detach() + 0.3 * torch.randn(30, 3).double()
    fisher = estimate(model, [(x, y)], "prototypes")
    posterior = kf.Laplace(model, fisher, 2.0)
    prior, noise = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.0, 0.4))
    value = posterior.log_marginal_likelihood(prior, noise)
    value.backward()

    def dense(p, s):
        outputs, residual = y.numel(), (model(x).detach() - y).square().sum()
        total = -0.5 * (residual / s + outputs * (2 * torch.pi * s).log())
        matrix = fisher.to_dense() * 30 * 0.5 / s + p * torch.eye(fisher.dim).double()
        flat = torch.cat([w.detach().flatten() for w in model.parameters()])
        return total - 0.5 * (p * flat.square().sum() + torch.logdet(matrix) - fisher.dim * p.log())

    own = [v.detach().clone().requires_grad_() for v in (prior, noise)]
    truth = dense(*own)
    truth.backward()
    torch.testing.assert_close(value, truth)
    for found, expected in zip((prior, noise), own, strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
    monkeypatch.setattr("kronfisher.operators.operator.DENSE_LIMIT", 0)
    best = kf.Laplace(model, fisher).optimize_prior(noise=True)
    assert "directions without curvature" in repr(best)
    assert best.predict(x[:2]).variance.isfinite().all()


def test_saved_and_loaded(tmp_path):
    require("safetensors")
    model, x = perceptron(5, 6, 3, seed=2), data(30)
    fisher = estimate(model, x, "prototypes")
    fisher.save(tmp_path / "f.safetensors")
    again = kf.load(tmp_path / "f.safetensors", model)
    same(again, fisher)
    inverse = (fisher + 0.1).inverse()
    inverse.save(tmp_path / "i.safetensors")
    same(kf.load(tmp_path / "i.safetensors", model), inverse)


def same(again, fisher):
    """The same bits are stored; products of them differ in the last one, as loaded tensors lie otherwise in memory."""
    for name, operator in fisher.blocks.items():
        stored, loaded = operator.tensors(), again.blocks[name].tensors()
        assert stored.keys() == loaded.keys() and all(torch.equal(loaded[key], stored[key]) for key in stored)
    torch.testing.assert_close(again.to_dense(), fisher.to_dense(), rtol=1e-12, atol=1e-12)


def test_sequences_of_several_lengths():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    batches = [torch.randn(4, t, 3).double() for t in (2, 5, 3)]
    fisher, truth = (estimate(model, batches, fit) for fit in ("prototypes", "full"))
    torch.testing.assert_close(fisher.trace(), truth.trace())


@pytest.mark.parametrize("options", [{"ratio": 0.0}, {"samples": 0}, {"iterations": -1}])
def test_settings_that_make_no_sense(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        kf.Prototypes(**options)


def test_samples_without_gradients_give_zero():
    model = perceptron(5, 6, 3, seed=2)
    for p in model[2].parameters():
        p.data.zero_()
    fisher = estimate(model, data(30), "prototypes")
    assert float(fisher["0.weight"].trace()) == 0 and float(fisher["2.weight"].trace()) > 0
    assert torch.isfinite((fisher + 1.0).solve(torch.ones(fisher.dim).double())).all()


def test_training_refuses_them_with_the_reason():
    model = torch.nn.Linear(3, 2)
    optimizer = kf.NaturalGradient(model, kf.Gaussian(), fit=kf.Prototypes())
    with pytest.raises(kf.UnsupportedError, match=r"weight: Prototypes.*keeps samples before it sums any"):
        optimizer.step(lambda: model(torch.randn(5, 3)), torch.randn(5, 2))


def test_wide_sides_are_not_turned_and_take_little_memory():
    """Seen: 19.5 GiB planned for 50,000 outputs, and the process killed."""
    with pytest.raises(ValueError, match="max_dim=-1"):
        kf.Prototypes(max_dim=-1)
    torch.manual_seed(0)
    model, x = nn.Linear(3, 20_000), torch.randn(4, 3)
    fisher = kf.estimate(model, x, kf.Categorical(), fit="prototypes", memory_budget=2**28)
    assert fisher["weight"].structure == "3 prototypes + eigenvalue-corrected 4xdiag(20000)"
    truth = kf.estimate(model, x, kf.Categorical(), fit="diagonal")
    torch.testing.assert_close(fisher.trace(), truth.trace())
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    back = (fisher + 0.1) @ (fisher + 0.1).solve(v)
    torch.testing.assert_close(back["weight"], v["weight"], rtol=1e-4, atol=1e-4)
