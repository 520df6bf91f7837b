"""Structured symmetric matrices. They know no model."""

from kronfisher.operators.block_tridiagonal import Tridiagonal
from kronfisher.operators.dense import Dense
from kronfisher.operators.diagonal import Diagonal
from kronfisher.operators.eigen import DenseBasis, Eigen, KroneckerBasis
from kronfisher.operators.factors import DenseFactor, DiagonalFactor, Factor
from kronfisher.operators.inverse import Inverse
from kronfisher.operators.kronecker import Kronecker
from kronfisher.operators.kronecker_sum import KroneckerSum
from kronfisher.operators.operator import Operator
from kronfisher.operators.outer_sum import OuterSum
from kronfisher.operators.owned import Outline, Owned
from kronfisher.operators.pair import Pair
from kronfisher.operators.prototyped import Prototyped
from kronfisher.operators.sum import Sum

__all__ = [
    "Dense",
    "DenseBasis",
    "DenseFactor",
    "Diagonal",
    "DiagonalFactor",
    "Eigen",
    "Factor",
    "Inverse",
    "Kronecker",
    "KroneckerBasis",
    "KroneckerSum",
    "Operator",
    "OuterSum",
    "Outline",
    "Owned",
    "Pair",
    "Prototyped",
    "Sum",
    "Tridiagonal",
]
