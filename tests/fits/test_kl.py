"""The KL fit: its minimum, its scale and what it says; dense checks in float64."""

import warnings

import pytest
import torch

import kronfisher as kf
from kronfisher.errors import NumericalWarning, SingularError
from tests.helpers.networks import grouped_sequences, perceptron

EXACT = {"iterations": 300, "tolerance": 1e-12}


def small(groups=1):
    return grouped_sequences(groups, seed=4) if groups > 1 else perceptron(3, 4, 2, seed=4, shaken=True)


def divergence(F, X):
    """``tr(F X⁻¹) + log|X|``, the part that depends on X."""
    return torch.linalg.solve(X, F).trace() + torch.logdet(X)


def fit(model, x, damping, **options):
    return kf.estimate(model, x, kf.Gaussian(), fit=kf.KL(damping, **{**EXACT, **options}), labels="exact")


@pytest.mark.parametrize("damping", [1e-3, 0.1])
@pytest.mark.parametrize("groups", [1, 2])
def test_it_is_the_minimum(damping, groups):
    model = small(groups)
    x = torch.randn(12, *((3,) if groups == 1 else (4, 3))).double()
    fisher = fit(model, x, damping)
    truth = kf.estimate(model, x, kf.Gaussian(), fit="full", labels="exact")
    for name, X in fisher.blocks.items():
        assert "converged" in fisher.info.blocks[name].notes and "NOT" not in fisher.info.blocks[name].notes
        F = truth[name].to_dense() + damping * torch.eye(X.dim).double()

        def value(A, B, F=F):
            return divergence(F, torch.block_diag(*(torch.kron(b, a) for b, a in zip(B, A, strict=True))))

        A, B = X.A.clone().requires_grad_(), X.B.clone().requires_grad_()
        here = value(A, B)
        for factor, slope in zip((A, B), torch.autograd.grad(here, (A, B)), strict=True):
            assert slope.norm() * factor.norm() < 1e-8 * here.abs().clamp_min(1), name  # stationary
        for seed in range(10):
            noise = torch.Generator().manual_seed(seed)
            moved = []
            for factor in (X.A, X.B):
                step = torch.randn(factor.shape, generator=noise, dtype=factor.dtype) * 0.03
                turn = torch.eye(factor.shape[-1]).double() + step
                moved.append(turn @ factor @ turn.mT)
            assert value(*moved) > here
        if groups == 1:
            kfac = kf.estimate(model, x, kf.Gaussian(), fit="kfac", labels="exact") + kf.FactoredTikhonov(damping)
            assert here < divergence(F, kfac[name].to_dense())
        sizes = [factor.diagonal(dim1=1, dim2=2).mean(1) for factor in (X.A, X.B)]
        torch.testing.assert_close(*sizes)


def test_every_step_goes_down_and_the_number_of_passes_is_what_it_says():
    model, x, seen = small(), torch.randn(12, 3).double(), []

    class Counted:
        def __init__(self, batches):
            self.batches = batches

        def __len__(self):
            return len(self.batches)

        def __iter__(self):
            seen.append(1)
            return iter(self.batches)

    truth = kf.estimate(model, x, kf.Gaussian(), fit="full", labels="exact")["0.weight"].to_dense()
    values = []
    for iterations in (1, 2, 3, 10):
        seen.clear()
        fisher = fit(model, Counted([(x[:5], None), (x[5:], None)]), 1e-3, iterations=iterations)
        assert len(seen) == 2 * iterations
        notes = fisher.report().rows[0].notes
        assert f"NOT converged after {iterations} double step" in notes and "F + 0.001" in notes
        values.append(divergence(truth + 1e-3 * torch.eye(16).double(), fisher["0.weight"].to_dense()))
    assert values == sorted(values, reverse=True) and values[0] > values[-1] + 1e-6
    assert "NOT converged after 10" in str(fisher.report())
    seen.clear()
    fit(model, Counted([(x, None)]), 1e-3, tolerance=0.5)
    assert len(seen) < 10  # tolerance, not the limit, ends it


def test_lambda_is_of_the_mean_over_data():
    model, x = small(), torch.randn(12, 3).double()
    mean = fit(model, x, 0.01)
    twice = fit(model, torch.cat([x, x]), 0.01)
    torch.testing.assert_close(mean.to_dense(), twice.to_dense())
    total = kf.estimate(model, x, kf.Gaussian(), fit=kf.KL(0.01, **EXACT), labels="exact", reduction="sum")
    torch.testing.assert_close(total.to_dense(), 12 * mean.to_dense())
    zero = kf.estimate(model, 0 * x, kf.Gaussian(), fit={"2.*": kf.KL(0.01), "*": "kfac"}, labels="exact")
    assert zero["2.weight"].to_dense().diagonal().amin() >= 0.01 - 1e-12


def test_without_damping_it_exists_with_enough_data_only():
    model = small()
    with pytest.raises(SingularError, match=r"0\.weight: KL\(damping=0\) has no minimum"):
        fit(model, torch.randn(1, 3).double(), 0.0)
    dead = torch.randn(40, 3).double()
    dead[:, 1] = 0
    with pytest.raises(SingularError, match="dead inputs"):
        fit(model, dead, 0.0)
    softmax = kf.KL(0.0, **EXACT)
    with pytest.raises(SingularError, match="softmax"):
        kf.estimate(model, torch.randn(40, 3).double(), kf.Categorical(), fit=softmax, labels="exact")
    assert fit(model, torch.randn(40, 3).double(), 0.0).logdet().isfinite()


def test_single_precision_and_nonsense():
    model, x = small(), torch.randn(30, 3).double()
    double = kf.estimate(model, x, kf.Gaussian(), fit=kf.KL(1e-2, 50, 1e-5), labels="exact")
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericalWarning)
        single = kf.estimate(model.float(), x.float(), kf.Gaussian(), fit=kf.KL(1e-2, 50, 1e-5), labels="exact")
        (single + 0.1).solve(torch.ones(single.dim))
    torch.testing.assert_close(single.to_dense().double(), double.to_dense(), rtol=1e-3, atol=1e-4)
    for wrong in ({"damping": -1.0}, {"damping": float("nan")}, {"iterations": 0}, {"tolerance": -1.0}):
        with pytest.raises(ValueError, match="KL"):
            kf.KL(**wrong)


def test_its_eigenbasis_serves_ekfac():
    model, x = small(), torch.randn(12, 3).double()
    product = fit(model, x, 1e-2)["0.weight"]
    fisher = kf.estimate(model, x, kf.Gaussian(), fit=kf.EKFAC(kf.KL(1e-2, **EXACT)), labels="exact")
    turned = fisher["0.weight"].basis.A.mT @ product.A @ fisher["0.weight"].basis.A
    assert (turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))).norm() < 1e-10 * product.A.norm()
    data = (x, None)
    assert (
        fisher.error(data).relative
        < kf.estimate(model, x, kf.Gaussian(), fit="kfac", labels="exact").error(data).relative
    )
