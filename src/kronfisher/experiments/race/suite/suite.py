"""The whole suite: tune the baselines, run everything with every seed, keep all of it in one folder."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kronfisher.experiments.race.suite.batch import our_batch
from kronfisher.experiments.race.suite.contestants import BASELINES, OURS
from kronfisher.experiments.race.suite.plan import Plan
from kronfisher.experiments.race.suite.problem import PROBLEMS, Loaded, require
from kronfisher.experiments.race.suite.run import Run, carry_out
from kronfisher.experiments.race.suite.table import Results
from kronfisher.experiments.race.suite.tune import searched, tune

__all__ = ["HORIZON", "Suite"]

HORIZON = "-horizon"
"""What the name of a run has at its end if the optimiser was told the number of steps."""


@dataclass(frozen=True)
class Suite:
    """The settings of a suite, and where its files are.

    Attributes:
        problems: names, of `PROBLEMS`.
        folder: of all files; what it has is not done again.
        seconds: CPU time of a run.
        tuning: CPU time of a run of the baselines' searches.
        search: search the baselines' settings anew; otherwise those that an earlier search found are taken.
        seeds: of the runs; the searches have another.
        ours: name → settings of `NaturalGradient`.
        factor: our batch over the baselines' first, at most all data; None: by the rule of `our_batch`.
        baselines: names of the baselines to be run.
        horizon: run ours also with the number of steps known beforehand.
        again: make the runs again; searches are kept.
        only: of ours, `results` are those of `ours` alone.
        data_dir: folder of the data sets' files.
    """

    problems: tuple[str, ...]
    folder: Path
    seconds: float = 10.0
    tuning: float = 4.0
    search: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)
    ours: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"natural": {}})
    factor: float | None = None
    baselines: tuple[str, ...] = tuple(BASELINES)
    horizon: bool = True
    again: bool = False
    only: bool = False
    data_dir: Path | None = None

    def check(self) -> None:
        """ValueError if a setting is not possible."""
        require(self.problems, self.seeds, self.seconds, self.tuning, *([] if self.factor is None else [self.factor]))
        if odd := [name for name in self.baselines if name not in BASELINES]:
            raise ValueError(f"there is no baseline {odd[0]!r} in the suite; there are {', '.join(BASELINES)}")
        if taken := {*self.ours} & {*BASELINES}:
            raise ValueError(f"options: {min(taken)} is the name of a baseline")

    def go(self, say: Callable[[str], None] = lambda text: None) -> Results:
        """Run what is not there yet, the first seed of every problem before the second; then `results`."""
        for seed in self.seeds:
            for name in self.problems:
                loaded = PROBLEMS[name].load(self.data_dir, self.folder)
                for run in self._runs(loaded, seed, say):
                    _tell(run, say)
        return self.results()

    def results(self) -> Results:
        """What the folder has of these problems with this budget; of runs that differ in nothing else, the newest.

        Raises:
            ValueError: it has nothing.
        """
        wanted = {*BASELINES, *self.ours, *(name + HORIZON for name in self.ours)}
        newest: dict[tuple[str, str, int], Run] = {}
        for problem in self.problems:
            paths = (self.folder / "runs" / problem).glob("*.json")
            for path in sorted(paths, key=lambda path: path.stat().st_mtime):
                run = Run.read(path)
                named = not self.only or run.plan.name in wanted
                if named and run.plan.seconds == self.seconds and not run.plan.brief:
                    newest[problem, run.plan.name, run.plan.seed] = run
        if not newest:
            raise ValueError(f"{self.folder / 'runs'} has no results of {self.seconds:g} seconds yet")
        return Results(tuple(newest.values()), self.seconds)

    def _runs(self, loaded: Loaded, seed: int, say: Callable[[str], None]) -> Iterator[Run]:
        for baseline in self.baselines:
            known = None if self.search else searched(baseline, loaded.problem.name)
            chosen = known or tune(baseline, loaded, self.tuning, self.folder, say)
            plan = self._plan(loaded, baseline, baseline, {"lr": chosen["lr"]}, chosen["batch"], seed)
            yield carry_out(plan, loaded, self.folder, again=self.again)
        if self.factor is None:
            batch = our_batch(loaded, self.folder) if self.ours else 0
        else:
            batch = max(1, min(round(self.factor * loaded.batch), loaded.size))
        for name, settings in self.ours.items():
            run = carry_out(
                self._plan(loaded, name, OURS, settings, batch, seed), loaded, self.folder, again=self.again
            )
            yield run
            if self.horizon and run.steps:
                plan = self._plan(loaded, name + HORIZON, OURS, settings, batch, seed, horizon=run.steps)
                yield carry_out(plan, loaded, self.folder, again=self.again)

    def _plan(
        self, loaded: Loaded, name: str, base: str, settings: Mapping[str, Any], batch: int, seed: int, horizon: int = 0
    ) -> Plan:
        return Plan(loaded.problem.name, name, base, dict(settings), batch, seed, self.seconds, horizon)


def _tell(run: Run, say: Callable[[str], None]) -> None:
    final = ", ".join(f"{name} {value:.4g}" for name, value in run.final.items())
    outcome = f"{run.failure}; {final}" if run.failure else final
    what = f"{run.plan.problem}: {run.plan.name}, seed {run.plan.seed}, batch {run.plan.batch}"
    say(f"{what}, {run.steps:,} steps: {outcome}")
