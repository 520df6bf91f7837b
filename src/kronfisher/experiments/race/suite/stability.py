"""Whether ours can be left alone: short runs at every batch size, none of which may end above its start."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kronfisher.experiments.race.suite.contestants import OURS
from kronfisher.experiments.race.suite.plan import Plan
from kronfisher.experiments.race.suite.problem import PROBLEMS, Loaded, require
from kronfisher.experiments.race.suite.run import Run, carry_out
from kronfisher.tables import Table, significant

__all__ = ["BATCHES", "Stability", "Starts"]

BATCHES = (8, 32, 128, 512)
WHOLE = ("tabular regression", "tabular classification with embeddings", "an image as a function of coordinates")
"""Families that are also given all data at once."""


@dataclass(frozen=True)
class Stability:
    """The settings, and where the files are.

    Attributes:
        problems: names, of `PROBLEMS`.
        folder: of all files; what it has is not done again.
        seconds: CPU time of a run.
        seeds: of the runs.
        name: what the runs are called.
        settings: of `NaturalGradient`.
        again: make the runs again.
        data_dir: folder of the data sets' files.
    """

    problems: tuple[str, ...]
    folder: Path
    seconds: float = 3.0
    seeds: tuple[int, ...] = (0, 1, 2)
    name: str = "natural"
    settings: Mapping[str, Any] = field(default_factory=dict)
    again: bool = False
    data_dir: Path | None = None

    def check(self) -> None:
        """ValueError if a setting is not possible."""
        require(self.problems, self.seeds, self.seconds)

    def go(self, say: Callable[[str], None] = lambda text: None) -> "Starts":
        """Run what is not there yet; start and end of all."""
        runs: list[Run] = []
        for name in self.problems:
            loaded = PROBLEMS[name].load(self.data_dir, self.folder)
            for plan in self.plans(loaded):
                run = carry_out(plan, loaded, self.folder, again=self.again)
                what, end = f"{name}: batch {plan.batch}, seed {plan.seed}", run.failure or _end(run)
                say(f"{what}, {run.steps:,} steps: {significant(run.start)} → {end}")
                runs.append(run)
        return Starts(tuple(runs))

    def plans(self, loaded: Loaded) -> Iterator[Plan]:
        """Every batch that is not larger than the data, with every seed."""
        whole = [loaded.size] if loaded.problem.family in WHOLE else []
        for batch in dict.fromkeys([*(size for size in BATCHES if size <= loaded.size), *whole]):
            for seed in self.seeds:
                name, settings = f"{self.name}-stability", dict(self.settings)
                yield Plan(loaded.problem.name, name, OURS, settings, batch, seed, self.seconds, brief=True)


@dataclass(frozen=True)
class Starts:
    """Runs, of which only start and end count."""

    runs: tuple[Run, ...]

    @property
    def worse(self) -> list[Run]:
        """Those that end above their start, or not finite."""
        return [run for run in self.runs if not run.value("train_loss") <= run.start]

    def tables(self) -> list[Table]:
        """A line for each problem and batch: the start and every seed's end."""
        seeds = list(dict.fromkeys(run.plan.seed for run in self.runs))
        header = ("problem", "batch", "steps", *(part for seed in seeds for part in (f"start, seed {seed}", "end")))
        table = Table("Training loss before the first and after the last step", header)
        rows: dict[tuple[str, int], dict[int, Run]] = {}
        for run in self.runs:
            rows.setdefault((run.plan.problem, run.plan.batch), {})[run.plan.seed] = run
        for (problem, batch), by_seed in rows.items():
            cells = []
            for seed in seeds:
                run = by_seed.get(seed)
                cells += ["", ""] if run is None else [significant(run.start), _end(run)]
            table.add(problem, f"{batch:,}", f"{min(run.steps for run in by_seed.values()):,}", *cells)
        return [table]

    def notes(self) -> list[str]:
        """How many are worse, and what failed."""
        lines = [f"{len(self.worse)} of {len(self.runs)} runs end above their start or not finite"]
        for run in self.worse:
            plan = run.plan
            why = run.failure or "above its start"
            lines.append(f"{plan.problem}, batch {plan.batch}, seed {plan.seed}: {why}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Every run."""
        return {
            "worse": len(self.worse),
            "runs": [
                {
                    "problem": r.plan.problem,
                    "batch": r.plan.batch,
                    "seed": r.plan.seed,
                    "steps": r.steps,
                    "start": r.start,
                    "end": r.value("train_loss"),
                    "failure": r.failure,
                }
                for r in self.runs
            ],
        }

    def __str__(self) -> str:
        return "\n\n".join([*map(str, self.tables()), "\n".join(self.notes())])


def _end(run: Run) -> str:
    end = run.value("train_loss")
    return significant(end) + ("" if end <= run.start else " !") if math.isfinite(end) else "not finite !"
