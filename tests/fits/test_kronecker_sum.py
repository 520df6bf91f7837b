"""Fits of sums of products against the dense rearranged block, in float64."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.fits import kronecker_sum
from kronfisher.operators import Kronecker
from kronfisher.operators import KroneckerSum as Operator
from tests.fits.rearranged import estimate, rearranged
from tests.helpers.networks import with_inputs

TIGHT = {"tolerance": 1e-9, "iterations": 300}
METHODS = ["lanczos", "deflation", "gram"]


def written_out(operator):
    """``Σ vec(B_r) vec(A_r)ᵀ [H, O², I²]``."""
    A, B = (operator.A, operator.B) if isinstance(operator, Operator) else (operator.A[None], operator.B[None])
    return torch.einsum("rho,rhi->hoi", B.flatten(2), A.flatten(2))


def tails(R, rank):
    """The optimal error of every group, each with its own choice of terms."""
    return torch.linalg.svdvals(R)[:, rank:].norm(dim=1)


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("method", "shared"), [(m, s) for m in METHODS for s in (False, True) if (m, s) != ("gram", True)]
)
def test_the_error_is_the_tail_of_the_spectrum(rank, method, shared):
    model, x = with_inputs(shared)
    fisher = estimate(model, x, kf.KroneckerSum(rank, method, **TIGHT))
    for name, R in rearranged(model, x).items():
        operator = fisher[name]
        missed = (R - written_out(operator)).norm(dim=(1, 2))
        if len(R) == 1:
            torch.testing.assert_close(missed, tails(R, rank), rtol=1e-6, atol=1e-9 * R.norm().item())
        else:  # all groups share the number of antisymmetric terms
            kinds = operator.antisymmetric if rank > 1 else (False,)
            best = _tails_by_kind(R, kinds)
            torch.testing.assert_close(missed, best, rtol=1e-6, atol=1e-9 * R.norm().item())
        assert (missed >= tails(R, rank) * (1 - 1e-9) - 1e-12).all()
        assert isinstance(operator, Kronecker if rank == 1 else Operator)
        told = fisher.info.blocks[name].error
        if len(R) == 1:
            assert told == pytest.approx(float(missed / R.norm()), abs=1e-6)
    if shared and rank == 5:
        assert any(any(fisher[name].antisymmetric) for name in fisher.blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["lanczos", "deflation"])
@pytest.mark.parametrize("labels", ["exact", "sampled"])
@pytest.mark.parametrize("fit", [lambda **options: kf.KroneckerSum(3, **options), kf.KFACCorrected])
def test_in_the_span_of_the_samples_terms_are_those_of_whole_matrices(fit, labels, method, dtype, monkeypatch):
    model, x = with_inputs(shared=False)
    model, x = model.to(dtype), x.to(dtype)
    found = []
    for within in (True, False):
        monkeypatch.setattr("kronfisher.fits.term_search.spans", lambda *_, within=within: within)
        search = fit(method=method, tolerance=1e-6, iterations=300)
        found.append(estimate(model, x, search, labels, samples=1 if labels == "exact" else 2))
    for name in found[0].blocks:
        left, right = (fisher[name].to_dense() for fisher in found)
        scale = float(right.norm())
        torch.testing.assert_close(left, right, rtol=0, atol=scale * (1e-3 if dtype == torch.float32 else 1e-5))


def test_samples_that_are_nearly_all_zero_are_decomposed_in_their_span():
    """Of such Gram matrices LAPACK makes nothing now and then: units that are dead for most data."""
    for seed in (3, 11, 31, 53):
        generator = torch.Generator().manual_seed(seed)
        x = torch.zeros(256, 32, dtype=torch.float64)
        x[:8] = torch.randn(8, 32, generator=generator, dtype=torch.float64).relu()
        x = x[torch.randperm(256, generator=generator)]
        layer = nn.Linear(32, 3, bias=False).double()
        found = estimate(layer, x, kf.KroneckerSum(2, "gram"), "sampled")["weight"]
        truth = estimate(layer, x, "full", "sampled")["weight"].to_dense()
        R = truth.view(3, 32, 3, 32).permute(0, 2, 1, 3).reshape(9, 32 * 32)
        missed = (truth - found.to_dense()).norm()
        torch.testing.assert_close(missed, torch.linalg.svdvals(R)[2:].norm(), rtol=1e-6, atol=1e-9)


def _tails_by_kind(R, kinds):
    groups, outputs, inputs = len(R), round(R.shape[1] ** 0.5), round(R.shape[2] ** 0.5)
    M = R.view(groups, outputs, outputs, inputs, inputs)
    even = (M + M.transpose(1, 2)) / 2
    odd = (R - even.reshape(R.shape)).reshape(R.shape)
    parts = [torch.linalg.svdvals(even.reshape(R.shape)), torch.linalg.svdvals(odd)]
    return torch.stack(
        [part[:, n:].norm(dim=1) for part, n in zip(parts, (kinds.count(False), sum(kinds)), strict=True)]
    ).norm(dim=0)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("method", ["lanczos", "nonnegative"])
def test_pieces_come_close_to_the_optimum_in_one_pass(shared, method, monkeypatch):
    model, x = with_inputs(shared)
    options = TIGHT if method == "lanczos" else {}
    whole = estimate(model, x, kf.KroneckerSum(2, method, **options))
    monkeypatch.setattr(kronecker_sum, "PIECE", 16)
    loader = [(part, None) for part in x.split(3)]
    parts = estimate(model, loader, kf.KroneckerSum(2, method, **options))
    assert all("pieces" in parts.info.blocks[name].notes for name in parts.blocks)
    for name, R in rearranged(model, x).items():
        errors = [(R - written_out(fisher[name])).norm() / R.norm() for fisher in (whole, parts)]
        assert errors[1] < errors[0] + 0.03, name
    error = parts.error((x, None))
    for name in parts.blocks:
        if method == "nonnegative":
            assert parts.info.blocks[name].error is None
        elif len(parts[name].A[0]) == 1:
            assert parts.info.blocks[name].error == pytest.approx(error.blocks[name], abs=0.02)


@pytest.mark.parametrize("positions", [(), (3,)])
@pytest.mark.parametrize(("inputs", "outputs"), [(4, 1), (1, 5)])
def test_a_single_row_or_column_is_one_positive_product_over_any_pieces(inputs, outputs, positions, monkeypatch):
    monkeypatch.setattr(kronecker_sum, "PIECE", 16)
    torch.manual_seed(0)
    model = nn.Linear(inputs, outputs, bias=False).double()
    x = torch.randn(90, *positions, inputs).double()
    fisher = kf.estimate(
        model, [(part, None) for part in x.split(7)], kf.Bernoulli(), fit=kf.KroneckerSum(2, "nonnegative")
    )
    assert fisher.error(x).relative < 1e-7
    assert fisher.eigenvalues().min() >= 0


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_every_term_of_a_nonnegative_sum_is_positive(shared, rank):
    model, x = with_inputs(shared)
    fisher = estimate(model, x, kf.KroneckerSum(rank, "nonnegative", tolerance=1e-6))
    for name, R in rearranged(model, x).items():
        operator = fisher[name]
        A, B = (operator.A, operator.B) if rank > 1 else (operator.A[None], operator.B[None])
        for factor in (A, B):
            values = torch.linalg.eigvalsh(factor)
            assert (values[..., 0] >= -1e-12 * values[..., -1].clamp_min(1e-30)).all()
        missed = (R - written_out(operator)).norm(dim=(1, 2))
        best, one = tails(R, rank), tails(R, 1)
        assert (missed <= one * (1 + 1e-4)).all(), name
        assert (missed - best <= 0.35 * (one - best) + 1e-4 * R.norm(dim=(1, 2))).all() or shared, name
        assert operator.semidefinite
    damped = fisher + 1e-2
    v = torch.randn(fisher.dim).double()
    torch.testing.assert_close(damped.to_dense() @ damped.solve(v), v, rtol=1e-8, atol=1e-8)
    assert damped.logdet().isfinite() and damped.sample(2) and fisher.sample(2, inverse=False)
    assert (fisher + kf.FactoredTikhonov(0.1)).logdet().isfinite()


@pytest.mark.parametrize("shared", [False, True])
def test_the_correction_is_the_best_product_for_what_kfac_misses(shared):
    model, x = with_inputs(shared)
    kfac, corrected = (estimate(model, x, fit) for fit in ("kfac", kf.KFACCorrected(**TIGHT)))
    for name, R in rearranged(model, x).items():
        rest = R - written_out(kfac[name])
        missed = (R - written_out(corrected[name])).norm(dim=(1, 2))
        if len(R) == 1:
            torch.testing.assert_close(missed, tails(rest, 1), rtol=1e-6, atol=1e-9 * R.norm().item())
        assert (missed <= rest.norm(dim=(1, 2)) + 1e-12).all()
        torch.testing.assert_close(corrected[name].terms[0].to_dense(), kfac[name].to_dense())


@pytest.mark.parametrize("shared", [False, True])
def test_kpsvd_is_the_leading_pair(shared):
    model, x = with_inputs(shared)
    fisher = estimate(model, x, kf.KPSVD("exact", **TIGHT))  # several pieces where columns are many
    for name, R in rearranged(model, x).items():
        missed = (R - written_out(fisher[name])).norm(dim=(1, 2))
        torch.testing.assert_close(missed, tails(R, 1), rtol=1e-6, atol=1e-9 * R.norm().item())
        assert "steps" in fisher.info.blocks[name].notes


@pytest.mark.parametrize("method", ["lanczos", "deflation", "nonnegative"])
def test_what_vanishes_or_has_few_terms(method):
    model, x = with_inputs(False)
    fit = kf.KroneckerSum(4, method)
    zero = estimate(model, 0 * x, fit)
    for row in zero.blocks.values():
        assert row.to_dense().isfinite().all()
    with torch.no_grad():
        model[2].weight.zero_()
    fisher = estimate(model, x, fit)
    assert float(fisher["0.weight"].frobenius_norm()) == 0
    torch.testing.assert_close((fisher["0.weight"] + 0.5).solve(torch.ones(25).double()), 2 * torch.ones(25).double())
    thin = nn.Linear(4, 1).double()  # O = 1: one product is exact, the other three vanish
    fisher = estimate(thin, x, fit)
    torch.testing.assert_close(fisher.to_dense(), estimate(thin, x, "full").to_dense(), rtol=1e-3, atol=1e-3)
    ((fisher + 0.1).sample(2)), (fisher + 0.1).logdet()


def test_states_combine():
    model, x = with_inputs(True)
    whole = estimate(model, x, kf.KroneckerSum(2))
    from kronfisher.capture.isolation import isolate
    from kronfisher.estimation.accumulator import Accumulator
    from kronfisher.estimation.recipe import Recipe

    states = []
    for data in (x[:5], x[5:]):
        run = Accumulator(Recipe(model, kf.Gaussian(), labels="exact"), kf.KroneckerSum(2, memory=20))
        with isolate(model, 0):
            run.add((data, None), "batch 0")
        states.append(run.groups)
    for one, other in zip(*states, strict=True):
        joined = one.fit.finish(one.fit.combine(one.state, other.state))
        dense = whole.blocks[one.state.name].to_dense()
        assert (joined.to_dense() - dense).norm() < 1e-3 * dense.norm()


@pytest.mark.parametrize("method", METHODS)
def test_single_precision(method):
    model, x = with_inputs(False)
    double = estimate(model, x, kf.KroneckerSum(2, method))
    single = estimate(model.float(), x.float(), kf.KroneckerSum(2, method))
    assert single.dtype == torch.float32
    torch.testing.assert_close(
        single.to_dense().double(), double.to_dense(), rtol=1e-2, atol=1e-3 * float(double.to_dense().abs().max())
    )


def test_positive_terms_in_single_precision_come_as_close():
    """They are one of several local optima, which rounding chooses among: their errors are compared, not they."""
    model, x = with_inputs(False)
    truth = estimate(model, x, "full").to_dense()
    double = estimate(model, x, kf.KroneckerSum(2, "nonnegative"))
    single = estimate(model.float(), x.float(), kf.KroneckerSum(2, "nonnegative"))
    assert single.dtype == torch.float32
    missed, best = ((fisher.to_dense().double() - truth).norm() for fisher in (single, double))
    assert missed < 1.05 * best < 0.06 * truth.norm()


def test_nonsense_is_refused():
    for wrong in ({"rank": 0}, {"method": "svd"}, {"iterations": 0}, {"tolerance": -1.0}, {"rank": 3, "memory": 2}):
        with pytest.raises(ValueError, match=r"KroneckerSum|method"):
            kf.KroneckerSum(**wrong)
    with pytest.raises(ValueError, match="two terms"):
        kf.KFACCorrected(rank=3)
    model, x = with_inputs(True)
    with pytest.raises(kf.UnsupportedError, match="one position"):
        estimate(model, x, kf.KroneckerSum(2, "gram"))


@pytest.mark.parametrize("method", ["lanczos", "deflation"])
def test_what_does_not_converge_says_so(method):
    model, x = with_inputs(True)
    for iterations, told in ((2, True), (500, False)):
        fisher = estimate(model, x, kf.KroneckerSum(2, method, tolerance=1e-8, iterations=iterations))
        notes = [block.notes for block in fisher.info.blocks.values()]
        assert any("NOT converged" in text for text in notes) == told, notes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["lanczos", "deflation", "nonnegative"])
def test_what_is_found_whole_is_converged(method, dtype):
    torch.manual_seed(0)
    x = 1e-3 * torch.randn(25, 2, 9, dtype=dtype)
    thin = nn.Sequential(nn.Conv1d(2, 1, 3), nn.Flatten()).to(dtype)  # O = 1: one product is everything
    for rank in (1, 4):
        fisher = estimate(thin, x, kf.KroneckerSum(rank, method))
        (block,) = fisher.info.blocks.values()
        assert fisher.error((x, None)).relative < 1e-5 and "NOT" not in block.notes, block.notes
