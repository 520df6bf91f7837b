"""Laplace intervals of the constants of an equation, and how often they hold the truth."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kronfisher.estimation.estimate import estimate
from kronfisher.experiments.equations.inverse import OBSERVATIONS, TRUTH, Conductivity, Inverse
from kronfisher.experiments.progress import Say, ignore
from kronfisher.laplace import Laplace
from kronfisher.optim import NaturalGradient
from kronfisher.tables import Table

__all__ = ["Interval", "Intervals", "intervals"]

PRIOR = 1e-2  # precision of every parameter: next to nothing beside the data
STEPS, SETTLED = 400, 1e-4  # at most; the share of the loss that ten further steps still bring
FITTED, STARTS = 3 * OBSERVATIONS, 5  # a larger loss is no fit: κ has changed its sign; then from other weights
WIDTH = 1.96  # standard deviations on each side: 95 % of a normal distribution


@dataclass(frozen=True)
class Interval:
    """One draw of the observations.

    Attributes:
        seed: of places, noise and weights.
        mean: the constants that training found.
        deviation: their standard deviations under the Laplace posterior of constants and weights together.
        steps: that training took.
        loss: ``½ Σ r²/σ²`` at the end.
        starts: from so many initial weights; all but the last ended far from what was observed.
    """

    seed: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    steps: int
    loss: float
    starts: int

    def holds(self, k: int) -> bool:
        """Whether the interval of constant k holds the truth."""
        return abs(self.mean[k] - TRUTH[k]) <= WIDTH * self.deviation[k]


@dataclass(frozen=True)
class Intervals:
    """Those of all draws."""

    draws: Sequence[Interval]

    def table(self) -> Table:
        """Of the first draw, and the share of all draws whose interval holds the truth."""
        title = f"Laplace intervals (95 %), draw {self.draws[0].seed}, and coverage over {len(self.draws)} draws"
        table = Table(title, ("constant", "truth", "found", "interval", "coverage"))
        for k, truth in enumerate(TRUTH):
            mean, deviation = self.draws[0].mean[k], self.draws[0].deviation[k]
            held = sum(draw.holds(k) for draw in self.draws)
            low, high = mean - WIDTH * deviation, mean + WIDTH * deviation
            table.add(f"κ{k}", f"{truth:g}", f"{mean:.3f}", f"{low:.3f} to {high:.3f}", f"{held} of {len(self.draws)}")
        return table

    def records(self) -> list[dict[str, Any]]:
        """One a draw, for JSON."""
        return [vars(draw) for draw in self.draws]


def intervals(equation: Inverse, draws: int = 20, say: Say = ignore) -> Intervals:
    """Train and estimate for each draw of the observations, at points of its own that stay the same."""
    found = []
    for seed in range(draws):
        found.append(_interval(equation, seed))
        say(f"draw {seed}: κ = {', '.join(f'{value:.3f}' for value in found[-1].mean)}")
    return Intervals(found)


def _interval(equation: Inverse, seed: int) -> Interval:
    network, likelihood = equation.network(seed), equation.likelihood()
    points = equation.draw()
    losses, starts = _trained(equation, network, points), 1
    while losses[-1] > FITTED and starts < STARTS:
        network.restart()
        losses, starts = _trained(equation, network, points), starts + 1

    def forward(model: nn.Module, batch: Any) -> Any:
        return equation.residuals(model, *points), None

    fisher = estimate(network, [points[0]], likelihood, fit="gram", labels="exact", forward=forward)
    variance = Laplace(network, fisher, PRIOR).variance()["constants"]
    mean, deviation = network.constants.detach(), variance.sqrt()
    return Interval(seed, tuple(mean.tolist()), tuple(deviation.tolist()), len(losses), losses[-1], starts)


def _trained(equation: Inverse, network: Conductivity, points: tuple[Tensor, Tensor]) -> list[float]:
    """Losses until they settle."""
    optimizer = NaturalGradient(network, equation.likelihood(), fit="gram")
    losses: list[float] = []
    while len(losses) < STEPS:
        losses.append(float(optimizer.step(lambda: equation.residuals(network, *points))))
        if len(losses) > 20 and losses[-11] - losses[-1] <= SETTLED * losses[-1]:
            break
    return losses
