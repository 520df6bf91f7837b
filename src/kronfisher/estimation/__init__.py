"""Passes over data: the Fisher matrix of a model, its error, its spectrum, and what an estimate would cover."""

from kronfisher.estimation.compare import Comparison, compare
from kronfisher.estimation.coverage import Coverage, coverage
from kronfisher.estimation.error import Distance
from kronfisher.estimation.estimate import estimate

__all__ = ["Comparison", "Coverage", "Distance", "compare", "coverage", "estimate"]
