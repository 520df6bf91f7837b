"""One run of one optimiser: its plan and its result, as JSON."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from warnings import WarningMessage

from kronfisher.estimation.documents import replace_nonfinite
from kronfisher.tables import duration

__all__ = ["Plan", "Point", "Progress", "Result", "read", "write"]

Point = dict[str, float]
"""One evaluation: "step", "epoch", "seconds" and "cpu_seconds" of training, and the values of `Task.evaluate`."""

Progress = Callable[["Plan", float, float], None]
"""Called with the plan, the share of it that is done, and the last training loss, about twice a second."""


@dataclass(frozen=True)
class Plan:
    """Everything that a run depends on.

    Attributes:
        problem: the settings of the problem.
        competitor: its name.
        settings: its settings.
        seed: of initial weights and of the order of the data.
        seconds: training time; None for no limit.
        steps: at most so many; None for no limit.
        horizon: the steps after which a schedule ends.
        threads: of torch.
        device: of torch.
    """

    problem: Mapping[str, Any]
    competitor: str
    settings: Mapping[str, Any]
    seed: int
    seconds: float | None
    steps: int | None
    horizon: int
    threads: int
    device: str

    @property
    def key(self) -> str:
        """A name for files; another one as soon as anything differs."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.competitor}-seed{self.seed}-{digest}".replace(os.sep, "-")

    def to_json(self) -> dict[str, Any]:
        """The same as JSON gives it back."""
        return json.loads(json.dumps(asdict(self)))

    def factor(self, step: int) -> float:
        """The factor of the learning rate at a step; "cosine" ends at a hundredth.

        Example:
            >>> plan = Plan({}, "sgd", {"schedule": "cosine"}, 0, 1.0, None, horizon=100, threads=1, device="cpu")
            >>> plan.factor(0), round(plan.factor(50), 3), plan.factor(100), plan.factor(200)
            (1.0, 0.505, 0.01, 0.01)
        """
        if self.settings.get("schedule", "constant") == "constant":
            return 1.0
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, self.horizon))))


@dataclass
class Result:
    """The state of a run so far.

    Attributes:
        plan: what was planned.
        points: one per evaluation, the first before the first step.
        test: loss and accuracy or error of all test data at the end.
        finished: whether it is at its end.
        failure: why it ended early, empty if it did not.
        report: what the optimiser says about the run.
        warnings: the first of those that were raised while it trained.
        environment: versions and the machine.
    """

    plan: Plan
    points: list[Point] = field(default_factory=list)
    test: Point = field(default_factory=dict)
    finished: bool = False
    failure: str = ""
    report: str = ""
    warnings: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The lowest training loss; infinite if the run failed."""
        return math.inf if self.failure else self.best("train_loss")

    def __str__(self) -> str:
        last = self.points[-1]
        numbers = f"training loss {last['train_loss']:.4g}, {last['step']:,.0f} steps in {duration(last['seconds'])}"
        return f"{self.failure}; {numbers}" if self.failure else numbers

    def warn(self, caught: Iterable[WarningMessage]) -> None:
        """Keep warnings; a run can raise thousands."""
        texts = [f"{each.category.__name__}: {each.message}" for each in caught]
        self.warnings = list(dict.fromkeys([*self.warnings, *texts]))[:20]

    def best(self, what: str) -> float:
        """The best value of all evaluations: the highest accuracy, the lowest of anything else."""
        values = [point[what] for point in self.points if math.isfinite(point[what])]
        return (max if _higher(what) else min)(values, default=math.nan)

    def reach(self, what: str, target: float, clock: str) -> float:
        """When `what` was first as good as `target`, on the `clock` "seconds", "cpu_seconds" or "step"; NaN for never.

        Between two evaluations the value is taken to change linearly.

        Example:
            >>> points = [{"loss": 3.0, "step": 0}, {"loss": 1.0, "step": 10}]
            >>> Result(None, points).reach("loss", 2.0, "step"), Result(None, points).reach("loss", 0.5, "step")
            (5.0, nan)
        """
        sign = -1.0 if _higher(what) else 1.0
        before: Point | None = None
        for point in self.points:
            if sign * point[what] <= sign * target:
                if before is None or not math.isfinite(before[what]) or before[what] == point[what]:
                    return float(point[clock])
                share = (before[what] - target) / (before[what] - point[what])
                return before[clock] + share * (point[clock] - before[clock])
            before = point
        return math.nan

    def to_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        return {"competitor": self.plan.competitor, **asdict(self)}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Result":
        """The result that a file holds; a null is NaN again."""
        values = {key: value for key, value in content.items() if key not in ("competitor", "plan", "points")}
        points = [{key: math.nan if value is None else value for key, value in p.items()} for p in content["points"]]
        return Result(Plan(**content["plan"]), points, **values)


def read(path: Path) -> Result:
    """The result in a file."""
    return Result.from_json(json.loads(path.read_text()))


def write(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    """JSON, all of it or nothing: a reader never sees half a file, nor does a crash leave one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(json.dumps(replace_nonfinite(content), indent=1, ensure_ascii=False) + "\n")
    new.replace(path)


def _higher(what: str) -> bool:
    return what.endswith("accuracy")
