"""Races: optimisers side by side on the papers' problems, from the same weights and in the same order of the data."""

from kronfisher.experiments.race import baselines, natural  # noqa: F401 (they register)
from kronfisher.experiments.race.competitors import COMPETITORS, Competitor, register
from kronfisher.experiments.race.problems import PROBLEMS, Problem, Task
from kronfisher.experiments.race.race import Race
from kronfisher.experiments.race.standings import Standings

__all__ = ["COMPETITORS", "PROBLEMS", "Competitor", "Problem", "Race", "Standings", "Task", "register"]
