"""Sides that are kept as diagonals: the best of their kind, against dense matrices in float64."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.fits.rearrangement import Diagonals, diagonals
from kronfisher.operators import Kronecker, KroneckerSum
from tests.fits.pieces import samples_of
from tests.helpers.networks import Written
from tests.helpers.truth import exact_fisher

V, D = 7, 3


def lookup(x):
    return Written(lambda m, x: m.e(x).sin().sum(1), e=nn.Embedding(V, D))


def bag(x):
    return Written(lambda m, x: m.e(x).sin(), e=nn.EmbeddingBag(V, D, mode="sum"))


def shared(x):
    return Written(lambda m, x: m.l(x).sin().sum(1), l=nn.Linear(V, D))


def single(x):
    return Written(lambda m, x: m.l(x[:, 0]).sin(), l=nn.Linear(V, D, bias=False))


def tokens(n):
    return torch.randint(V, (n, 4), generator=torch.Generator().manual_seed(n))


def numbers(n):
    return torch.randn(n, 4, V, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


# model, data, max_dim, which of A and B are diagonal
CASES = {
    "lookup": (lookup, tokens, 10, (True, False)),
    "lookup, both": (lookup, tokens, 2, (True, True)),
    "bag": (bag, tokens, 5, (True, False)),
    "shared, inputs": (shared, numbers, 5, (True, False)),
    "shared, both": (shared, numbers, 2, (True, True)),
    "single, inputs": (single, numbers, 5, (True, False)),
    "single, both": (single, numbers, 2, (True, True)),
}
cases = pytest.mark.parametrize("case", CASES)


class Truth:
    """The dense block, rearranged to ``[O², I²]`` and restricted to the factors that there are."""

    def __init__(self, case: str) -> None:
        build, data, self.max_dim, self.diagonal = CASES[case]
        torch.manual_seed(0)
        self.data = [data(5), data(3)]
        self.model = build(None).double()
        (weight, *bias) = self.model.parameters()
        F = exact_fisher(self.model, self.data)
        if bias:  # from the parameters' order to that of a matrix with one more column
            order = torch.cat(
                [torch.arange(weight.numel()).view(D, V), torch.arange(weight.numel(), len(F))[:, None]], 1
            )
            F = F[order.flatten()][:, order.flatten()]
        elif weight.shape == (V, D):
            order = torch.arange(weight.numel()).view(V, D).T.flatten()
            F = F[order][:, order]
        self.F = F
        self.O, self.I = D, len(F) // D
        self.R = F.view(self.O, self.I, self.O, self.I).permute(0, 2, 1, 3).reshape(self.O**2, self.I**2)
        keep = [torch.eye(n).bool().flatten() for n in (self.I, self.O)]
        if self.diagonal[0]:
            self.R = self.R[:, keep[0]]
        if self.diagonal[1]:
            self.R = self.R[keep[1]]
        self.sigma = torch.linalg.svdvals(self.R)

    def estimate(self, fit):
        return kf.estimate(self.model, self.data, kf.Gaussian(), fit=fit, labels="exact")

    def error(self, operator) -> float:
        return float((operator.to_dense() - self.F).norm() / self.F.norm())

    def best(self, rank: int) -> float:
        """The relative error of the best sum with such factors."""
        return float((self.F.norm() ** 2 - self.sigma[:rank].square().sum()).clamp_min(0).sqrt() / self.F.norm())

    def halves(self, A, B):
        """``Σ G A Gᵀ`` and ``Σ Gᵀ B G``, restricted, for dense A and B."""
        F = self.F.view(self.O, self.I, self.O, self.I)
        left, right = torch.einsum("oipj,ij->op", F, A), torch.einsum("oipj,op->ij", F, B)
        return tuple(
            torch.diag(factor.diagonal()) if diagonal else factor
            for factor, diagonal in zip((left, right), reversed(self.diagonal), strict=True)
        )


def dense(factor):
    return torch.diag(factor[0]) if factor.dim() == 2 else factor[0]


def only(fisher):
    ((_, operator),) = fisher.entries
    return operator


@cases
def test_the_shapes_of_factors(case):
    truth = Truth(case)
    for fit in (kf.TKFAC, kf.KL, kf.KFOC, kf.KFAC, kf.KroneckerSum, kf.KFACCorrected):
        operator = only(truth.estimate(fit(max_dim=truth.max_dim)))
        factors = (operator.A[0], operator.B[0]) if isinstance(operator, KroneckerSum) else (operator.A, operator.B)
        assert tuple(factor.dim() == 2 for factor in factors) == truth.diagonal
        assert operator.dtype == torch.float64


@cases
def test_tkfac_keeps_the_trace(case):
    truth = Truth(case)
    found = only(truth.estimate(kf.TKFAC(max_dim=truth.max_dim)))
    left, right = truth.halves(torch.eye(truth.I).double(), torch.eye(truth.O).double())
    torch.testing.assert_close(found.to_dense(), torch.kron(left, right) / truth.F.trace())
    torch.testing.assert_close(found.trace(), truth.F.trace())


@cases
@pytest.mark.parametrize("damping", [0.05, 0.5])
def test_kl_is_the_minimum(case, damping):
    """The flip-flop in dense matrices comes to the same product; no neighbour of the same form is nearer."""
    truth = Truth(case)
    fit = kf.KL(damping=damping, max_dim=truth.max_dim, iterations=200, tolerance=1e-10)
    found = only(truth.estimate(fit))
    A = torch.eye(truth.I).double()
    B = A
    for _ in range(300):
        left, _ = truth.halves(A.inverse(), torch.eye(truth.O).double())
        B = (left + damping * A.inverse().trace() * torch.eye(truth.O)) / truth.I
        _, right = truth.halves(A, B.inverse())
        A = (right + damping * B.inverse().trace() * torch.eye(truth.I)) / truth.O
    torch.testing.assert_close(found.to_dense(), torch.kron(B, A), rtol=1e-6, atol=1e-9)
    target = truth.F + damping * torch.eye(len(truth.F))

    def divergence(A, B):
        X = torch.kron(B, A)
        return (torch.linalg.solve(X, target).trace() + X.logdet()).item()

    least = divergence(dense(found.A), dense(found.B))
    for seed in range(5):
        noise = torch.randn(truth.I, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert divergence(dense(found.A) * torch.diag(1 + 0.05 * noise.cos()), dense(found.B)) > least


@cases
@pytest.mark.parametrize("method", ["lanczos", "deflation"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_sums_are_the_best_with_such_factors(case, method, rank):
    truth = Truth(case)
    fit = kf.KroneckerSum(rank, method, tolerance=1e-9, iterations=1000, max_dim=truth.max_dim)
    fisher = truth.estimate(fit)
    found = truth.error(only(fisher))
    assert found == pytest.approx(truth.best(rank), rel=1e-6, abs=1e-7)
    ((_, entry),) = fisher.info.blocks.items()
    assert entry.error == pytest.approx(found, rel=1e-5, abs=1e-6)
    assert fisher.error(truth.data).relative == pytest.approx(found, rel=1e-5, abs=1e-6)


@cases
def test_positive_terms_are_between_one_product_and_the_best_sum(case):
    truth = Truth(case)
    found = only(truth.estimate(kf.KroneckerSum(2, "nonnegative", max_dim=truth.max_dim)))
    assert isinstance(found, KroneckerSum)
    for term in found.terms:
        assert all(torch.linalg.eigvalsh(dense(factor)).min() > -1e-12 for factor in (term.A, term.B))
    assert truth.best(2) - 1e-9 <= truth.error(found) < truth.best(1) - 0.2 * (truth.best(1) - truth.best(2))


@cases
def test_the_correction_of_kfac_is_the_best_for_what_it_misses(case):
    truth = Truth(case)
    kfac = only(truth.estimate(kf.KFAC(max_dim=truth.max_dim)))
    assert isinstance(kfac, Kronecker)
    found = only(truth.estimate(kf.KFACCorrected(max_dim=truth.max_dim, tolerance=1e-9, iterations=1000)))
    rest = truth.F - kfac.to_dense()
    inside = [factor[0].flatten() if factor.dim() == 3 else factor[0] for factor in (kfac.B, kfac.A)]
    sigma = torch.linalg.svdvals(truth.R - torch.outer(*inside))
    best = float((rest.norm() ** 2 - sigma[0] ** 2).sqrt() / truth.F.norm())
    assert truth.error(found) == pytest.approx(best, rel=1e-6)
    torch.testing.assert_close(found.terms[0].to_dense(), kfac.to_dense())


@cases
@pytest.mark.parametrize("aggregation", ["exact", "memory"])
def test_one_product_is_the_best_with_such_factors(case, aggregation):
    truth = Truth(case)
    fit = kf.KFOC(aggregation, tolerance=1e-10, iterations=500, max_dim=truth.max_dim)
    assert truth.error(only(truth.estimate(fit))) == pytest.approx(truth.best(1), rel=1e-6)


@cases
@pytest.mark.parametrize("basis", [kf.TKFAC, kf.KL, kf.KFOC, kf.KFAC])
def test_eigenvalues_in_such_a_basis(case, basis):
    truth = Truth(case)
    found = only(truth.estimate(kf.EKFAC(basis(max_dim=truth.max_dim))))
    U = torch.kron(*(dense(factor).contiguous() for factor in (found.basis.B, found.basis.A)))
    torch.testing.assert_close(found.to_dense(), U @ torch.diag((U.T @ truth.F @ U).diagonal()) @ U.T)


@pytest.mark.parametrize("method", ["lanczos", "deflation", "nonnegative"])
def test_many_samples_are_merged(method):
    """More than 512 samples: pieces of sums, recompressed; nothing is said of an error that is not known."""
    torch.manual_seed(0)
    model, x = lookup(None).double(), torch.randint(V, (500, 4))
    errors = {}
    for fit in (kf.KroneckerSum(2, method), kf.KFOC("exact", tolerance=1e-8)):
        fisher = kf.estimate(model, x, kf.Gaussian(), fit=fit, labels="exact")
        errors[type(fit)] = fisher.error(x).relative
        assert next(iter(fisher.info.blocks.values())).error is None
    assert errors[kf.KroneckerSum] < errors[kf.KFOC] + 1e-9


@pytest.mark.parametrize("fit", ["kronecker-sum", "kfac-corrected", kf.KroneckerSum(2, "nonnegative"), "tkfac", "kl"])
def test_what_is_made_of_them(fit):
    """Products, traces, diagonals, norms, solutions and moving averages, against the matrix itself."""
    torch.manual_seed(0)
    model, x = Written(lambda m, x: m.e(x).sin().sum(1), e=nn.Embedding(V, D)).double(), tokens(20)
    X = only(kf.estimate(model, x, kf.Gaussian(), fit=fit, labels="exact"))
    dense, v = X.to_dense(), torch.randn(X.dim, dtype=torch.float64)
    torch.testing.assert_close(X @ v, dense @ v)
    torch.testing.assert_close(X.trace(), dense.trace())
    torch.testing.assert_close(X.diagonal(), dense.diagonal())
    torch.testing.assert_close(X.frobenius_norm(), dense.norm())
    damping = 2 * float(X.frobenius_norm())
    damped = dense + damping * torch.eye(len(dense))
    torch.testing.assert_close((X + damping).solve(v), torch.linalg.solve(damped, v), rtol=1e-5, atol=1e-7)
    assert float((X + kf.FactoredTikhonov(damping)).solve(v).norm()) < float(v.norm()) / damping * 2


def test_sizes_that_make_no_sense():
    for fit in (kf.TKFAC, kf.KL, kf.KFOC, kf.KFAC, kf.KroneckerSum, kf.KFACCorrected):
        with pytest.raises(ValueError, match=rf"{fit.__name__}\(max_dim=-1\)"):
            fit(max_dim=-1)


def test_the_whole_spectrum_needs_matrices():
    for model, x in (
        (lookup(None), tokens(5)),
        (lookup(None), tokens(5)[:, :1]),
        (shared(None).float(), numbers(5).float()),
    ):
        with pytest.raises(kf.UnsupportedError, match=r"(e|l)\.weight: method='gram' is for .* Use method='lanczos'"):
            kf.estimate(model, x, kf.Gaussian(), fit=kf.KroneckerSum(method="gram"))


def long_samples(T, I, O, H=1):
    """Some whose output gradients are large for a few of many outputs."""
    generator = torch.Generator().manual_seed(T)
    a, g = (torch.randn(H, 6, T, D, generator=generator, dtype=torch.float64) for D in (I, O))
    return samples_of(a, g / torch.arange(1, O + 1))


@pytest.mark.parametrize("H", [1, 2])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("T", [1, 4, 40])
def test_half_steps_and_the_leading_pair_by_every_route(T, flip, H, monkeypatch):
    """Where one factor is a long diagonal: [T, T] products, gradients written out, and a start of large rows."""
    samples = long_samples(T, 5, 60, H)
    if flip:
        samples = samples_of(samples.gradients, samples.activations.dense())
    _, O, I = samples.shape
    shapes = ((H, I), (H, O, O)) if flip else ((H, I, I), (H, O))
    source = Diagonals([samples], shapes)
    assert source._shorter(samples) == (T == 40)
    G = samples.gradients.mT @ samples.activations.dense()
    root = torch.randn(H, 5, 5, dtype=torch.float64)
    square, line = root @ root.mT, torch.rand(H, 60, dtype=torch.float64)
    A, B = (line, square) if flip else (square, line)
    full_A, full_B = (torch.diag_embed(x) if x.dim() == 2 else x for x in (A, B))
    left = torch.einsum("hnoi,hij,hnpj->hop", G, full_A, G)
    right = torch.einsum("hnoi,hop,hnpj->hij", G, full_B, G)
    left, right = (left, right.diagonal(dim1=1, dim2=2)) if flip else (left.diagonal(dim1=1, dim2=2), right)
    torch.testing.assert_close(source.outputs(A), left)
    torch.testing.assert_close(source.inputs(B), right)
    whole = source.leading(None, 1e-13, 1000)
    monkeypatch.setattr(diagonals, "_KEPT", 4)
    short = source.leading(None, 1e-13, 1000)
    for name in ("A", "B", "sigma"):
        torch.testing.assert_close(getattr(short, name), getattr(whole, name), rtol=1e-9, atol=1e-9)


def test_a_vocabulary_takes_few_half_steps_over_all_of_it():
    """Seen: fifteen to fifty double steps, each of more than a forward pass, for tied vocabularies."""
    samples = long_samples(16, 8, 20_000)
    source = Diagonals([samples], ((1, 8, 8), (1, 20_000)))
    assert int(source.leading().steps) <= 2 < int(Diagonals.mro()[1].leading(source).steps)
