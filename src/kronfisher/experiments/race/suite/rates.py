"""Whether the preconditioner can be put before SGD at any rate that suits SGD: where one is finite, so is the other."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kronfisher.experiments.race.suite.plan import Plan
from kronfisher.experiments.race.suite.problem import PROBLEMS, Loaded, require
from kronfisher.experiments.race.suite.run import Run, carry_out
from kronfisher.tables import Table, significant

__all__ = ["RATES", "Pairs", "Rates"]

RATES = (1e-3, 1e-2, 1e-1)
ALONE, AFTER = "sgd", "preconditioner"


@dataclass(frozen=True)
class Rates:
    """The settings, and where the files are.

    Attributes:
        problems: names, of `PROBLEMS`.
        folder: of all files; what it has is not done again.
        seconds: CPU time of a run.
        seeds: of the runs.
        again: make the preconditioner's runs again.
        data_dir: folder of the data sets' files.
    """

    problems: tuple[str, ...]
    folder: Path
    seconds: float = 3.0
    seeds: tuple[int, ...] = (0, 1, 2)
    again: bool = False
    data_dir: Path | None = None

    def check(self) -> None:
        """ValueError if a setting is not possible."""
        require(self.problems, self.seeds, self.seconds)

    def go(self, say: Callable[[str], None] = lambda text: None) -> "Pairs":
        """Run what is not there yet."""
        runs: list[Run] = []
        for name in self.problems:
            loaded = PROBLEMS[name].load(self.data_dir, self.folder)
            for plan in self.plans(loaded):
                run = carry_out(plan, loaded, self.folder, again=self.again and plan.base == AFTER)
                what = f"{name}: {plan.base}, rate {plan.settings['lr']:g}, seed {plan.seed}"
                say(f"{what}, {run.steps:,} steps: {significant(run.start)} → {_end(run)}")
                runs.append(run)
        return Pairs(tuple(runs))

    def plans(self, loaded: Loaded) -> Iterator[Plan]:
        """Every rate and seed, at the baselines' first batch."""
        for rate in RATES:
            for seed in self.seeds:
                for base in (ALONE, AFTER):
                    settings = {"lr": rate}
                    name = f"{base}-rates"
                    yield Plan(loaded.problem.name, name, base, settings, loaded.batch, seed, self.seconds, brief=True)


@dataclass(frozen=True)
class Pairs:
    """Runs of SGD, alone and after the preconditioner."""

    runs: tuple[Run, ...]

    def pairs(self) -> list[tuple[Run, Run]]:
        """SGD alone, and after the preconditioner."""
        by = {(run.plan.problem, run.plan.settings["lr"], run.plan.seed, run.plan.base): run for run in self.runs}
        return [(run, by[*key[:3], AFTER]) for key, run in by.items() if key[3] == ALONE and (*key[:3], AFTER) in by]

    @property
    def worse(self) -> list[Run]:
        """Those after the preconditioner that are not finite where SGD alone is."""
        return [after for alone, after in self.pairs() if not _fails(alone) and _fails(after)]

    def tables(self) -> list[Table]:
        """A line for each run."""
        table = Table("Training loss at the end", ("problem", "rate", "seed", "start", "SGD", "preconditioned"))
        for alone, after in self.pairs():
            plan = alone.plan
            cells = (f"{plan.settings['lr']:g}", str(plan.seed), significant(alone.start), _end(alone), _end(after))
            table.add(plan.problem, *cells)
        return [table]

    def notes(self) -> list[str]:
        """How many are worse, and why."""
        finite = sum(not _fails(alone) for alone, _ in self.pairs())
        lines = [f"{len(self.worse)} of {finite} runs are not finite after the preconditioner where SGD's is"]
        for run in self.worse:
            rate, seed = run.plan.settings["lr"], run.plan.seed
            lines.append(f"{run.plan.problem}, rate {rate:g}, seed {seed}: {run.failure or 'not finite'}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Every run."""
        rows = [
            {**dict(run.plan.settings), "problem": run.plan.problem, "optimizer": run.plan.base, "seed": run.plan.seed}
            | {"start": run.start, "end": run.value("train_loss"), "steps": run.steps, "failure": run.failure}
            for run in self.runs
        ]
        return {"worse": len(self.worse), "runs": rows}

    def __str__(self) -> str:
        return "\n\n".join([*map(str, self.tables()), "\n".join(self.notes())])


def _fails(run: Run) -> bool:
    return run.value("train_loss") == float("inf")


def _end(run: Run) -> str:
    return "not finite" if _fails(run) else significant(run.value("train_loss"))
