"""One run: training by the CPU clock of the process, from which evaluations are left out."""

import json
import math
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import torch

from kronfisher.errors import DataError, NumericalError, UnsupportedError
from kronfisher.estimation.documents import replace_nonfinite
from kronfisher.experiments.data import Dataset
from kronfisher.experiments.race.order import Order
from kronfisher.experiments.race.suite.contestants import CONTESTANTS, OURS
from kronfisher.experiments.race.suite.plan import Plan
from kronfisher.experiments.race.suite.problem import Loaded, Problem

__all__ = ["Run", "carry_out"]

SHARES = (0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of the budget: when the training loss is evaluated."""


@dataclass
class Run:
    """The result of a run.

    Attributes:
        plan: what was planned.
        points: one per evaluation: "seconds", "step", "train_loss".
        final: "train_loss", "test_loss" and the same of the problem's metric, at the end.
        plain: the same for the weights as they are, where `final` is of weights for evaluation.
        failure: why it ended early; empty if it did not.
        report: what the optimiser says.
        warnings: the first of those that were raised.
        machine: "wall", seconds of wall time of the training, and "matmul", CPU milliseconds of a product of two
            matrices of 512 rows before it, which is longer on a busy machine.
    """

    plan: Plan
    points: list[dict[str, float]]
    final: dict[str, float]
    plain: dict[str, float]
    failure: str = ""
    report: str = ""
    warnings: tuple[str, ...] = ()
    machine: dict[str, float] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps made."""
        return int(self.points[-1]["step"])

    @property
    def start(self) -> float:
        """Training loss before the first step."""
        return self.points[0]["train_loss"]

    def value(self, what: str) -> float:
        """A value at the end; the worst there is if the run failed."""
        value = self.final.get(what, math.nan)
        worst = 0.0 if what.endswith("accuracy") else math.inf
        return worst if self.failure or not math.isfinite(value) else value

    def reach(self, loss: float, clock: str = "seconds") -> float:
        """When the training loss was first so low, interpolated, by "seconds" or "step"; infinite if it never was."""
        for before, after in zip(self.points, self.points[1:], strict=False):
            if after["train_loss"] <= loss:
                drop = before["train_loss"] - after["train_loss"]
                share = 1.0 if not 0 < drop < math.inf else max(0.0, (before["train_loss"] - loss) / drop)
                return before[clock] + share * (after[clock] - before[clock])
        return math.inf

    def write(self, path: Path) -> None:
        """As JSON, all of it or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.{os.getpid()}")
        new.write_text(json.dumps(replace_nonfinite(asdict(self)), indent=1))
        new.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Run":
        """From JSON."""
        whole = json.loads(path.read_text())
        for point in (*whole["points"], whole["final"], whole["plain"]):
            point |= {key: math.nan if value is None else float(value) for key, value in point.items()}
        return cls(**whole | {"plan": Plan(**whole["plan"]), "warnings": tuple(whole["warnings"])})


def carry_out(plan: Plan, loaded: Loaded, folder: Path, *, again: bool = False) -> Run:
    """Train as planned; what the folder has is not done again, unless `again`.

    Args:
        plan: what to do.
        loaded: its problem.
        folder: for ``runs/<problem>/<key>.json``.
        again: replace an earlier result.
    """
    path = folder / "runs" / plan.problem / f"{plan.key}.json"
    if path.exists() and not again:
        return Run.read(path)
    with torch.random.fork_rng(devices=[]), _one_thread(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _warm_up(plan.base)
        torch.manual_seed(plan.seed)
        matmul = _matmul()
        run = _train(plan, loaded)
    texts = (f"{each.category.__name__}: {each.message}" for each in caught)
    run.warnings = tuple(dict.fromkeys(texts))[:10]
    run.machine["matmul"] = matmul
    run.write(path)
    return run


def _train(plan: Plan, loaded: Loaded) -> Run:
    model, order = loaded.model(plan.seed), Order(loaded.size, plan.seed)
    inputs, targets = loaded.dataset.train_inputs, loaded.dataset.train_targets
    run = Run(plan, [{"seconds": 0.0, "step": 0, "train_loss": loaded.evaluate(model)[0]}], {}, {})
    seconds, wall, step = 0.0, 0.0, 0
    racer = CONTESTANTS[plan.base](model, loaded, plan)
    for share in (1.0,) if plan.brief else SHARES:
        began, began_wall = time.process_time() - seconds, time.perf_counter() - wall
        try:
            while (seconds := time.process_time() - began) < share * plan.seconds:
                if step == plan.horizon and step:
                    break
                rows = order.take(plan.batch)
                loss = racer.step(inputs[rows], targets[rows], _cosine(seconds / plan.seconds))
                step += 1
                if step % 16 == 0 and not math.isfinite(float(loss)):
                    raise NumericalError("the loss is not finite")
        except (NumericalError, UnsupportedError, DataError, ArithmeticError, RuntimeError) as error:
            run.failure = f"step {step + 1}: {type(error).__name__}: {' '.join(str(error).split())}"[:500]
        seconds, wall = time.process_time() - began, time.perf_counter() - began_wall
        with racer.evaluated():
            run.points.append({"seconds": seconds, "step": step, "train_loss": loaded.evaluate(model)[0]})
            if not math.isfinite(run.points[-1]["train_loss"]):
                run.failure = run.failure or f"the loss is not finite after {step} steps"
            last = share == 1.0 or run.failure or (0 < plan.horizon <= step)
            if last:
                run.final = {"train_loss": run.points[-1]["train_loss"]} if plan.brief else _measure(loaded, model)
        if last:
            run.machine["wall"] = wall
            run.plain = _measure(loaded, model) if plan.base == OURS else run.final
            run.report = racer.report()
            break
    return run


def _measure(loaded: Loaded, model: torch.nn.Module) -> dict[str, float]:
    values = {}
    for part in ("train", "test"):
        loss, metric = loaded.evaluate(model, test=part == "test")
        values |= {f"{part}_loss": loss, f"{part}_{loaded.metric}": metric}
    return values


@cache
def _warm_up(base: str) -> None:
    """A step that does not count: what an optimiser imports at its first one is not its own time."""
    x = torch.rand(4, 2)
    dataset = Dataset("warm", x, x, x, x, "values", 2)
    loaded = Loaded(Problem("warm", "", lambda _: dataset, lambda *_: torch.nn.Linear(2, 2)), dataset)
    settings = {} if base == OURS else {"lr": 0.0}
    CONTESTANTS[base](loaded.model(0), loaded, Plan("warm", base, base, settings, 4, 0, 1.0)).step(x, x, 1.0)


def _matmul(size: int = 512, times: int = 10) -> float:
    matrix, began = torch.ones(size, size), time.process_time()
    for _ in range(times):
        matrix.mm(matrix)
    return 1e3 * (time.process_time() - began) / times


def _cosine(share: float) -> float:
    """From one to a hundredth."""
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread, and subnormal numbers are zeros: averages that fade would take a processor many times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_flush_denormal(False)
