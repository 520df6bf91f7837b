"""The factors of a Kronecker product; make one with `Factor.of`."""

from kronfisher.operators.factors.dense import DenseFactor
from kronfisher.operators.factors.diagonal import DiagonalFactor
from kronfisher.operators.factors.factor import Factor
from kronfisher.operators.factors.product import (
    check_factors,
    cholesky_solve,
    outer,
    sandwich,
    separate,
    size_text,
    stack,
)

__all__ = [
    "DenseFactor",
    "DiagonalFactor",
    "Factor",
    "check_factors",
    "cholesky_solve",
    "outer",
    "sandwich",
    "separate",
    "size_text",
    "stack",
]
