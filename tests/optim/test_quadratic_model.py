"""The minimum of the quadratic model."""

import pytest
import torch

from kronfisher.optim import quadratic_model as quadratic


def test_the_minimum_is_where_the_model_is_least():
    root = torch.randn(2, 2, dtype=torch.float64)
    matrix, slopes = root @ root.T + torch.eye(2), torch.tensor([-1.0, -0.3], dtype=torch.float64)
    best = quadratic.minimum(matrix, slopes, most=1e9)
    free = -torch.linalg.solve(matrix, slopes)
    expected = free if free[1] >= 0 else torch.stack([-slopes[0] / matrix[0, 0], torch.zeros(())])
    torch.testing.assert_close(best, expected.double())
    value = quadratic.model_change(matrix, slopes, best)
    for _ in range(20):
        other = (best + 0.1 * torch.randn(2)).double()
        other[1].clamp_(min=0)
        assert quadratic.model_change(matrix, slopes, other) >= value


def test_a_flat_model_moves_only_along_the_last_step():
    zero = torch.zeros(1, 1, dtype=torch.float64)
    assert quadratic.minimum(zero, zero[0]).tolist() == [0.0]
    matrix = torch.tensor([[0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    assert quadratic.minimum(matrix, torch.tensor([0.0, -1.0]).double()).tolist() == [0.0, 0.5]
    assert quadratic.minimum(0 * matrix, torch.zeros(2).double()).tolist() == [0.0, 0.0]
    assert quadratic.minimum(matrix.flip(0, 1), torch.tensor([-1.0, 0.0]).double()).tolist() == [0.5, 0.0]


def test_a_bounded_momentum_has_its_own_best_step():
    matrix = torch.tensor([[1.0, 0.2], [0.2, 0.1]], dtype=torch.float64)
    slopes = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    alpha, mu = quadratic.minimum(matrix, slopes, most=0.5).tolist()
    assert mu == 0.5 and alpha == pytest.approx(1.0 - 0.2 * 0.5)


def test_parallel_directions_count_once():
    matrix = torch.ones(2, 2, dtype=torch.float64)
    best = quadratic.minimum(matrix, torch.tensor([-1.0, -1.0], dtype=torch.float64))
    assert best.tolist() == [1.0, 0.0]
