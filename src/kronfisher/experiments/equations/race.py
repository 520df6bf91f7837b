"""Optimisers side by side on the residuals of an equation: error against seconds of CPU time and against steps."""

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.estimation.documents import replace_nonfinite
from kronfisher.experiments.equations.by_terms import kfac_by_terms
from kronfisher.experiments.equations.equation import Equation
from kronfisher.experiments.equations.intervals import Intervals, intervals
from kronfisher.experiments.equations.inverse import Inverse
from kronfisher.experiments.equations.maps import maps
from kronfisher.experiments.progress import Say, ignore
from kronfisher.likelihoods import Residuals
from kronfisher.optim import NaturalGradient
from kronfisher.tables import Table

__all__ = ["OPTIMIZERS", "Curve", "Curves", "race"]

RATES = tuple((rate, decay) for decay in (1e-3, 1.0) for rate in (1e-2, 3e-3, 1e-3))
"""Of Adam and SOAP: the rate, and what is left of it at the end; searched with a quarter of the time."""
DAMPINGS = (1e-6, 1e-8, 1e-10)  # of K-FAC, likewise
MARKS = 24  # evaluations of a run, at shares of its time that grow by a factor
Step = Callable[[float], float]


@dataclass
class Curve:
    """One run.

    Attributes:
        optimizer: name.
        seed: of weights and points.
        points: (seconds of CPU time, steps, relative error, loss), evaluations not counted.
        setting: what was searched.
    """

    optimizer: str
    seed: int
    points: list[tuple[float, int, float, float]] = field(default_factory=list)
    setting: str = ""

    def error_at(self, seconds: float) -> float:
        """The last error measured by then; NaN before the first."""
        return next((error for spent, _, error, _ in reversed(self.points) if spent <= seconds * 1.02), math.nan)


@dataclass
class Curves:
    """All runs of one equation.

    Attributes:
        equation: what was solved.
        seconds: of CPU time that each run had.
        runs: of all optimisers and seeds.
        networks: optimizer → what it trained with the first seed.
        intervals: of the equation's constants, if it has any.
    """

    equation: Equation
    seconds: float
    runs: list[Curve]
    networks: dict[str, nn.Module] = field(default_factory=dict)
    intervals: Intervals | None = None

    def tables(self) -> list[Table]:
        """Medians over seeds, at a twelfth, a third and all of the time; and intervals."""
        times = [self.seconds / 12, self.seconds / 3, self.seconds]
        title = f"{self.equation.title}: relative L2 error, medians over seeds, seconds of CPU time"
        table = Table(title, ("optimizer", *(f"after {t:.3g} s" for t in times), "steps", "setting"))
        for name in dict.fromkeys(run.optimizer for run in self.runs):
            own = [run for run in self.runs if run.optimizer == name]
            errors = [f"{statistics.median(run.error_at(t) for run in own):.1e}" for t in times]
            table.add(name, *errors, f"{statistics.median(run.points[-1][1] for run in own):.0f}", own[0].setting)
        return [table] if self.intervals is None else [table, self.intervals.table()]

    def notes(self) -> list[str]:
        """None."""
        return []

    def __str__(self) -> str:
        return "\n\n".join(str(table) for table in self.tables())

    def to_json(self) -> str:
        """All curves, and all intervals."""
        found: dict[str, Any] = {"equation": self.equation.name, "seconds": self.seconds}
        found["runs"] = [vars(run) for run in self.runs]
        if self.intervals is not None:
            found["intervals"] = self.intervals.records()
        return json.dumps(replace_nonfinite(found), indent=1)

    def draw(self, folder: Path) -> list[Path]:
        """Error curves, solutions and their errors: ``<name>-seconds.png``, ``-steps.png``, ``-maps.png``."""
        from matplotlib.figure import Figure

        from kronfisher.experiments.figures import OKABE_ITO, write_figures

        def figures() -> Any:
            for clock, place in (("seconds", 0), ("steps", 1)):
                figure = Figure(figsize=(7.5, 4.2), layout="constrained")
                axes = figure.subplots()
                names = list(dict.fromkeys(run.optimizer for run in self.runs))
                for run in self.runs:
                    k = names.index(run.optimizer)
                    first = next(each for each in self.runs if each.optimizer == run.optimizer) is run
                    axes.plot([p[place] for p in run.points], [p[2] for p in run.points], color=OKABE_ITO[6 - k],
                              label=run.optimizer if first else None)  # fmt: skip
                axes.set(xscale="log", yscale="log", ylabel="relative L2 error",
                         xlabel="seconds of CPU time" if place == 0 else "steps")  # fmt: skip
                axes.set_title(self.equation.title)
                axes.legend()
                yield f"{self.equation.name}-{clock}", figure
            yield f"{self.equation.name}-maps", maps(self.equation, self.networks)

        return write_figures(folder, figures)


def race(
    equation: Equation,
    optimizers: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    seconds: float | None = None,
    draws: int = 20,
    say: Say = ignore,
) -> Curves:
    """Train from the same weights with each optimiser; rates, decays and K-FAC's λ are searched with the first seed.

    Where constants are unknown, `draws` sets of observations give their Laplace intervals, and the coverage of these.

    Raises:
        ValueError: there is no such optimiser, or K-FAC cannot train on the equation.
    """
    chosen = tuple(optimizers) or tuple(name for name in OPTIMIZERS if name != "kfac" or equation.propagates)
    if "kfac" in chosen and not equation.propagates:
        raise ValueError(f"kfac propagates derivatives forward, which is not done for {equation.name!r}; leave it out")
    if odd := [name for name in chosen if name not in OPTIMIZERS]:
        raise ValueError(f"there is no optimizer {odd[0]!r} for equations; there are {', '.join(OPTIMIZERS)}")
    curves = Curves(equation, seconds or equation.seconds, [])
    for name in chosen:
        build, settings = OPTIMIZERS[name]
        best = settings[0]
        if len(settings) > 1:
            quarter = curves.seconds / 4
            tried = {each: _run(equation, name, build, each, seeds[0], quarter)[0].points[-1][2] for each in settings}
            best = min(tried, key=lambda each: tried[each] if math.isfinite(tried[each]) else math.inf)
        for seed in seeds:
            run, network = _run(equation, name, build, best, seed, curves.seconds)
            curves.runs.append(run)
            curves.networks.setdefault(name, network)
            say(f"{name}, seed {seed}: error {run.points[-1][2]:.2e} after {run.points[-1][1]} steps {run.setting}")
    if isinstance(equation, Inverse):
        curves.intervals = intervals(equation, draws, say)
    return curves


def _run(equation: Equation, name: str, build: Any, setting: Any, seed: int, budget: float) -> tuple[Curve, nn.Module]:
    network = equation.network(seed)
    likelihood = equation.likelihood()
    step: Step = build(equation, network, likelihood, setting)
    curve = Curve(name, seed, setting=_described(setting))
    marks = [budget * 2 ** (-k / 3) for k in reversed(range(MARKS))]
    spent, steps = 0.0, 0
    while spent < budget:
        began = time.process_time()
        loss = step(spent / budget)
        spent, steps = spent + time.process_time() - began, steps + 1
        if spent >= marks[0] or spent >= budget:
            marks = [mark for mark in marks if mark > spent] or [budget]
            curve.points.append((spent, steps, equation.error(network), loss))
    return curve, network


def _described(setting: Any) -> str:
    match setting:
        case None:
            return ""
        case (rate, decay):
            return f"rate {rate:g}, " + (f"decays to {rate * decay:g}" if decay < 1 else "constant")
        case damping:
            return f"λ {damping:g}"


def _gram(equation: Equation, network: nn.Module, likelihood: Residuals, setting: Any) -> Step:
    optimizer = NaturalGradient(network, likelihood, fit="gram")
    return lambda share: float(optimizer.step(lambda: equation.residuals(network, *equation.draw())))


def _first_order(make: Callable[[Any, float], torch.optim.Optimizer]) -> Any:
    def build(equation: Equation, network: nn.Module, likelihood: Residuals, setting: tuple[float, float]) -> Step:
        rate, decay = setting
        optimizer = make(network.parameters(), rate)

        def step(share: float) -> float:
            for group in optimizer.param_groups:
                group["lr"] = rate * decay ** min(share, 1.0)
            optimizer.zero_grad()
            loss = likelihood.loss(equation.residuals(network, *equation.draw()))
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        return step

    return build


def _soap(parameters: Any, rate: float) -> torch.optim.Optimizer:
    try:
        from pytorch_optimizer import SOAP
    except ImportError as error:
        raise ImportError('SOAP comes from pytorch_optimizer: pip install "kronfisher[race]"') from error
    return SOAP(list(parameters), lr=rate, weight_decay=0.0, precondition_frequency=10)


def _lbfgs(equation: Equation, network: nn.Module, likelihood: Residuals, setting: Any) -> Step:
    points = equation.draw()
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=20, history_size=50, line_search_fn="strong_wolfe",
                                  tolerance_grad=0.0, tolerance_change=0.0)  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = likelihood.loss(equation.residuals(network, *points))
        loss.backward()
        return loss

    return lambda share: float(optimizer.step(closure).detach())


OPTIMIZERS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "gram": (_gram, (None,)),
    "adam": (_first_order(lambda parameters, rate: torch.optim.Adam(parameters, lr=rate)), RATES),
    "lbfgs": (_lbfgs, (None,)),
    "kfac": (kfac_by_terms, DAMPINGS),
    "soap": (_first_order(_soap), RATES),
}
"""Name → what makes its step, and the settings that are searched."""
