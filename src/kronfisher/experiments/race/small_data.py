"""Regression on small tables, full batch: the exact matrix of all samples against L-BFGS and AdamW."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.estimation.documents import replace_nonfinite
from kronfisher.experiments import data
from kronfisher.experiments.networks.feedforward import mlp
from kronfisher.experiments.progress import Say, ignore
from kronfisher.likelihoods import Gaussian
from kronfisher.optim import NaturalGradient
from kronfisher.tables import Table

__all__ = ["SETS", "Contest", "Run", "contest"]

SETS = {
    "boston": "bostonHousing",
    "concrete": "concrete",
    "energy": "energy",
    "kin8nm": "kin8nm",
    "naval": "naval-propulsion-plant",
    "power": "power-plant",
    "wine": "wine-quality-red",
    "yacht": "yacht",
}
"""Name in the table → name of the data; the first published split."""
HIDDEN = 50
RATES = (1e-2, 3e-3, 1e-3)  # of AdamW, searched with a quarter of the time of the first seed
SETTLED = 1.01  # a run has reached its last loss where it is within a hundredth of it
Step = Callable[[float], float]


@dataclass
class Run:
    """One training.

    Attributes:
        problem: name of the set.
        optimizer: name.
        seed: of the weights.
        seconds: of CPU time at which each of the `losses` was known.
        losses: mean of half the squared error on the training data, in units of the standardised target.
        test: root mean square error on the test data at the end, in the same units.
        setting: what was searched.
    """

    problem: str
    optimizer: str
    seed: int
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    test: float = math.nan
    setting: str = ""

    def until(self, target: float) -> float:
        """Seconds until the loss is at most the target; infinite if it never is."""
        pairs = zip(self.seconds, self.losses, strict=True)
        return next((spent for spent, loss in pairs if loss <= target), math.inf)


@dataclass
class Contest:
    """All trainings."""

    seconds: float
    runs: list[Run]

    def shares(self, problem: str) -> dict[int, tuple[Run, Run, float]]:
        """Seed → ours, the better baseline, and our share of its time to its own last loss."""
        found = {}
        for ours in (run for run in self.runs if run.problem == problem and run.optimizer == "gram"):
            others = [r for r in self.runs if r.problem == problem and r.seed == ours.seed and r is not ours]
            best = min(others, key=lambda run: run.losses[-1])
            target = best.losses[-1]
            found[ours.seed] = (ours, best, ours.until(target) / best.until(SETTLED * target))
        return found

    def tables(self) -> list[Table]:
        """Medians over seeds."""
        title = f"UCI, one hidden layer of {HIDDEN}, full batch: training loss after {self.seconds:g} s of CPU time"
        names = list(dict.fromkeys(run.optimizer for run in self.runs))
        table = Table(title, ("data", *names, *(f"test, {name}" for name in names), "time to the better one's"))
        for problem in dict.fromkeys(run.problem for run in self.runs):
            own = {n: [run for run in self.runs if (run.problem, run.optimizer) == (problem, n)] for n in names}
            last = [f"{median(run.losses[-1] for run in own[name]):.2e}" for name in names]
            test = [f"{median(run.test for run in own[name]):.3f}" for name in names]
            share = median(share for *_, share in self.shares(problem).values())
            table.add(problem, *last, *test, f"{share:.3f}" if math.isfinite(share) else "not reached")
        return [table]

    def notes(self) -> list[str]:
        """On how many sets a third of the time was enough."""
        problems = list(dict.fromkeys(run.problem for run in self.runs))
        quick = [p for p in problems if median(s for *_, s in self.shares(p).values()) <= 1 / 3]
        return [f"At most a third of the better baseline's time on {len(quick)} of {len(problems)}."]

    def __str__(self) -> str:
        return "\n\n".join(map(str, [*self.tables(), *self.notes()]))

    def to_json(self) -> str:
        """All trainings, their curves thinned to at most some 200 points."""
        runs = []
        for run in self.runs:
            thin = max(1, len(run.losses) // 200)
            curve = {"seconds": run.seconds[::thin], "losses": run.losses[::thin]}
            runs.append({**vars(run), **curve, "last": run.losses[-1], "steps": len(run.losses)})
        return json.dumps(replace_nonfinite({"seconds": self.seconds, "runs": runs}), indent=1)

    def draw(self, folder: Path) -> list[Path]:
        """``uci.png``: training loss against seconds of CPU time."""
        from matplotlib.figure import Figure

        from kronfisher.experiments.figures import OKABE_ITO, write_figures

        def figures() -> Any:
            problems = list(dict.fromkeys(run.problem for run in self.runs))
            names = list(dict.fromkeys(run.optimizer for run in self.runs))
            figure = Figure(figsize=(11, 2.6 * math.ceil(len(problems) / 4)), layout="constrained")
            axes = figure.subplots(math.ceil(len(problems) / 4), min(4, len(problems)), squeeze=False).flat
            for place, problem in zip(axes, problems, strict=False):
                for run in (run for run in self.runs if run.problem == problem):
                    colour = OKABE_ITO[6 - 2 * names.index(run.optimizer)]
                    place.plot(run.seconds, run.losses, color=colour, label=run.optimizer)
                place.set(xscale="log", yscale="log", title=problem, xlabel="seconds of CPU time")
            lines, labels = figure.axes[0].get_legend_handles_labels()
            shown = dict(zip(labels, lines, strict=True))
            figure.legend(shown.values(), shown, loc="outside lower center", ncols=len(shown))
            yield "uci", figure

        return write_figures(folder, figures)


def contest(
    sets: Sequence[str] = (),
    optimizers: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    seconds: float | None = None,
    data_dir: Path | None = None,
    say: Say = ignore,
) -> Contest:
    """Train from the same weights with each optimiser, in float64; AdamW's rate is searched with the first seed.

    Raises:
        ValueError: there is no such set or optimiser, or `optimizers` lacks ours or a baseline.
        FileNotFoundError: a file of the data is missing.
    """
    names, chosen = tuple(sets) or tuple(SETS), tuple(optimizers) or tuple(OPTIMIZERS)
    for given, known, what in ((names, SETS, "set"), (chosen, OPTIMIZERS, "optimizer")):
        if odd := [name for name in given if name not in known]:
            raise ValueError(f"there is no {what} {odd[0]!r} here; there are {', '.join(known)}")
    if "gram" not in chosen or len(chosen) < 2:
        raise ValueError(f"optimizers={','.join(chosen)!r}: gram and at least one baseline are compared")
    loaded = {name: data.load(SETS[name], data_dir=data_dir) for name in names}
    result = Contest(10.0 if seconds is None else seconds, [])
    for problem, dataset in loaded.items():
        for name in chosen:
            build, settings = OPTIMIZERS[name]
            best = settings[0]
            if len(settings) > 1:
                quarter = [_run(problem, dataset, name, build, s, seeds[0], result.seconds / 4) for s in settings]
                ends = [run.losses[-1] if math.isfinite(run.losses[-1]) else math.inf for run in quarter]
                best = settings[ends.index(min(ends))]
            for seed in seeds:
                result.runs.append(run := _run(problem, dataset, name, build, best, seed, result.seconds))
                say(f"{problem}, {name}, seed {seed}: {run.losses[-1]:.3e} after {len(run.losses)} steps {run.setting}")
    return result


def _run(problem: str, dataset: Any, name: str, build: Any, setting: Any, seed: int, budget: float) -> Run:
    x, y = dataset.train_inputs.double(), dataset.train_targets.double()
    network = mlp(x.shape[1], (HIDDEN,), 1, activation="tanh", seed=seed).double()
    run = Run(problem, name, seed, setting="" if setting is None else f"rate {setting:g}")
    step: Step = build(network, x, y, setting)
    spent = 0.0
    while spent < budget:
        began = time.process_time()
        loss = step(spent / budget)
        run.losses.append(loss)  # the loss before the step: known when it began
        run.seconds.append(spent)
        spent += time.process_time() - began
    with torch.no_grad():
        run.losses.append(float(0.5 * (network(x) - y).square().mean()))
        run.test = float((network(dataset.test_inputs.double()) - dataset.test_targets).square().mean().sqrt())
    run.seconds.append(spent)
    return run


def _gram(network: nn.Module, x: Tensor, y: Tensor, setting: Any) -> Step:
    optimizer = NaturalGradient(network, Gaussian(), fit="gram")
    constant = 0.5 * math.log(2 * math.pi)  # of the Gaussian's log density
    return lambda share: float(optimizer.step(lambda: network(x), y)) - constant


def _adamw(network: nn.Module, x: Tensor, y: Tensor, rate: float) -> Step:
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)

    def step(share: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * min(share, 1.0))) / 2
        optimizer.zero_grad()
        loss = 0.5 * (network(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def _lbfgs(network: nn.Module, x: Tensor, y: Tensor, setting: Any) -> Step:
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=20, history_size=50, line_search_fn="strong_wolfe",
                                  tolerance_grad=0.0, tolerance_change=0.0)  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (network(x) - y).square().mean()
        loss.backward()
        return loss

    return lambda share: float(optimizer.step(closure).detach())


OPTIMIZERS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "gram": (_gram, (None,)),
    "lbfgs": (_lbfgs, (None,)),
    "adamw": (_adamw, RATES),
}
"""Name → what makes its step, and the settings that are searched."""
