"""The exact matrix by its rows: both sides, both routes, λ down to where rounding hides it."""

import math

import pytest
import torch

from kronfisher.errors import NumericalError, SingularError
from kronfisher.operators import OuterSum
from kronfisher.operators.rows import OuterRows, PlainRows, Rows, join
from tests.helpers.close import close
from tests.helpers.operators import outer_sum


def graded(number, dim, decades, seed=0):
    """Rows whose singular values fall over some decades, and their orthonormal directions."""
    generator = torch.Generator().manual_seed(seed)
    size = min(number, dim)
    left, right = (
        torch.linalg.qr(torch.randn(n, size, dtype=torch.float64, generator=generator))[0] for n in (number, dim)
    )
    values = torch.logspace(0, -decades, size, dtype=torch.float64)
    return Rows((PlainRows((left * values) @ right.mT),)), values.square(), right


def truth(values, right, damping, function, vectors):
    """A function of the matrix times columns, from the known spectrum: in the range of the rows and outside apart."""
    inside = right.mT @ vectors
    outside = vectors - right @ inside
    outside = outside - right @ (right.mT @ outside)
    return (
        right @ (function(values + damping)[:, None] * inside)
        + function(torch.tensor(damping, dtype=torch.float64)) * outside
    )


@pytest.mark.parametrize(("number", "dim"), [(8, 20), (20, 20), (50, 20)])
@pytest.mark.parametrize("damping", [1e-3, 1e-6, 1e-8, 1e-11, 1e-14])
def test_solutions_draws_and_determinants_at_small_damping(number, dim, damping):
    rows, values, right = graded(number, dim, 3)
    X = OuterSum(rows) + damping
    vectors = torch.randn(dim, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for given in (vectors, right @ (right.mT @ vectors)):  # anywhere; and where gradients are
        expected = truth(values, right, damping, torch.reciprocal, given)
        noise = 1e-8 if damping >= 1e-6 or given is vectors else 1e-15 / damping  # noise outside is divided by λ
        close(X.solve(given), expected, max(noise, 1e-8))
    close(X.colour(vectors.mT).mT, truth(values, right, damping, torch.rsqrt, vectors), 1e-8)
    close(X.colour(vectors.mT, inverse=False).mT, truth(values, right, damping, torch.sqrt, vectors), 1e-8)
    logdet = (values + damping).log().sum() + (dim - len(values)) * math.log(damping)
    close(X.logdet(), logdet, 1e-8)
    traces = (1 / (values + damping)).sum() + (dim - len(values)) / damping
    close(X.inverse().trace(), traces, 1e-8)
    close(X.inverse().diagonal().sum(), traces, 1e-7)


def test_what_rounding_hides_is_refused():
    rows, *_ = graded(8, 20, 3)
    with pytest.raises(NumericalError, match="hidden by rounding"):
        OuterSum(rows).shifted(1e-31)
    with pytest.raises(SingularError, match="Add damping"):
        OuterSum(rows).solve(torch.ones(20).double())
    tall, *_ = graded(30, 20, 3)
    dense = OuterSum(tall).to_dense()
    close(OuterSum(tall).solve(torch.ones(20).double()), torch.linalg.solve(dense, torch.ones(20).double()), 1e-8)


def test_eigenvectors_are_those_of_the_matrix():
    X, dense = outer_sum(6, 0.7)
    assert isinstance(X, OuterSum)
    vectors, values = X.eigenvectors(), X.eigenvalues()
    close(dense @ vectors, vectors * values[: vectors.shape[1]])
    close(vectors.mT @ vectors, torch.eye(vectors.shape[1]).double())


def test_pieces_in_both_forms_are_joined():
    generator = torch.Generator().manual_seed(0)
    a, g = (torch.randn(4, n, dtype=torch.float64, generator=generator) for n in (3, 2))
    outer = Rows((OuterRows(a, g, torch.arange(4).flip(0)),))
    for pieces in ([outer, outer], [outer, Rows((PlainRows(outer.dense()),))]):
        whole = join(pieces)
        close(whole.dense(), torch.cat([outer.dense()] * 2))
        close(whole.gram, whole.dense() @ whole.dense().mT)
