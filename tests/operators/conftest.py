"""Operators of every kind and shape, as fixtures."""

import pytest

from tests.helpers.operators import MAKE, kronecker, kronecker_sum, tridiagonal


@pytest.fixture(params=MAKE)
def case(request):
    """A float64 operator and its dense twin."""
    return MAKE[request.param]()


@pytest.fixture
def make():
    """The makers by name, and of their parts."""
    return MAKE


@pytest.fixture
def kronecker_of():
    return kronecker


@pytest.fixture
def chain_of():
    return tridiagonal


@pytest.fixture
def sum_of():
    return kronecker_sum
