"""The suite: many problems of many kinds, short runs by the CPU clock, and tuned baselines."""

from kronfisher.experiments.race.suite import problems  # noqa: F401 (they register)
from kronfisher.experiments.race.suite.lot import HALVES, half
from kronfisher.experiments.race.suite.problem import PROBLEMS, Problem

__all__ = ["HALVES", "PROBLEMS", "Problem", "half"]
