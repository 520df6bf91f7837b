"""What is particular to one structure: sharing, singularity, merging, limits, messages."""

import warnings

import pytest
import torch

from kronfisher.errors import DataError, NumericalError, NumericalWarning, SingularError, UnsupportedError
from kronfisher.operators import Dense, DenseBasis, Diagonal, Eigen, Kronecker, KroneckerBasis, Operator, Sum, dense
from kronfisher.operators.factors import dense as dense_factor

INVERSE_LIKE = {
    "inverse": lambda X: X.inverse(),
    "inverse_sqrt": lambda X: X.inverse_sqrt(),
    "solve": lambda X: X.solve(torch.ones(X.dim, dtype=X.dtype)),
    "logdet": lambda X: X.logdet(),
    "sample": lambda X: X.sample(2),
}


@pytest.fixture
def decompositions(monkeypatch):
    """Counts eigendecompositions."""
    calls = []
    for module in (dense_factor, dense):
        original = module.eigh
        monkeypatch.setattr(module, "eigh", lambda *a, original=original, **k: calls.append(a) or original(*a, **k))
    return calls


def test_copies_with_another_shift_share_the_eigenvectors(decompositions, make):
    for name, expected in (
        ("kronecker-3", 2),
        ("kronecker-diagonal-A-3", 1),
        ("dense", 1),
        ("total-1", 1),
        ("diagonal", 0),
    ):
        X, matrix = make[name]()
        decompositions.clear()
        for shift in (0.1, 0.2, 3.0):
            Y = X + shift
            Y.solve(torch.ones(X.dim).double()), Y.logdet(), Y.inverse_sqrt(), (Y + 1.0).sample(2), Y.eigenvalues()
            torch.testing.assert_close(Y.to_dense(), matrix + shift * torch.eye(X.dim).double())
        assert len(decompositions) == expected, name
    X, _ = make["kronecker-1"]()
    assert (X + 0.1).basis is (X + 7.0).basis is X.sqrt().basis is (X + 0.1).inverse().basis


def test_cheap_operations_do_not_decompose(decompositions, make):
    for name in ("kronecker-3", "dense", "eigenvalue-corrected-3", "diagonal", "kronecker-diagonal-A-1"):
        X, _ = make[name]()
        v = torch.ones(X.dim).double()
        X @ v, X.solve(v), X.inverse(), X.trace(), X.diagonal(), X.frobenius_norm(), X.logdet(), X.to_dense(), X * 2
        X.sample(2)
    assert not decompositions


def rank_deficient(dtype):
    g = torch.randn(1, 4, 2, dtype=dtype)
    B = torch.randn(1, 3, 3, dtype=dtype)
    return g @ g.mT, B @ B.mT + torch.eye(3, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("operation", INVERSE_LIKE)
def test_singular_matrices_are_refused_by_name_and_damping_helps(operation, dtype):
    A, B = rank_deficient(dtype)
    zero_a, one = torch.zeros_like(A), torch.ones(12, dtype=dtype)
    grouped = torch.cat([A, B.new_tensor(torch.eye(4).tolist())[None]])
    matrix = torch.kron(B[0], A[0])
    for X in (
        Kronecker(A, B, name="fc.weight"),
        Kronecker(B, A, name="fc.weight"),
        Kronecker(zero_a, B, name="fc.weight"),
        Kronecker(A, torch.zeros_like(B), name="fc.weight"),
        Kronecker(grouped, torch.cat([B, B]), name="fc.weight"),  # one singular group is enough
        Kronecker(zero_a[:, 0], B, name="fc.weight"),
        Kronecker(torch.ones(1, 1, 1, dtype=dtype) * 0, torch.ones(1, 1, 1, dtype=dtype), name="fc.weight"),
        Eigen(DenseBasis(torch.eye(12, dtype=dtype)), one * 0, name="fc.weight"),
        Eigen(
            KroneckerBasis(torch.ones(1, 4, dtype=dtype), torch.linalg.eigh(B).eigenvectors),
            one.cumsum(0) - 1,
            name="fc.weight",
        ),
        Dense(matrix, name="fc.weight"),
        Dense(0 * matrix, name="fc.weight"),
        Diagonal(one.cumsum(0) - 1, name="fc.weight"),
        Diagonal(one[:1] * 0, name="fc.weight"),
        Kronecker(A, B, name="fc.weight") + Kronecker(A, B, name="fc.weight"),
    ):
        with pytest.raises(SingularError, match=r"fc\.weight.*damping"):
            INVERSE_LIKE[operation](X)
        damped = X + 0.5
        INVERSE_LIKE[operation](damped)
        truth = torch.linalg.inv(X.to_dense().double() + 0.5 * torch.eye(X.dim).double())
        torch.testing.assert_close(damped.inverse().to_dense().double(), truth, rtol=1e-3, atol=1e-4)
        assert X.sqrt().to_dense().isfinite().all() and X.sample(3, inverse=False).isfinite().all()
        assert X.eigenvalues().isfinite().all() and X.frobenius_norm().isfinite()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_deficiency_of_one_is_not_hidden_by_rounding(seed, dtype):
    # The last pivot is rounding noise of either sign; a positive one lets the factorisation pass.
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(120, 40, dtype=dtype, generator=generator).relu()
    x[:, -1] = x[:, :-1] @ torch.rand(39, dtype=dtype, generator=generator)
    A, B = (x.T @ x)[None], torch.ones(1, 1, 1, dtype=dtype)
    with pytest.raises(SingularError):
        Kronecker(A, B).inverse()
    with pytest.raises(SingularError):
        Dense(A[0]).inverse()


def test_a_product_of_two_poorly_conditioned_factors_is_not_called_singular():
    A, B = torch.diag_embed(torch.tensor([[1.0, 1e-4]])), torch.diag_embed(torch.tensor([[1.0, 1e-4]]))
    X, v = Kronecker(A, B), torch.ones(4)
    expected = torch.tensor([1.0, 1e4, 1e4, 1e8])
    torch.testing.assert_close(X.solve(v), expected)
    torch.testing.assert_close(X.inverse_sqrt() @ (X.inverse_sqrt() @ v), expected)


def test_what_is_known_to_be_definite_is_not_taken_for_noise():
    small = torch.tensor([1.0, 1e-9])
    for A in (small.diag()[None], small[None]):
        X = Kronecker(A, torch.ones(1, 1, 1), definite=True)
        torch.testing.assert_close(X.inverse().diagonal(), 1 / small)
        torch.testing.assert_close(X.inverse_sqrt().diagonal(), small.rsqrt())
        torch.testing.assert_close((X * 3.0).inverse_sqrt().diagonal(), (3 * small).rsqrt())
        for operation in (Kronecker(A, X.B).inverse, Kronecker(A, X.B).inverse_sqrt):
            with pytest.raises(SingularError):
                operation()


def test_damping_below_the_precision_is_usable_but_announced():
    X = Kronecker(torch.ones(1, 2, 2), torch.ones(1, 1, 1), name="fc.weight")  # eigenvalues 2 and 0
    with pytest.warns(NumericalWarning, match=r"fc\.weight.*precision"):
        Y = X + 1e-9
    assert Y.inverse().to_dense().isfinite().all()
    torch.testing.assert_close(Y.eigenvalues(), torch.tensor([2.0, 1e-9]))
    again = Y.inverse().inverse()  # what is positive by construction stays so
    torch.testing.assert_close(again.eigenvalues(), torch.tensor([2.0, 1e-9]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        X + 1e-6, X * 0 + 1e-30
    restored = Operator.restored(Y.tensors(), {"kind": Y.kind, **Y.settings()})
    torch.testing.assert_close(restored.inverse().to_dense(), Y.inverse().to_dense())


def test_tiny_gradients_keep_their_curvature():
    # Second moments of 1e-25: their squares are zero in float32, the squares of their inverses infinite.
    A = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
    for X in (Kronecker(A, 1e-25 * A), Dense(1e-25 * torch.kron(A[0], A[0]))):
        unit = X * 1e25
        torch.testing.assert_close(X.frobenius_norm() * 1e25, unit.frobenius_norm())
        torch.testing.assert_close(X.solve(torch.ones(4)) * 1e-25, unit.solve(torch.ones(4)))
        torch.testing.assert_close(X.inverse().to_dense() * 1e-25, unit.inverse().to_dense())
        torch.testing.assert_close(X.logdet(), unit.logdet() - 4 * 25 * torch.tensor(10.0).log())


def test_not_finite_is_reported_with_the_name():
    bad = torch.full((1, 2, 2), float("nan"))
    one = torch.eye(2)[None]
    for X in (Kronecker(bad, one, name="fc.weight"), Kronecker(one, bad, name="fc.weight"), Dense(bad[0], "fc.weight")):
        for operation in (X.inverse, X.spectral):
            with pytest.raises(NumericalError, match=r"fc\.weight"):
                operation()
    with pytest.raises(NumericalError, match=r"fc\.weight"):
        Diagonal(torch.tensor([1.0, float("inf")]), "fc.weight").inverse()


def test_sums_merge_where_the_result_is_no_larger(make):
    X, _ = make["kronecker-1"]()
    diagonal = Diagonal(torch.ones(8).double())
    matrix = Dense(torch.eye(8).double())
    assert isinstance(diagonal + diagonal, Diagonal)
    assert isinstance(matrix + matrix, Dense)
    assert isinstance(diagonal + matrix, Dense) and isinstance(matrix + diagonal, Dense)
    assert isinstance(X + X, Sum) and len((X + X).terms) == 2
    assert len((X + diagonal + X + diagonal).terms) == 3
    assert isinstance((X + 0.1) + (X + 0.2), Eigen)  # one basis
    assert isinstance((X + matrix) + (X + matrix), Sum) and len(((X + matrix) + (X + matrix)).terms) == 3
    mixed = X.to(dtype=torch.float32) + diagonal
    assert mixed.dtype == torch.float64
    with pytest.raises(DataError, match="one dimension"):
        X + Diagonal(torch.ones(7).double())


def test_large_sums_stay_lazy_and_say_what_cannot_be_done(make, monkeypatch):
    X, matrix = make["total-3"]()
    monkeypatch.setattr("kronfisher.operators.operator.DENSE_LIMIT", 4)
    v = torch.randn(24, 2).double()
    torch.testing.assert_close((X + 0.5) @ v, matrix @ v + 0.5 * v)
    torch.testing.assert_close((X + 0.5).trace(), matrix.trace() + 12)
    damped = X + 0.5
    assert isinstance(damped, Sum)
    solution = torch.linalg.solve(matrix + 0.5 * torch.eye(24).double(), v)
    torch.testing.assert_close(damped.solve(v), solution, rtol=1e-8, atol=1e-10)  # from products with the terms
    assert damped.convergence.converged and "conjugate gradients" in damped.notes
    rest = [operation for name, operation in INVERSE_LIKE.items() if name != "solve"]
    operations = (*rest, *(lambda X, name=n: getattr(X, name)() for n in ("sqrt", "spectral")))
    for operation in (*operations, lambda X: X.frobenius_norm(), lambda X: X.eigenvalues()):
        with pytest.raises(UnsupportedError, match=r"24.*conjugate gradients"):
            operation(X)


def test_structures_read_well(make):
    A, B = torch.eye(401)[None], torch.eye(120)[None]
    X = Kronecker(A, B)
    assert X.structure == "kronecker 401x120"
    assert (X + 1e-3).structure == "kronecker 401x120"
    assert Eigen(KroneckerBasis(A, B), torch.ones(401 * 120)).structure == "eigenvalue-corrected 401x120"
    assert Kronecker(torch.ones(1, 50), B).structure == "kronecker diag(50)x120"
    assert Kronecker(torch.ones(3, 2), torch.ones(3, 1, 1)).structure == "kronecker 3 x diag(2)x1"
    assert Dense(torch.eye(30)).structure == (Dense(torch.eye(30)) + 1.0).structure == "dense 30x30"
    assert Diagonal(torch.ones(64)).structure == "diagonal 64"
    assert "kronecker 4x2 + kronecker 4x2" in make["total-1"]()[0].structure


def test_pieces_that_do_not_fit_are_refused():
    one = torch.eye(2)[None]
    for A, B in (
        (one, torch.eye(2).expand(3, 2, 2)),
        (one, one.double()),
        (torch.ones(1, 2, 3), one),
        (torch.ones(2), one),
    ):
        with pytest.raises(DataError, match=r"fc\.weight"):
            Kronecker(A, B, name="fc.weight")
    for make in (
        lambda: Dense(torch.ones(2, 3)),
        lambda: Diagonal(torch.ones(2, 3)),
        lambda: Eigen(DenseBasis(torch.eye(2)), torch.ones(3)),
        lambda: KroneckerBasis(one, torch.ones(1, 2, 3)),
    ):
        with pytest.raises(DataError):
            make()
