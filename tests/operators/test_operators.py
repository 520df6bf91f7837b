"""Every operation of every operator against the dense matrix it stands for."""

import json
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from kronfisher.errors import DataError
from kronfisher.operators import Eigen, Inverse, Operator, Pair, Prototyped, Sum
from tests.helpers.close import close

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}


def power(matrix, exponent):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values**exponent @ vectors.mT


def identity(matrix):
    return torch.eye(len(matrix), dtype=matrix.dtype)


def test_every_registered_operator_has_a_case(make):
    def classes(operator):
        yield type(operator)
        for term in operator.terms if isinstance(operator, Sum) else ():
            yield from classes(term)

    covered = {cls for maker in make.values() for cls in classes(maker()[0])}
    assert set(Operator.kinds.values()) <= covered
    assert all(cls.kind == kind for kind, cls in Operator.kinds.items())


def test_to_dense_is_the_explicit_kronecker_product(case):
    X, dense = case
    close(X.to_dense(), dense, 1e-14)
    assert X.dim == len(dense) and X.dtype == torch.float64 and X.device.type == "cpu"
    assert X.structure and repr(X)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("columns", [None, 0, 1, 5])
def test_products_and_solutions(case, dtype, columns):
    X, dense = case
    X = X.to(dtype=dtype)
    v = torch.randn(X.dim, dtype=dtype) if columns is None else torch.randn(X.dim, columns, dtype=dtype)
    before = v.clone()
    for _ in range(2):  # nothing that the first call keeps may change the second
        for result, truth in ((X @ v, dense @ v.double()), (X.solve(v), torch.linalg.inv(dense) @ v.double())):
            assert result.dtype == dtype
            if v.numel():
                close(result, truth, TOLERANCE[dtype])
            else:
                assert result.shape == truth.shape
    assert torch.equal(v, before)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("name", "exponent"), [("inverse", -1.0), ("sqrt", 0.5), ("inverse_sqrt", -0.5)], ids=lambda x: str(x)
)
def test_functions_of_the_matrix(case, dtype, name, exponent):
    X, dense = case
    result = getattr(X.to(dtype=dtype), name)()
    assert isinstance(result, Operator) and result.dtype == dtype
    close(result.to_dense(), power(dense, exponent), TOLERANCE[dtype])
    again = result @ (result @ torch.ones(X.dim, dtype=dtype))  # its products say the same as its entries
    close(again, power(dense, 2 * exponent) @ torch.ones(X.dim).double(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_numbers(case, dtype):
    X, dense = case
    X = X.to(dtype=dtype)
    tolerance = TOLERANCE[dtype]
    close(X.trace(), dense.trace(), tolerance)
    close(X.logdet(), torch.logdet(dense), tolerance)
    close(X.frobenius_norm(), torch.linalg.matrix_norm(dense), tolerance)
    close(X.diagonal(), dense.diagonal(), tolerance)
    close(X.eigenvalues(), torch.linalg.eigvalsh(dense).flip(0), tolerance)
    assert X.trace().dim() == X.logdet().dim() == X.frobenius_norm().dim() == 0


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_shifts_and_scales(case, dtype):
    X, dense = case
    X = X.to(dtype=dtype)
    tolerance = TOLERANCE[dtype]
    for result, truth in (
        (X.shifted(0.3), dense + 0.3 * identity(dense)),
        (X + 0.3, dense + 0.3 * identity(dense)),
        (0.3 + X, dense + 0.3 * identity(dense)),
        (X + torch.tensor(0.3), dense + torch.tensor(0.3).double() * identity(dense)),
        ((X + 0.3) + 0.2, dense + 0.5 * identity(dense)),
        (X.scaled(2.5), 2.5 * dense),
        (X * 2.5, 2.5 * dense),
        (2.5 * X, 2.5 * dense),
        (X / 4, dense / 4),
        ((X * 2.5 + 0.3).inverse(), torch.linalg.inv(2.5 * dense + 0.3 * identity(dense))),
        ((X + 0.3) * 2.5, 2.5 * dense + 0.75 * identity(dense)),
        (X.inverse() + 0.3, torch.linalg.inv(dense) + 0.3 * identity(dense)),
    ):
        close(result.to_dense(), truth, tolerance)
        close(result.trace(), truth.trace(), tolerance)
        close(result.diagonal(), truth.diagonal(), tolerance)
    assert X.shifted(0) is X
    close((X * 0).to_dense(), 0 * dense, vanishing=True)
    close(sum([X, X]).to_dense(), 2 * dense, tolerance)


@pytest.mark.parametrize("bad", [-1e-9, float("nan"), float("inf")])
def test_what_would_not_stay_positive_is_refused(case, bad):
    X, _ = case
    for attempt in (X.shifted, X.scaled, X.__add__, X.__mul__, X.__truediv__):
        if bad == float("inf") and attempt == X.__truediv__:
            continue
        with pytest.raises(ValueError, match="at least 0"):
            attempt(bad)
    for attempt in (X.__add__, X.__mul__, X.__truediv__):
        assert attempt("text") is NotImplemented


def test_sums_of_all_pairs(make):
    cases = [maker() for maker in make.values()]
    pairs = [(a, b) for k, a in enumerate(cases) for b in cases[k:] if a[0].dim == b[0].dim]
    assert len(pairs) > 50
    v = torch.randn(24, 2, dtype=torch.float64)
    for (X, x), (Y, y) in pairs:
        for S in (X + Y, Y + X):
            close(S.to_dense(), x + y)
            close(S @ v[: S.dim], (x + y) @ v[: S.dim])
            close(S.solve(v[: S.dim]), torch.linalg.solve(x + y, v[: S.dim]))
            close(S.logdet(), torch.logdet(x + y))
            close(S.diagonal(), (x + y).diagonal())


def test_noise_is_coloured_by_a_root_of_the_right_matrix(case):
    # The rows of the coloured identity are the columns of the linear map M, and the covariance is M Mᵀ. With L in place
    # of Lᵀ the product would be another matrix, since these are far from the identity.
    X, dense = case
    for inverse in (True, False):
        M = X.colour(torch.eye(X.noise_dim(inverse=inverse)).double(), inverse=inverse).mT
        close(M @ M.mT, torch.linalg.inv(dense) if inverse else dense)


def test_samples_have_the_right_covariance_and_leave_the_global_state_alone(case):
    X, dense = case
    n = 20000
    state = torch.get_rng_state()
    draws = X.sample(n, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert draws.shape == (n, X.dim) and draws.dtype == X.dtype
    assert torch.equal(draws, X.sample(n, seed=3)) and not torch.equal(draws, X.sample(n, seed=4))
    for inverse, truth in ((True, torch.linalg.inv(dense)), (False, dense)):
        draws = X.sample(n, seed=3, inverse=inverse)
        covariance = draws.T @ draws / n
        # var of an entry of the empirical covariance is (C_ii C_jj + C_ij²) / n; six standard deviations
        scale = ((torch.outer(truth.diagonal(), truth.diagonal()) + truth**2) / n).sqrt()
        assert ((covariance - truth).abs() < 6 * scale).all()


@pytest.mark.parametrize(
    ("own", "other", "answer"),
    [
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float16, torch.float32),
    ],
    ids=str,
)
def test_vectors_of_another_float_dtype_promote(case, own, other, answer):
    X, _ = case
    X = X.to(dtype=own)
    dense = X.to(dtype=torch.float64).to_dense()
    v = torch.randn(X.dim, 2).to(other)
    assert (X @ v).dtype == X.solve(v).dtype == answer
    # Eigenvectors found in float32 stay orthogonal to float32 only.
    close(X @ v, dense @ v.double(), TOLERANCE[own if isinstance(X, Inverse) else answer])
    rotated = isinstance(X, Eigen | Pair | Prototyped | Inverse)
    close(X.solve(v), torch.linalg.solve(dense, v.double()), TOLERANCE[own if rotated else answer])


def test_vectors_that_do_not_fit_are_refused(case):
    X, _ = case
    for multiply in (X.__matmul__, X.solve):
        for bad, message in (
            (torch.ones(X.dim + 1).double(), "takes"),
            (torch.ones(2, X.dim + 1).double(), "takes"),
            (torch.ones(X.dim, 1, 1).double(), "takes"),
            (torch.tensor(1.0), "takes"),
            (torch.ones(X.dim, dtype=torch.int64), "floating-point"),
            (torch.ones(X.dim, dtype=torch.complex64), "floating-point"),
            ([1.0] * X.dim, "not list"),
            (torch.ones(X.dim, device="meta"), "meta"),
        ):
            with pytest.raises(DataError, match=message):
                multiply(bad)


def test_precision_does_not_depend_on_autocast(case):
    X = case[0].to(dtype=torch.float32)
    v = torch.randn(X.dim, 3)
    plain = X @ v, X.solve(v), X.diagonal(), (X + 0.1).solve(v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(plain, (X @ v, X.solve(v), X.diagonal(), (X + 0.1).solve(v)), strict=True):
            assert torch.equal(a, b)


def test_round_trip_through_tensors_and_json(case):
    for X in (case[0], case[0] + 0.5, case[0] * 3.0):
        settings = json.loads(json.dumps({"kind": X.kind, **X.settings()}))
        Y = Operator.restored(dict(X.tensors()), settings)
        assert type(Y) is type(X) and Y.structure == X.structure and Y.name == X.name
        assert torch.equal(Y.to_dense(), X.to_dense())
        assert Y.settings() == X.settings()
        assert X.bytes == sum(t.nbytes for t in X.tensors().values())


def test_to(case):
    X, dense = case
    assert X.to() is X and X.to("cpu", torch.float64) is X
    assert X.to(dtype=torch.float32).dtype == torch.float32
    close(X.to(dtype=torch.float32).to_dense(), dense, 1e-5)
    assert X.to("meta").device.type == "meta"
    with pytest.raises(DataError, match="float32 or float64"):
        X.to(dtype=torch.bfloat16)


def test_operators_are_immutable(case):
    X, dense = case
    for field in fields(X):
        with pytest.raises(FrozenInstanceError):
            setattr(X, field.name, None)
    tensors = {key: tensor.clone() for key, tensor in X.tensors().items()}
    v = torch.ones(X.dim, dtype=torch.float64)
    for result in (X @ v, X.solve(v), X.diagonal(), X.to_dense(), X.eigenvalues(), X.sample(2), X.trace(), X.logdet()):
        result.zero_()  # what was handed out is the caller's own
    for derived in (X.inverse(), X.sqrt(), X + 0.1, X * 2, X + X):
        derived.to_dense().zero_()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in X.tensors().items())
    close(X.to_dense(), dense)
    close(X @ v, dense @ v)
    close(X.eigenvalues(), torch.linalg.eigvalsh(dense).flip(0))
    assert torch.equal(v, torch.ones_like(v))
