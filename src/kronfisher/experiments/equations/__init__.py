"""Differential equations that networks learn to solve, for races of optimisers on their residuals."""

from kronfisher.experiments.equations.equation import Equation
from kronfisher.experiments.equations.intervals import Intervals, intervals
from kronfisher.experiments.equations.problems import EQUATIONS
from kronfisher.experiments.equations.race import Curves, race

__all__ = ["EQUATIONS", "Curves", "Equation", "Intervals", "intervals", "race"]
