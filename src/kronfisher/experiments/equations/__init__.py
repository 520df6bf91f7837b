"""Differential equations that networks learn to solve, for races of optimisers on their residuals."""

from kronfisher.experiments.equations.problems import EQUATIONS, Equation
from kronfisher.experiments.equations.race import Curves, race

__all__ = ["EQUATIONS", "Curves", "Equation", "race"]
