"""The settings of a baseline on a problem: rate, then batch, each judged by the training loss of one short run."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kronfisher.experiments.race.suite.contestants import BASELINES
from kronfisher.experiments.race.suite.plan import Plan
from kronfisher.experiments.race.suite.problem import Loaded
from kronfisher.experiments.race.suite.run import carry_out

__all__ = ["LARGER", "searched", "tune"]

LARGER = 4
"""The baselines' second batch over the first."""

LONGEST = 8
"""Runs of a search over rates, at most."""


def searched(name: str, problem: str) -> dict[str, Any] | None:
    """The "lr" and "batch" that `tune` found for a baseline of a problem, once; None for others."""
    return json.loads(Path(__file__).with_name("searched.json").read_text()).get(problem, {}).get(name)


def tune(name: str, loaded: Loaded, seconds: float, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The best learning rate and batch of a baseline, with a seed that no other run has.

    The rates of the grid are tried with the first batch, then neighbours by a factor of about three until the best has
    worse ones on both sides. The second batch, `LARGER` times the first, is tried with the best rate, and with the
    next higher ones while that is better.

    Args:
        name: of the baseline.
        loaded: the problem.
        seconds: CPU time of a run.
        folder: of the runs; the outcome is in ``tuned/<problem>-<name>.json``.
        say: called with a line for every run.

    Returns:
        "lr", "batch", and "tried": [batch, rate, training loss] of every run.
    """
    path = folder / "tuned" / f"{loaded.problem.name}-{name}-{seconds:g}s.json"
    if path.exists():
        return json.loads(path.read_text())
    scores: dict[tuple[int, float], float] = {}

    def score(batch: int, rate: float) -> float:
        if (batch, rate) not in scores:
            plan = Plan(loaded.problem.name, f"tune-{name}", name, {"lr": rate}, batch, SEED, seconds, brief=True)
            scores[batch, rate] = carry_out(plan, loaded, folder).value("train_loss")
            say(f"{loaded.problem.name}: {name}, batch {batch}, rate {rate:g}: {scores[batch, rate]:.4g}")
        return scores[batch, rate]

    batch = loaded.batch
    for rate in BASELINES[name]:
        score(batch, rate)
    best = _climb(score, batch, min(BASELINES[name], key=lambda rate: scores[batch, rate]))
    larger = min(LARGER * batch, loaded.size)
    if larger > batch and score(larger, best) < scores[batch, best]:
        batch, best = larger, _climb(score, larger, best, down=False)
    outcome = {"lr": best, "batch": batch, "tried": [[*key, value] for key, value in scores.items()]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(outcome))
    return outcome


SEED = 1_000


def _climb(score: Callable[[int, float], float], batch: int, best: float, *, down: bool = True) -> float:
    """From a rate to better neighbours, until both are worse."""
    for _ in range(LONGEST):
        neighbours = [_next(best, up) for up in ((False, True) if down else (True,))]
        better = min(neighbours, key=lambda rate: score(batch, rate))
        if not score(batch, better) < score(batch, best):
            return best
        best = better
    return best


def _next(rate: float, up: bool) -> float:
    """The next of 1, 3, 10, 30, … times a power of ten.

    Example:
        >>> _next(1e-3, True), _next(3e-3, True), _next(1e-3, False)
        (0.003, 0.01, 0.0003)
    """
    exponent = math.floor(math.log10(rate) + 1e-9)
    first = round(rate / 10**exponent) == 1
    digit, power = (
        ((3, exponent) if first else (1, exponent + 1)) if up else ((3, exponent - 1) if first else (1, exponent))
    )
    return float(f"{digit}e{power}")
