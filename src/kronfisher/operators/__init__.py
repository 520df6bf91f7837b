"""Structured symmetric matrices, and the Fisher matrix made of them."""

from kronfisher.operators.dense import Dense
from kronfisher.operators.diagonal import Diagonal
from kronfisher.operators.eigen import DenseBasis, Eigen, KroneckerBasis
from kronfisher.operators.fisher import Fisher
from kronfisher.operators.info import BlockInfo, Info
from kronfisher.operators.inverse import Inverse
from kronfisher.operators.kronecker import Kronecker
from kronfisher.operators.kronecker_sum import KroneckerSum
from kronfisher.operators.operator import Operator
from kronfisher.operators.pair import Pair
from kronfisher.operators.prototyped import Prototyped
from kronfisher.operators.report import Report
from kronfisher.operators.storage import load
from kronfisher.operators.total import Total
from kronfisher.operators.tridiagonal import Tridiagonal

__all__ = [
    "BlockInfo",
    "Dense",
    "DenseBasis",
    "Diagonal",
    "Eigen",
    "Fisher",
    "Info",
    "Inverse",
    "Kronecker",
    "KroneckerBasis",
    "KroneckerSum",
    "Operator",
    "Pair",
    "Prototyped",
    "Report",
    "Total",
    "Tridiagonal",
    "load",
]
