"""The results of the suite: a table by problem, and how often ours is better. Medians over seeds everywhere."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

from kronfisher.experiments.race.suite.contestants import BASELINES
from kronfisher.experiments.race.suite.lot import HALVES, half
from kronfisher.experiments.race.suite.run import Run
from kronfisher.tables import Table, count, number, significant

__all__ = ["FIT", "Results", "Verdict"]

FIT = "fit-"
"""Before the names of runs that compare fits."""

REFERENCE = f"{FIT}kfac"

UNEVEN = 1.3
"""So much more wall time than others for the same CPU time is worth a note."""

COUNTED = {
    "below_adamw": "< AdamW",
    "below_all": "< all",
    "loss_adamw": "test loss",
    "loss_all": "of all",
    "metric_adamw": "metric",
    "metric_all": "of all",
    "test_adamw": "either",
    "test_all": "of all",
}
"""What is counted of verdicts → the heading."""


@dataclass(frozen=True)
class Verdict:
    """Ours on one problem.

    Attributes:
        below_adamw: whether the final training loss is lower than AdamW's.
        below_all: than every baseline's.
        share: time to the best baseline's final training loss, over the budget.
        share_adamw: to AdamW's.
        loss_adamw: whether the test loss is no higher than AdamW's.
        loss_all: than any baseline's.
        metric_adamw: whether the test accuracy (or test error) is no worse than AdamW's.
        metric_all: than any baseline's.
    """

    below_adamw: bool
    below_all: bool
    share: float
    share_adamw: float
    loss_adamw: bool
    loss_all: bool
    metric_adamw: bool
    metric_all: bool

    @property
    def test_adamw(self) -> bool:
        """Whether test loss or test metric is no worse than AdamW's."""
        return self.loss_adamw or self.metric_adamw

    @property
    def test_all(self) -> bool:
        """Whether test loss or test metric is no worse than the best baseline's."""
        return self.loss_all or self.metric_all


@dataclass(frozen=True)
class Results:
    """Runs of equal time.

    Attributes:
        runs: in any order.
        seconds: CPU time of each.
    """

    runs: tuple[Run, ...]
    seconds: float

    @cached_property
    def grouped(self) -> dict[str, dict[str, list[Run]]]:
        """Problem → name → runs."""
        groups: dict[str, dict[str, list[Run]]] = {}
        for run in self.runs:
            groups.setdefault(run.plan.problem, {}).setdefault(run.plan.name, []).append(run)
        return groups

    @property
    def names(self) -> tuple[str, ...]:
        """Everybody but the baselines."""
        return tuple(dict.fromkeys(run.plan.name for run in self.runs if run.plan.name not in BASELINES))

    def median(self, problem: str, name: str, value: Callable[[Run], float]) -> float:
        """Of the runs of one name on one problem."""
        return median(value(run) for run in self.grouped[problem][name])

    def verdict(self, problem: str, name: str) -> Verdict | None:
        """Ours against the baselines on one problem; None if one of them is missing."""
        groups = self.grouped[problem]
        if name not in groups or any(baseline not in groups for baseline in BASELINES):
            return None
        metric = "accuracy" if "test_accuracy" in groups[name][0].final else "error"

        def last(who: str, what: str) -> float:
            return self.median(problem, who, lambda run: run.value(what))

        losses = {baseline: last(baseline, "train_loss") for baseline in BASELINES}
        best = min(losses.values())

        def good(what: str, others: list[str]) -> bool:
            sign = -1 if what.endswith("accuracy") else 1
            return sign * last(name, what) <= min(sign * last(other, what) for other in others)

        def share(loss: float) -> float:
            return self.median(problem, name, lambda run: run.reach(loss)) / self.seconds

        mine = last(name, "train_loss")
        tests = [good(what, who) for what in ("test_loss", f"test_{metric}") for who in (["adamw"], [*BASELINES])]
        return Verdict(mine < losses["adamw"], mine < best, share(best), share(losses["adamw"]), *tests)

    def verdicts(self, name: str, which: str = "") -> dict[str, Verdict]:
        """Problem → verdict, of one half or both."""
        verdicts = {problem: self.verdict(problem, name) for problem in half(which) if problem in self.grouped}
        return {problem: verdict for problem, verdict in verdicts.items() if verdict is not None}

    def tables(self) -> list[Table]:
        """Problem by problem, then the counts, then the fits; those that have no rows are left out."""
        return [table for table in (self._problems(), self._counts(), self._fits()) if table.rows]

    def _fits(self) -> Table:
        """Every fit against K-FAC. One that fails, or never gets to K-FAC's loss, needs infinite time."""
        title = "Fits against K-FAC: lower losses at equal time; time and steps to K-FAC's training loss"
        header = ("problems", "train lower", "test lower", "share of time", "of steps", "steps made", "failed")
        table = Table(title, ("fit", *header))
        for name in (name for name in self.names if name.startswith(FIT)):
            problems = [problem for problem in half("") if {name, REFERENCE} <= {*self.grouped.get(problem, {})}]
            duels = [self._duel(problem, name) for problem in problems]
            if not duels:
                continue
            made, seconds, steps = (median(duel[key] for duel in duels) for key in ("made", "seconds", "step"))
            lower = (str(sum(duel[key] for duel in duels)) for key in ("train", "test"))
            failed = sum(bool(run.failure) for problem in problems for run in self.grouped[problem][name])
            cells = (_share(seconds), _share(steps), number(made, 2), str(failed))
            table.add(name.removeprefix(FIT), str(len(problems)), *lower, *cells)
        return table

    def _duel(self, problem: str, name: str) -> dict[str, float]:
        """One fit against K-FAC on one problem; times and steps as shares of K-FAC's."""

        def of(who: str, value: Callable[[Run], float]) -> float:
            return self.median(problem, who, value)

        goal, duel = of(REFERENCE, lambda run: run.value("train_loss")), {}
        for part in ("train", "test"):
            mine, other = (of(who, lambda run, part=part: run.value(f"{part}_loss")) for who in (name, REFERENCE))
            duel[part] = mine < other
        for clock in ("seconds", "step"):
            whole = of(REFERENCE, lambda run, clock=clock: run.points[-1][clock])
            duel[clock] = of(name, lambda run, clock=clock: run.reach(goal, clock)) / whole
        return duel | {"made": of(name, lambda run: run.steps) / of(REFERENCE, lambda run: run.steps)}

    def _problems(self) -> Table:
        title = f"Medians of up to {self._seeds()} seeds after {self.seconds:g} s of CPU time"
        header = ("train loss", "test loss", "test accuracy or error", "steps", "batch", "rate", "share", "of AdamW's")
        table = Table(title, ("problem", "optimizer", *header), text=2)
        for problem in half(""):
            for name, runs in self.grouped.get(problem, {}).items():
                metric = "accuracy" if "test_accuracy" in runs[0].final else "error"
                verdict = None if name in BASELINES else self.verdict(problem, name)
                failed = sum(bool(run.failure) for run in runs)
                table.add(
                    problem,
                    name + (f" ({failed} failed)" if failed else ""),
                    *(
                        significant(self.median(problem, name, lambda run, w=what: run.value(w)))
                        for what in ("train_loss", "test_loss", f"test_{metric}")
                    ),
                    count(self.median(problem, name, lambda run: run.steps)),
                    str(runs[0].plan.batch),
                    f"{runs[0].plan.settings['lr']:g}" if name in BASELINES else "",
                    *(("", "") if verdict is None else (_share(verdict.share), _share(verdict.share_adamw))),
                )
        return table

    def summary(self) -> list[dict[str, Any]]:
        """For each of ours and each half, and both: how many problems, on how many it is better, median shares."""
        rows = []
        for name in self.names:
            for which in (*HALVES, ""):
                if verdicts := list(self.verdicts(name, which).values()):
                    row: dict[str, Any] = {"name": name, "half": which or "both", "problems": len(verdicts)}
                    row |= {what: sum(getattr(verdict, what) for verdict in verdicts) for what in COUNTED}
                    row |= {what: median(getattr(v, what) for v in verdicts) for what in ("share", "share_adamw")}
                    rows.append(row)
        return rows

    def _counts(self) -> Table:
        title = "At equal time: lower training loss than AdamW, than all; test no worse than AdamW's, than the best"
        table = Table(title, ("optimizer", "half", "problems", *COUNTED.values(), "median share", "of AdamW's"), text=2)
        for row in self.summary():
            counts = (str(row[what]) for what in ("problems", *COUNTED))
            table.add(row["name"], row["half"], *counts, _share(row["share"]), _share(row["share_adamw"]))
        return table

    def busy(self) -> dict[str, float]:
        """Name → wall time over CPU time, the median of its runs; one on an idle machine."""
        ratios: dict[str, list[float]] = {}
        for run in self.runs:
            if run.machine.get("wall") and run.points[-1]["seconds"]:
                ratios.setdefault(run.plan.name, []).append(run.machine["wall"] / run.points[-1]["seconds"])
        return {name: median(each) for name, each in ratios.items()}

    def notes(self) -> list[str]:
        """Failures, weights as they are beside those for evaluation, and whether the machine was equally busy."""
        lines = [f"{r.plan.problem}: {r.plan.name}, seed {r.plan.seed}: {r.failure}" for r in self.runs if r.failure]
        busy = self.busy()
        if len(busy) > 1 and max(busy.values()) > UNEVEN * min(busy.values()):
            each = ", ".join(f"{name} {number(value, 1)}" for name, value in busy.items())
            lines.append(f"wall time over CPU time: {each}. Beside other work a run makes fewer steps in the same CPU")
            lines.append("time: compare only runs that were made under the same conditions")
        for problem, groups in self.grouped.items():
            for name, runs in groups.items():
                last, plain = (
                    median(each.get("train_loss", math.nan) for each in every)
                    for every in ([r.final for r in runs], [r.plain for r in runs])
                )
                if name not in BASELINES and not math.isclose(last, plain, rel_tol=1e-3):
                    values = f"training loss {significant(plain)} instead of {significant(last)}"
                    lines.append(f"{problem}: {name} without eval(): {values}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """The counts, and the final values of every run."""
        runs = [
            {
                "problem": r.plan.problem,
                "name": r.plan.name,
                "seed": r.plan.seed,
                "batch": r.plan.batch,
                "settings": dict(r.plan.settings),
                "steps": r.steps,
                "start": r.start,
                "failure": r.failure,
                "final": r.final,
                "plain": r.plain,
            }
            for r in self.runs
        ]
        return {"seconds": self.seconds, "summary": self.summary(), "wall_over_cpu": self.busy(), "runs": runs}

    def __str__(self) -> str:
        return "\n\n".join([*map(str, self.tables()), "\n".join(self.notes())])

    def _seeds(self) -> int:
        return max(len(runs) for groups in self.grouped.values() for runs in groups.values())


def _share(value: float) -> str:
    return number(value, 2) if math.isfinite(value) else "never"
