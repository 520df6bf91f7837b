"""Operators relative to their mean eigenvalue, damped by shares of it, against dense truth."""

import pytest
import torch

from kronfisher.operators import Dense, Diagonal, Kronecker, KroneckerSum
from kronfisher.operators.eigen import Eigen, KroneckerBasis

INPUTS, OUTPUTS = 0.3, 0.05


def positive(groups, size, seed):
    root = torch.randn(groups, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.mT


def eye(size):
    return torch.eye(size, dtype=torch.float64)


def mean(factor):
    return factor.diagonal(dim1=-2, dim2=-1).mean()


@pytest.mark.parametrize("groups", [1, 3])
def test_products(groups):
    A, B = positive(groups, 4, 0), positive(groups, 3, 1)
    damped = (
        torch.kron(b / mean(B) + OUTPUTS * eye(3), a / mean(A) + INPUTS * eye(4)) for a, b in zip(A, B, strict=True)
    )
    torch.testing.assert_close(Kronecker(A, B).normalized(INPUTS, OUTPUTS).to_dense(), torch.block_diag(*damped))


def test_a_product_that_is_zero_stays_invertible():
    zero = Kronecker(torch.zeros(1, 4, 4), torch.zeros(1, 3, 3)).normalized(INPUTS, OUTPUTS)
    torch.testing.assert_close(zero.inverse().to_dense(), torch.eye(12))


def test_corrected_eigenvalues_that_are_a_product_are_damped_as_it_is():
    A, B = positive(1, 4, 0), positive(1, 3, 1)
    (a, U), (b, V) = torch.linalg.eigh(A[0]), torch.linalg.eigh(B[0])
    corrected = Eigen(KroneckerBasis(U[None], V[None]), torch.outer(b, a).flatten())
    expected = Kronecker(A, B).normalized(INPUTS, OUTPUTS)
    torch.testing.assert_close(corrected.normalized(INPUTS, OUTPUTS).to_dense(), expected.to_dense())


def test_of_a_sum_the_first_term_is_damped():
    A, B = positive(2, 4, 0), positive(2, 3, 1)
    whole = KroneckerSum(A[:, None], B[:, None])
    scale = mean(A[0]) * mean(B[0])
    damped = torch.kron(B[0] + OUTPUTS * mean(B[0]) * eye(3), A[0] + INPUTS * mean(A[0]) * eye(4))
    expected = (damped + torch.kron(B[1], A[1])) / scale
    torch.testing.assert_close(whole.normalized(INPUTS, OUTPUTS).to_dense(), expected)


@pytest.mark.parametrize("kind", [Dense, Diagonal])
def test_structures_without_factors_get_the_product_of_the_shares(kind):
    matrix = positive(1, 5, 2)[0]
    operator = Dense(matrix) if kind is Dense else Diagonal(matrix.diagonal())
    dense = operator.to_dense()
    expected = dense / mean(dense) + INPUTS * OUTPUTS * eye(5)
    torch.testing.assert_close(operator.normalized(INPUTS, OUTPUTS).to_dense(), expected)
