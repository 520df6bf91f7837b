"""The results of a race: tables for people, JSON for programs. Medians over seeds everywhere."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from kronfisher.experiments.race.result import Result, read
from kronfisher.tables import Table, count, duration, number, significant

__all__ = ["Standings", "collect"]

CLOCKS = ("seconds", "cpu_seconds", "step")


@dataclass(frozen=True)
class Standings:
    """The results of one problem, by competitor.

    Attributes:
        problem: its name.
        results: competitor → its runs, one per seed.
        baselines: the names of those to be beaten.
        target: a training loss; None takes the lowest that a baseline reached (the median of its seeds).
    """

    problem: str
    results: Mapping[str, tuple[Result, ...]]
    baselines: tuple[str, ...]
    target: float | None = None

    @property
    def goal(self) -> float:
        """The training loss that the times are measured to; NaN if there is no baseline."""
        if self.target is not None:
            return self.target
        return min((self.best(name, "train_loss") for name in self.results if name in self.baselines), default=math.nan)

    def best(self, name: str, what: str) -> float:
        """The best value that a competitor reached, at any time."""
        return self._median(name, lambda result: result.best(what))

    def reach(self, name: str, what: str, target: float, clock: str) -> float:
        """When a competitor was as good as `target`; a run that never was counts as infinite."""
        when = self._median(name, lambda result: _or(result.reach(what, target, clock), math.inf))
        return when if math.isfinite(when) else math.nan

    def last(self, name: str, what: str) -> float:
        """The value at the end of the runs."""
        return self._median(name, lambda result: result.points[-1][what])

    def extra(self) -> str:
        """The quantity that is evaluated beside the loss: "accuracy" or "error"."""
        point = next(iter(self.results.values()))[0].points[-1]
        return "accuracy" if "test_accuracy" in point else "error"

    def tables(self) -> list[Table]:
        """The final values of every optimiser, and its times against each baseline."""
        return [self._overview(), *([self._duels()] if self._pairs() else [])]

    def _overview(self) -> Table:
        extra, any_run = self.extra(), next(iter(self.results.values()))[0]
        threads = any_run.plan.threads
        title = f"{self.problem}: medians of {max(map(len, self.results.values()))} seeds, {threads} threads"
        header = ("train loss", f"train {extra}", "test loss", f"test {extra}", "steps", "ms/step", "CPU/wall")
        goal = f"to loss {significant(self.goal)}"
        table = Table(title, ("optimizer", *header, f"time {goal}", f"steps {goal}"))
        for name, results in self.results.items():
            steps, seconds = self.last(name, "step"), self.last(name, "seconds")
            when = [self.reach(name, "train_loss", self.goal, clock) for clock in ("seconds", "step")]
            tests = [
                self._median(name, lambda result, what=what: result.test.get(what, math.nan))
                for what in ("test_loss", f"test_{extra}")
            ]
            table.add(
                name + ("" if not any(result.failure for result in results) else " (failed)"),
                *(significant(self.last(name, what)) for what in ("train_loss", f"train_{extra}")),
                *map(significant, tests),
                count(steps),
                number(1e3 * seconds / steps if steps else math.nan, 1),
                number(self.last(name, "cpu_seconds") / seconds if seconds else math.nan, 2),
                duration(when[0]),
                count(when[1]),
            )
        return table

    def _pairs(self) -> list[tuple[str, str]]:
        ours = [name for name in self.results if name not in self.baselines]
        return [(name, other) for name in ours for other in self.results if other in self.baselines]

    def duels(self) -> list[dict[str, Any]]:
        """Each of ours against each baseline: when it was as good as the baseline ever was, over the baseline's own."""
        duels = []
        for name, other in self._pairs():
            duel: dict[str, Any] = {"optimizer": name, "baseline": other}
            for what in ("train_loss", "test_accuracy") if self.extra() == "accuracy" else ("train_loss", "test_error"):
                target = self.best(other, what)
                duel[what] = {"target": target}
                for clock in CLOCKS:
                    mine, theirs = (self.reach(each, what, target, clock) for each in (name, other))
                    theirs = _or(theirs, self.last(other, clock))  # the medians of its runs may miss their own median
                    duel[what][clock] = {"ours": mine, "theirs": theirs, "ratio": mine / theirs if theirs else math.nan}
            duels.append(duel)
        return duels

    def _duels(self) -> Table:
        extra = "test accuracy" if self.extra() == "accuracy" else "test error"
        title = "Time and steps to the best that each baseline reached, as a share of the baseline's own"
        header = ("loss", "time", "share", "of CPU time", "steps", "share", extra, "time", "share", "of CPU time")
        table = Table(title, ("optimizer", "baseline", *header), text=2)
        for duel in self.duels():
            loss, other = (duel[what] for what in duel if what not in ("optimizer", "baseline"))
            table.add(
                duel["optimizer"],
                duel["baseline"],
                significant(loss["target"]),
                duration(loss["seconds"]["ours"]),
                number(loss["seconds"]["ratio"], 2),
                number(loss["cpu_seconds"]["ratio"], 2),
                count(loss["step"]["ours"]),
                number(loss["step"]["ratio"], 2),
                significant(other["target"]),
                duration(other["seconds"]["ours"]),
                number(other["seconds"]["ratio"], 2),
                number(other["cpu_seconds"]["ratio"], 2),
            )
        return table

    def notes(self) -> list[str]:
        """Settings that raced, failures, and a warning if the machine was busy."""
        lines = []
        for name, results in self.results.items():
            lines.append(f"{name}: {', '.join(f'{key} {value}' for key, value in results[0].plan.settings.items())}")
            lines += [f"{name}, seed {result.plan.seed}: {result.failure}" for result in results if result.failure]
            lines += [f"{name}, seed {r.plan.seed}: not finished" for r in results if not r.finished]
            for r in results:
                if r.warnings:
                    lines.append(f"{name}, seed {r.plan.seed}: {len(r.warnings)} warnings, the first: {r.warnings[0]}")
            different = {str(dict(result.plan.settings)) for result in results}
            if len(different) > 1:
                lines.append(f"{name}: the settings differ between its runs: {'; '.join(sorted(different))}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """The tables' numbers, and every run."""
        summary = {
            name: {
                "settings": dict(results[0].plan.settings),
                "seeds": [result.plan.seed for result in results],
                "baseline": name in self.baselines,
                "steps": self.last(name, "step"),
                "seconds": self.last(name, "seconds"),
                "cpu_seconds": self.last(name, "cpu_seconds"),
                "last": {what: self.last(name, what) for what in self._quantities()},
                "best": {what: self.best(name, what) for what in self._quantities()},
                "seconds_to_target": self.reach(name, "train_loss", self.goal, "seconds"),
                "steps_to_target": self.reach(name, "train_loss", self.goal, "step"),
            }
            for name, results in self.results.items()
        }
        runs = [result.to_json() for results in self.results.values() for result in results]
        whole = {"problem": self.problem, "target": self.goal, "optimizers": summary, "duels": self.duels()}
        return whole | {"runs": runs}

    def __str__(self) -> str:
        return "\n\n".join([*map(str, self.tables()), "\n".join(self.notes())])

    def _quantities(self) -> list[str]:
        point = next(iter(self.results.values()))[0].points[-1]
        return [what for what in point if what.startswith(("train_", "test_"))]

    def _median(self, name: str, value: Callable[[Result], float]) -> float:
        values = [value(result) for result in self.results[name]]
        return math.nan if any(map(math.isnan, values)) else median(values)


def collect(
    folder: Path, problem: str, names: tuple[str, ...], baselines: tuple[str, ...], target: float | None = None
) -> Standings:
    """The standings of what the folder of a race holds, by these and any other competitors.

    Where runs of one competitor and seed were made with different settings or budgets, the newest one counts.

    Raises:
        ValueError: there is no run.
    """
    newest: dict[tuple[str, int], Result] = {}
    for path in sorted((folder / "runs").glob("*.json"), key=lambda path: path.stat().st_mtime):
        result = read(path)
        newest[result.plan.competitor, result.plan.seed] = result
    if not newest:
        raise ValueError(f"{folder / 'runs'} has no results yet")
    order = dict.fromkeys((*names, *sorted({name for name, _ in newest})))
    results = {name: tuple(newest[key] for key in sorted(newest) if key[0] == name) for name in order}
    return Standings(problem, {name: each for name, each in results.items() if each}, baselines, target)


def _or(value: float, other: float) -> float:
    return other if math.isnan(value) else value
