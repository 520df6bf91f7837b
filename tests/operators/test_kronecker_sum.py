"""Sums of Kronecker products: exact solutions, iterated ones, and spectra that are not positive."""

import warnings

import pytest
import torch

from kronfisher.errors import (
    DataError,
    IndefiniteError,
    NumericalError,
    NumericalWarning,
    SingularError,
    UnsupportedError,
)
from kronfisher.fisher import Fisher, Info, load
from kronfisher.fisher.blocks import Block, Window
from kronfisher.fisher.damping import FactoredTikhonov
from kronfisher.operators import Dense, Diagonal, Kronecker, KroneckerSum, Operator, Pair
from kronfisher.operators import cg as conjugate
from tests.helpers.close import close
from tests.helpers.optional import require


def indefinite(rank=2, groups=1, antisymmetric=False, dtype=torch.float64, **settings):
    """A positive definite first term, and others as large as it."""
    sides = []
    for size, seed in ((3, 1), (2, 2)):
        g = torch.randn(rank, groups, size, size + 1, generator=torch.Generator().manual_seed(seed)).to(dtype)
        first, rest = g @ g.mT + 0.3 * torch.eye(size, dtype=dtype), g[..., :size] + g[..., :size].mT
        if antisymmetric:
            rest = 2 * (g[..., :size] - g[..., :size].mT)
        sides.append(torch.cat([first[:1], 1.5 * rest[1:]]))
    X = KroneckerSum(*sides, name="fc.weight", **settings)
    assert torch.linalg.eigvalsh(X.to_dense())[0] < -0.1
    return X


STOPS = {
    "solve": lambda X: X.solve(torch.ones(X.dim, dtype=X.dtype)),
    "inverse": lambda X: X.inverse(),
    "logdet": lambda X: X.logdet(),
    "sample": lambda X: X.sample(2),
    "sample of N(0, X)": lambda X: X.sample(2, inverse=False),
}


@pytest.mark.parametrize("operation", STOPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rank", "antisymmetric", "shift"), [(2, False, 0), (2, True, 0), (2, False, 0.01), (3, False, 0), (3, True, 0.01)]
)
def test_indefinite_sums_are_refused_by_name(operation, dtype, rank, antisymmetric, shift):
    X = indefinite(rank, antisymmetric=antisymmetric, dtype=dtype, shift=shift)
    with pytest.raises(IndefiniteError, match=r"fc\.weight.*indefinite.*clamped"):
        STOPS[operation](X)
    assert not X.semidefinite and X.trace().isfinite() and (X.eigenvalues() < 0).any()
    for root in (X.sqrt, X.inverse_sqrt):
        with pytest.raises(IndefiniteError, match=r"fc\.weight"):
            root()
    # Enough damping makes it definite, exactly.
    lam = 0.5 - float(X.eigenvalues()[-1])
    truth = X.to_dense().double() + lam * torch.eye(X.dim).double()
    v = torch.ones(X.dim, dtype=dtype)
    close((X + lam).solve(v), torch.linalg.solve(truth, v.double()), 1e-9 if dtype == torch.float64 else 1e-3)
    close((X + lam).logdet(), torch.logdet(truth), 1e-3)


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_two_terms_are_definite_up_to_the_exact_point(antisymmetric):
    X = indefinite(antisymmetric=antisymmetric, groups=2)

    def weakened(share):
        return KroneckerSum(X.A, torch.stack([X.B[0], share * X.B[1]]))

    # The first generalised eigenvalue to vanish, from the dense matrices.
    first, second = (Kronecker(A, B).to_dense() for A, B in zip(X.A, X.B, strict=True))
    root = torch.linalg.inv(torch.linalg.cholesky(first))
    edge = -1 / float(torch.linalg.eigvalsh(root @ second @ root.mT)[0])
    inside, outside = weakened(edge * (1 - 1e-6)), weakened(edge * (1 + 1e-6))
    assert torch.linalg.eigvalsh(inside.to_dense())[0] > 0 > torch.linalg.eigvalsh(outside.to_dense())[0]
    close(inside.logdet(), torch.logdet(inside.to_dense()), 1e-8)
    with pytest.raises(IndefiniteError):
        outside.logdet()
    with pytest.raises(SingularError):
        weakened(edge).logdet()


def test_what_is_bent_is_bent_on_request_and_said():
    for antisymmetric in (False, True):
        X = indefinite(antisymmetric=antisymmetric, groups=2)
        dense = X.to_dense()
        first = Kronecker(X.A[0], X.B[0]).to_dense()
        root = torch.linalg.cholesky(first)
        white = torch.linalg.solve(root, torch.linalg.solve(root, dense).mT)
        values, vectors = torch.linalg.eigh((white + white.mT) / 2)
        for bent, expected in (
            (X.clamped(), values.clamp_min(0)),
            (X.clamped(0.2), values.clamp_min(0.2)),
            (X.absolute(), values.abs()),
        ):
            assert isinstance(bent, Pair) and bent.semidefinite
            close(bent.to_dense(), root @ (vectors * expected) @ vectors.mT @ root.mT)
            assert "clamped" in bent.structure or "absolute" in bent.structure
            bent.sample(2, inverse=False), bent.sqrt()
        close(X.absolute().logdet(), first.logdet() + values.abs().log().sum())
        with pytest.raises(SingularError):
            X.clamped().inverse()
        damped = X.clamped() + 0.5
        close(damped.solve(torch.ones(X.dim).double()), torch.linalg.inv(damped.to_dense()).sum(1))
        # In the parameters' own coordinates: through the spectrum.
        values, vectors = torch.linalg.eigh(dense)
        close(X.spectral().clamped().to_dense(), (vectors * values.clamp_min(0)) @ vectors.mT)
        close(X.spectral().absolute().to_dense(), (vectors * values.abs()) @ vectors.mT)
        for other in (indefinite(3, antisymmetric=antisymmetric), X + 0.01):
            values, vectors = torch.linalg.eigh(other.to_dense())
            close(other.clamped(0.1).to_dense(), (vectors * values.clamp_min(0.1)) @ vectors.mT)
            close(other.absolute().to_dense(), (vectors * values.abs()) @ vectors.mT)


def test_what_is_positive_is_not_bent(sum_of, make):
    for name in ("kronecker-3", "dense", "diagonal", "eigenvalue-corrected-1", "total-1", "sum-positive-3-1"):
        X, _ = make[name]()
        assert X.clamped() is X.absolute() is X
        values, vectors = torch.linalg.eigh(X.to_dense())
        floor = float(values[2])
        close(X.clamped(floor).to_dense(), (vectors * values.clamp_min(floor)) @ vectors.mT)
        with pytest.raises(ValueError, match="at least 0"):
            X.clamped(-1.0)
    X, dense = sum_of(1, 2, "indefinite")  # it may be indefinite, but is not
    close(X.clamped().to_dense(), dense)
    close(X.absolute().to_dense(), dense)


def test_a_lazy_sum_with_an_indefinite_part_is_not_bent_either():
    X = indefinite()
    S = X + Diagonal(torch.full((X.dim,), 1e-3).double())
    assert not S.semidefinite
    for operation in STOPS.values():
        with pytest.raises(IndefiniteError):
            operation(S)
    D = Dense(X.to_dense(), "fc.weight", indefinite=True)
    with pytest.raises(IndefiniteError, match=r"fc\.weight"):
        (D + D).solve(torch.ones(X.dim).double())
    close((D + D).eigenvalues(), 2 * torch.linalg.eigvalsh(X.to_dense()).flip(0))
    restored = Operator.restored(D.tensors(), {"kind": D.kind, **D.settings()})
    assert not restored.semidefinite


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["positive", "indefinite", "antisymmetric"])
def test_factored_damping_of_two_terms_has_an_exact_inverse(sum_of, groups, kind, monkeypatch):
    monkeypatch.setattr("kronfisher.operators.operator.DENSE_LIMIT", 1)  # nothing is formed
    X, dense = sum_of(groups, 2, kind)
    damped = X + FactoredTikhonov(0.4)
    first = Kronecker(X.A[0], X.B[0])
    truth = dense - first.to_dense() + (first + FactoredTikhonov(0.4)).to_dense()
    close(damped.to_dense(), truth)
    v = torch.randn(X.dim, 2).double()
    close(damped.solve(v), torch.linalg.solve(truth, v))
    close(damped.logdet(), torch.logdet(truth))
    draws = damped.sample(30000, seed=1)
    close(draws.T @ draws / 30000, torch.linalg.inv(truth), 0.04)
    singular = X.with_first(Kronecker(0 * X.A[0], 0 * X.B[0]))
    (singular + FactoredTikhonov(100.0)).inverse()  # a first term that vanishes becomes λ


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["positive", "indefinite", "antisymmetric"])
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_iterated_solutions_at_any_size(sum_of, monkeypatch, dtype, kind, rank):
    monkeypatch.setattr("kronfisher.operators.operator.DENSE_LIMIT", 1)
    X, dense = sum_of(3, rank, kind, inputs=5, outputs=4)
    X = X.to(dtype=dtype) + 1e-2
    assert X.convergence is None and X.notes == ""
    v = torch.randn(X.dim, 3, dtype=dtype)
    v[:, 1] *= 1e-20  # each right-hand side is judged by its own size
    v[:, 2] = 0
    truth = torch.linalg.solve(dense + 1e-2 * torch.eye(X.dim).double(), v.double())
    for column in range(3):
        tolerance = 1e-10 if dtype == torch.float64 else 1e-4
        close(X.solve(v)[:, column], truth[:, column], tolerance, vanishing=column > 0)
    found = X.convergence
    residual = ((X @ X.solve(v) - v).norm(dim=0) / v.norm(dim=0))[:2].max()
    assert found.converged and 1 <= found.iterations <= 100
    assert found.residual <= (1e-11 if dtype == torch.float64 else 1e-4)
    assert residual <= 10 * found.residual + 10 * torch.finfo(dtype).eps
    assert f"{found.iterations} iterations" in X.notes
    with pytest.raises(UnsupportedError, match="factored damping"):
        X.logdet()
    assert X.solve(v[:, :0]).shape == (X.dim, 0)


def test_the_preconditioner_is_what_makes_it_fast(sum_of):
    X, _ = sum_of(1, 2, "antisymmetric", inputs=12, outputs=10)
    scale = 10 ** torch.linspace(0, 3, 12).double()
    X = KroneckerSum(X.A * scale[:, None] * scale, X.B, name="w", antisymmetric=X.antisymmetric) + 1e-3
    v = torch.randn(X.dim).double()
    X.solve(v)
    rows, plain = v[None], {"scale": 1e8, "floor": 0.0, "name": "w"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        _, without = conjugate.conjugate_gradients(X.matvecs, lambda r: r, rows, **plain)
    assert X.convergence.iterations < 40 < 120 < without.iterations


def test_what_does_not_converge_says_so(sum_of, monkeypatch):
    monkeypatch.setattr(conjugate, "ITERATIONS", 3)
    X, _ = sum_of(1, 3, "indefinite", inputs=6, outputs=5)
    X = X + 1e-2
    with pytest.warns(NumericalWarning, match=r"layer\.weight.*3 iterations.*residual"):
        X.solve(torch.randn(X.dim).double())
    assert not X.convergence.converged and "not converged" in X.notes and X.convergence.residual > 1e-10


def test_singular_and_not_finite_sums_are_refused(sum_of):
    X, _ = sum_of(1, 3)
    with pytest.raises(SingularError, match=r"layer\.weight"):
        (X * 0).solve(torch.ones(X.dim).double())
    flat = torch.ones(3, 1, 3, 3).double()  # rank one
    for rank in (2, 3):
        with pytest.raises(SingularError):
            KroneckerSum(flat[:rank], X.B[:rank], nonnegative=True).solve(torch.arange(6.0).double())
    bad = torch.full((3, 1, 3, 3), float("nan")).double()
    with pytest.raises(NumericalError, match=r"layer\.weight"):
        KroneckerSum(bad, X.B, "layer.weight", 0.1, antisymmetric=(False,) * 3).solve(torch.ones(6).double())


def test_a_positive_sum_is_sampled_at_any_size(sum_of, monkeypatch):
    monkeypatch.setattr("kronfisher.operators.operator.DENSE_LIMIT", 1)
    for X, dense in (sum_of(1, 3), sum_of(2, 2), sum_of(2, 2, shift=0.3)):
        assert X.noise_dim(inverse=False) == X.dim * (len(X.A) + (X.shift > 0))
        for inverse, truth in ((False, dense), (True, torch.linalg.inv(dense))):
            M = X.colour(torch.eye(X.noise_dim(inverse=inverse)).double(), inverse=inverse).mT
            close(M @ M.mT, truth)
    rank_deficient = torch.ones(3, 1, 3, 3).double()
    X = KroneckerSum(rank_deficient, sum_of(1, 3)[0].B, nonnegative=True)
    assert X.sample(4, inverse=False).shape == (4, 6)
    may_be_indefinite, _ = sum_of(1, 3, "indefinite")
    with pytest.raises(UnsupportedError, match="positive semidefinite"):
        may_be_indefinite.sample(2)


def test_sums_join(sum_of, kronecker_of):
    (X, x), (Y, y), (Z, z) = sum_of(2, 2), sum_of(2, 3, "antisymmetric", shift=0.2), kronecker_of(2, inputs=3)
    for S, dense, terms in ((X + Y, x + y, 5), (X + Z, x + z, 3), (Z + X, x + z, 3), (Y + Y, 2 * y, 6)):
        assert isinstance(S, KroneckerSum) and len(S.A) == terms
        close(S.to_dense(), dense)
        close(S.solve(torch.ones(12).double()), torch.linalg.inv(dense).sum(1))
    assert (X + Z).nonnegative and not (X + Y).nonnegative
    assert (X + Y).antisymmetric == (False, False, False, False, True) and (X + Y).shift == 0.2
    other, _ = sum_of(2, 2, "diagonal")  # sides of another form stay apart
    assert not isinstance(X + other, KroneckerSum)
    close((X + other).to_dense(), x + other.to_dense())


def test_copies_with_another_shift_share_the_eigenvectors(sum_of, monkeypatch):
    from kronfisher.operators import dense
    from kronfisher.operators.factors import dense as dense_factor

    calls = []
    for module in (dense_factor, dense):
        original = module.eigh
        monkeypatch.setattr(module, "eigh", lambda *a, original=original, **k: calls.append(a) or original(*a, **k))
    X, matrix = sum_of(1, 3, "indefinite")
    for shift in (0.1, 0.2):
        close(
            ((X + shift) + 0.1).solve(torch.ones(6).double()),
            torch.linalg.inv(matrix + (shift + 0.1) * torch.eye(6).double()).sum(1),
        )
        (X + shift).sqrt()
    assert len(calls) == 3  # two sides of the first term, and the whole


def test_tiny_gradients_keep_their_curvature(sum_of):
    for rank, kind in ((2, "indefinite"), (2, "antisymmetric"), (3, "indefinite")):
        unit = sum_of(1, rank, kind)[0].to(dtype=torch.float32)
        X = KroneckerSum(unit.A, 1e-25 * unit.B, antisymmetric=unit.antisymmetric)
        torch.testing.assert_close(X.frobenius_norm() * 1e25, unit.frobenius_norm())
        torch.testing.assert_close(X.solve(torch.ones(6)) * 1e-25, unit.solve(torch.ones(6)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close((X + 1e-25).solve(torch.ones(6)) * 1e-25, (unit + 1.0).solve(torch.ones(6)))
        inverse = X.inverse()
        torch.testing.assert_close(inverse.frobenius_norm() * 1e-25, unit.inverse().frobenius_norm(), rtol=1e-4, atol=0)


def test_sides_that_do_not_fit_are_refused():
    A, B = torch.eye(3).expand(2, 1, 3, 3), torch.eye(2).expand(2, 1, 2, 2)
    crooked, turned = torch.tensor([[0.0, 1.0], [0.5, 0.0]]), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    for bad in (
        lambda: KroneckerSum(A[0], B[0], "fc.weight"),
        lambda: KroneckerSum(A[:1], B, "fc.weight"),
        lambda: KroneckerSum(A[:0], B[:0], "fc.weight"),
        lambda: KroneckerSum(A, torch.stack([B[0], crooked[None]]), "fc.weight"),
        lambda: KroneckerSum(A, torch.stack([B[0], turned[None]]), "fc.weight"),  # one side of a term alone
        lambda: KroneckerSum(B, B, "fc.weight", antisymmetric=(True, False)),
        lambda: KroneckerSum(B, B, "fc.weight", antisymmetric=(False, True), nonnegative=True),
        lambda: KroneckerSum(B, B, "fc.weight", antisymmetric=(False,)),
        lambda: KroneckerSum(A[..., 0], B, "fc.weight", antisymmetric=(False, True)),
        lambda: KroneckerSum(A.double(), B, "fc.weight"),
    ):
        with pytest.raises(DataError, match=r"fc\.weight"):
            bad()
    with pytest.raises(ValueError, match="damping"):
        KroneckerSum(A, B, "fc.weight", shift=-1.0)


@pytest.fixture
def linear():
    model = torch.nn.Linear(3, 2, bias=False).double()
    block = Block("weight", "linear", Window.of("weight", model.weight).reshaped(1, 2, 3))
    return model, lambda X: Fisher(((block, X),), {"weight": (2, 3)}, Info(count=10.0))


def test_the_report_of_a_fisher_tells_of_solutions_and_of_what_was_bent(linear):
    _, fisher = linear
    F = fisher(indefinite())
    with pytest.raises(IndefiniteError, match=r"fc\.weight"):
        F.solve(torch.ones(6).double())
    damped = F + 8.0
    damped.solve(torch.ones(6).double())
    assert "conjugate gradients" in str(damped.report()) and "conjugate" not in str(F.report())
    for bent, words in ((F.clamped(0.1), "clamped at 0.1"), (F.absolute(), "absolute values")):
        assert words in str(bent.report()) and bent.info.changes == (words,)
        bent.solve(torch.ones(6).double()), bent.logdet(), bent.sample(2)
    assert len(F.clamped().sample(3, inverse=False)["weight"]) == 3
    positive = fisher(KroneckerSum(F["weight"].A[:1], F["weight"].B[:1], nonnegative=True, shift=0.1))
    assert positive.sample(3, inverse=False)["weight"].shape == (3, 2, 3)  # more noise than parameters


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_files(linear, tmp_path, antisymmetric):
    require("safetensors")
    model, fisher = linear
    X = indefinite(antisymmetric=antisymmetric, shift=0.25)
    for F in (fisher(X), fisher(indefinite(antisymmetric=antisymmetric).absolute())):
        F.save(tmp_path / "fisher")
        again = load(tmp_path / "fisher", model)
        assert torch.equal(again.to_dense(), F.to_dense())
        assert again["weight"].settings() == F["weight"].settings()
    close((again + 0.1).logdet(), (F + 0.1).logdet())
