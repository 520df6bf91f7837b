"""A whole race: search the baselines' settings, run every optimiser with every seed, keep all of it in one folder."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kronfisher.experiments.race.competitors import Competitor
from kronfisher.experiments.race.problems import Problem, Task
from kronfisher.experiments.race.result import Plan, Progress, Result
from kronfisher.experiments.race.run import run
from kronfisher.experiments.race.search import Search
from kronfisher.experiments.race.standings import Standings, collect

__all__ = ["Race"]

RATES = ("lr", "damping")


@dataclass(frozen=True)
class Race:
    """The settings of a race, and where its files are.

    The folder has ``runs/*.json`` with one file per run, ``search/<name>/*.json`` with the runs of a search, and
    ``search/<name>.json`` with what was tried and what won. All of it may be there already: what is finished is taken,
    what was interrupted continues. Several processes may work on one folder, with different competitors or, once the
    searches are done, different seeds.

    Attributes:
        problem: what is raced on.
        competitors: who races.
        folder: of the files.
        seeds: of the runs; the searches have the first.
        seconds: training time of a run; None where only `steps` counts.
        steps: at most so many.
        search: "all" settings that a competitor lets be searched, its learning "rates" only, or "none".
        threads: of torch.
        device: of torch.
        clocks: what the figures have on their axes.

    Raises:
        ValueError: a setting is not possible.
    """

    problem: Problem
    competitors: Mapping[str, Competitor]
    folder: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    seconds: float | None = None
    steps: int | None = None
    search: Literal["all", "rates", "none"] = "all"
    threads: int = 1
    device: str = "cpu"
    clocks: tuple[str, ...] = ("seconds", "cpu_seconds", "step")

    def __post_init__(self) -> None:
        """Refuse what cannot be run before anything is loaded."""
        if not self.competitors or not self.seeds:
            raise ValueError("a race needs at least one optimizer and one seed")
        if min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {list(self.seeds)}: they must be different numbers from 0 on")
        if self.seconds is None and self.steps is None:
            raise ValueError("a race needs a budget, of seconds or of steps")
        if not all(limit > 0 for limit in (self.seconds, self.steps, self.threads) if limit is not None):
            raise ValueError("budget, steps and threads must be positive")
        if self.search not in ("all", "rates", "none"):
            raise ValueError(f"search is {self.search!r}; it is all, rates or none")
        for name, competitor in self.competitors.items():
            if competitor.follows and competitor.follows not in self.competitors:
                raise ValueError(f"{name} takes its settings from {competitor.follows}, which must race too")

    def go(
        self, task: Task, say: Callable[[str], None] = lambda text: None, progress: Progress | None = None
    ) -> list[Result]:
        """Run everything that is not there yet; the results of this race, seed by seed.

        Seeds are the outer loop, so that an interrupted race has the first runs of every optimiser.
        """
        before, flushed = torch.get_num_threads(), _flushes()
        torch.set_num_threads(self.threads)
        # Averages of gradients that have become zero for good, as Adam's of dead units, fade to numbers so small that a
        # processor takes many times as long for them.
        torch.set_flush_denormal(True)
        try:
            chosen, results = self._settle(task, say, progress), []
            for seed in self.seeds:
                for name, (settings, horizon) in chosen.items():
                    plan = self.plan(name, settings, seed, horizon)
                    results.append(run(plan, task, self.competitors[name], self.folder / "runs", progress))
                    say(f"{name}, seed {seed}: {results[-1]}")
            return results
        finally:
            torch.set_num_threads(before)
            torch.set_flush_denormal(flushed)

    def plan(self, name: str, settings: Mapping[str, Any], seed: int, horizon: int, part: float = 1.0) -> Plan:
        """The plan of one run with a part of the budget."""
        steps = None if self.steps is None else max(1, round(part * self.steps))
        seconds = None if self.seconds is None else part * self.seconds
        problem = asdict(self.problem)
        return Plan(problem, name, dict(settings), seed, seconds, steps, horizon, self.threads, self.device)

    def standings(self, target: float | None = None) -> Standings:
        """The results in the folder so far, of these and any other competitors.

        Raises:
            ValueError: it holds nothing.
        """
        baselines = [name for name, each in self.competitors.items() if each.baseline]
        return collect(self.folder, self.problem.name, tuple(self.competitors), tuple(baselines), target)

    def _settle(
        self, task: Task, say: Callable[[str], None], progress: Progress | None
    ) -> dict[str, tuple[dict[str, Any], int]]:
        """The settings of every competitor, and the horizons of their schedules."""
        chosen = {}
        for name in sorted(self.competitors, key=lambda name: bool(self.competitors[name].follows)):
            competitor = self.competitors[name]
            settings = dict(competitor.settings)
            if competitor.follows:
                leader = self.competitors[competitor.follows]
                settings |= {axis: chosen[leader.name][0][axis] for axis in leader.axes}
            axes = {
                axis: values
                for axis, values in competitor.axes.items()
                if self.search == "all" or (self.search == "rates" and axis in RATES)
            }
            search = Search(competitor, axes, self.folder / "search", self.plan, self.seeds[0], say)
            chosen[name] = search.settle(settings, task, progress)
        return {name: chosen[name] for name in self.competitors}


def _flushes() -> bool:
    """Whether this processor takes subnormal numbers for zero."""
    return float(torch.tensor(1e-310, dtype=torch.float64) * 1) == 0
