"""The settings of an optimiser: searched on one seed with a part of the budget, one setting after another."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kronfisher.experiments.race.competitors import Competitor
from kronfisher.experiments.race.problems import Task
from kronfisher.experiments.race.result import Plan, Progress, Result, write
from kronfisher.experiments.race.run import calibrate, run

__all__ = ["Search", "walk"]

PART = 0.25  # of the budget, for each run
CALIBRATION = 0.02  # of the budget, to see how long a step takes where a schedule needs to know
FREE = ("lr", "momentum", "schedule", "weight_decay")  # settings that do not change how long a step takes


@dataclass
class Search:
    """The search of one competitor, and its file ``<name>.json`` in the folder of searches.

    The file has every run tried with its score (the lowest training loss), how long steps take, and the winner. A
    search that was interrupted continues; one that was made under other conditions is made again.

    Attributes:
        competitor: whose.
        axes: setting → values in order; none for no search.
        folder: of all searches.
        plan: makes the plan of a run from name, settings, seed, horizon and part of the budget.
        seed: of its runs.
        say: called with a line of text for every run.
    """

    competitor: Competitor
    axes: Mapping[str, tuple[Any, ...]]
    folder: Path
    plan: Callable[..., Plan]
    seed: int
    say: Callable[[str], None] = lambda text: None

    def settle(
        self, settings: Mapping[str, Any], task: Task, progress: Progress | None = None
    ) -> tuple[dict[str, Any], int]:
        """The settings to race with and the horizon of their schedule: from the file, or searched now.

        Args:
            settings: where the search begins, or what is taken without one.
            task: to run on.
            progress: see `Progress`.
        """
        name, axes = self.competitor.name, self.axes
        path = self.folder / f"{name}.json"
        whole = self.plan(name, settings, self.seed, 0)
        basis = {"axes": {axis: list(values) for axis, values in axes.items()}, "conditions": whole.to_json()}
        record = json.loads(path.read_text()) if path.exists() else {}
        if record.get("basis") != basis:
            record = {"basis": basis, "seconds_per_step": {}, "tried": []}
        if "winner" in record:
            return record["winner"], record["horizon"]
        results: dict[str, Result] = {}

        def horizon(trial: Mapping[str, Any], part: float) -> int:
            plan = self.plan(name, trial, self.seed, 0, part)
            if trial.get("schedule", "constant") == "constant" or plan.seconds is None:
                return plan.steps or 0
            key = json.dumps({key: value for key, value in trial.items() if key not in FREE}, sort_keys=True)
            speeds = record["seconds_per_step"]
            if key not in speeds:
                speeds[key] = calibrate(plan, task, self.competitor, CALIBRATION * plan.seconds / part)
                write(path, record)
            return max(1, min(round(plan.seconds / speeds[key]), plan.steps or 10**12))

        def score(trial: dict[str, Any]) -> float:
            plan = self.plan(name, trial, self.seed, horizon(trial, PART), PART)
            result = results[repr(trial)] = run(plan, task, self.competitor, self.folder / name, progress)
            entry = {"settings": trial, "score": result.score, "failure": result.failure, "run": plan.key}
            if plan.key not in [each["run"] for each in record["tried"]]:
                record["tried"].append(entry)
            write(path, record)
            self.say(f"  {name} { ({axis: trial[axis] for axis in axes}) }: {result}")
            return result.score

        if axes:
            self.say(f"{name}: searching {', '.join(axes)} with {PART:.0%} of the budget a run")
        winner = walk(settings, axes, score)
        steps = results[repr(winner)].points[-1]["step"] / PART if axes else 0
        record |= {"winner": winner, "horizon": round(steps) or horizon(winner, 1.0)}
        if whole.seconds is None:
            record["horizon"] = whole.steps
        write(path, record)
        if axes:
            self.say(f"{name}: the winner is {winner}")
        return winner, record["horizon"]


def walk(
    settings: Mapping[str, Any], axes: Mapping[str, tuple[Any, ...]], score: Callable[[dict[str, Any]], float]
) -> dict[str, Any]:
    """The settings of the lowest score that a walk along the axes finds.

    Along an axis it goes from the value it stands at to a better neighbour, and on until a step makes it worse, so that
    the best value has a worse one on either side or lies at an end of the axis. Where the start itself fails (its score
    is infinite), it goes down. The axes come one after another, once.

    Args:
        settings: where to begin.
        axes: setting → values in order; the walk begins at the one in `settings`.
        score: lower is better; asked once for the same settings.

    Raises:
        ValueError: the walk would begin beside an axis.

    Example:
        >>> tried = []
        >>> def score(settings):
        ...     tried.append(settings["lr"])
        ...     return abs(settings["lr"] - 8)
        >>> walk({"lr": 4}, {"lr": (1, 2, 4, 8, 16, 32)}, score)
        {'lr': 8}
        >>> tried
        [4, 2, 8, 16]
    """
    best, known = dict(settings), {}
    for axis, values in axes.items():
        if best.get(axis) not in values:
            raise ValueError(f"{axis} begins at {best.get(axis)!r}, which is none of {', '.join(map(repr, values))}")

        def at(k: int, axis: str = axis, values: tuple[Any, ...] = values) -> float:
            trial = {**best, axis: values[k]}
            key = repr(sorted(trial.items()))
            if key not in known:
                known[key] = score(trial)
            return known[key]

        best[axis] = values[list(_places(values.index(best[axis]), len(values), at))[-1]]
    return best


def _places(here: int, length: int, score: Callable[[int], float]) -> Iterator[int]:
    """The places of ever lower scores, downwards or, if that is not better, upwards."""
    start, lowest = here, score(here)
    yield here
    for direction in (-1, 1):
        while 0 <= here + direction < length:
            value = score(here + direction)
            if not (value < lowest or (math.isinf(lowest) and direction < 0)):
                break
            here, lowest = here + direction, value
            yield here
        if here < start:
            return
