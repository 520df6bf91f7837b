"""The default step of `NaturalGradient`."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from kronfisher.capture.capture import Capture
from kronfisher.errors import NumericalWarning
from kronfisher.optim.layerwise.average import Average
from kronfisher.optim.layerwise.direction import RelativeDirection
from kronfisher.optim.layerwise.motion import Motion
from kronfisher.optim.layerwise.units import Unit, find_units
from kronfisher.optim.layerwise.weight_rows import WeightRows
from kronfisher.optim.misfit import Misfit
from kronfisher.optim.parts import StepParts
from kronfisher.optim.report import TrainingReport
from kronfisher.optim.row_inverse import RowInverse
from kronfisher.optim.trained_parameters import TrainedParameters

__all__ = ["LayerwiseParts", "LayerwiseStep"]

APART = 10  # steps from statistics to statistics from which on inverses are made in steps of their own
LAST = 0.2  # the share of the rate that is left at the end of a horizon: the average takes out the rest of the noise
ROWS = 128  # examples times positions in a batch below which the rate falls, with their square root
TAIL = 0.3  # the share of a horizon over which the rate falls, linearly


@dataclass(frozen=True)
class LayerwiseStep:
    """Steps of one size for every layer, along its natural gradient, with rates that evidence adapts.

    Each layer keeps a momentum of natural gradients D, ``m ← β m + (1 − β) D`` with ``D = (B + λ_B)⁻¹ V (A + λ_A)⁻¹``,
    each row of a weight divided by the root of its length over the mean one, at least by a half, and moves by
    ``lr · rate · f · 0.2 √numel · m / ℓ`` with ℓ the mean length of D. While gradients agree, that is the size at which
    the rates of Muon and AdamW agree; where noise prevails, m is shorter than ℓ, and so is the step. The factor f of a
    layer grows while gradients of new batches point along its path, and shrinks when they contradict it. Steps that
    only overshoot while much is left to fit grow, too: the average of the iterates takes that out. Updates of weights
    between the first and the last layer are multiplied by ``(C + .3 c)^(−1/2)``, at the same length, C the covariance
    of what they change in their layer's outputs (of mean variance c): Muon's orthogonal step (2024, Jordan et al.)
    where inputs are white. Small networks, and wide ones in small batches, do without: it would cost them more than a
    tenth of the passes.

    Args:
        rate: the step of rate one; ``lr`` of the optimiser multiplies it. Batches of fewer than 128 rows (examples
            times positions) make it smaller, with the square root of their number.
        momentum: β, unless a layer's steps overshoot, and cheaply: 1 − β then falls, to a tenth in some hundred steps,
            and the bound of f rises by as much.
        damping: λ_A and λ_B as shares of the mean eigenvalues of A and B. Both fall with the root of the share of the
            data that is left to fit, down to a twentieth.
        data_damping: λ_A of layers that read data directly is at least this share times their number of inputs: raw
            inputs have directions that hardly vary, and whitening those memorises examples.
        adaptive: the rate of vectors and numbers outside the matrices (scales, shifts), relative to `rate`. They make
            steps of Adam; so do tables and all else that is no matrix of a layer, at `rate`.
        average: keep an average of the iterates for evaluation: `NaturalGradient.eval` and `train` exchange them.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import torch, kronfisher as kf
        >>> model = torch.nn.Linear(4, 3)
        >>> x, y = torch.randn(128, 4), torch.randint(3, (128,))
        >>> optimizer = kf.NaturalGradient(model, kf.Categorical(), step=kf.LayerwiseStep(rate=0.03))
        >>> losses = [optimizer.step(lambda: model(x), y).item() for _ in range(20)]
        >>> losses[-1] < losses[0]
        True
    """

    rate: float = 0.06
    momentum: float = 0.9
    damping: float = 0.05
    data_damping: float = 1 / 150
    adaptive: float = 0.3
    average: bool = True

    def __post_init__(self) -> None:
        if not (isinstance(self.momentum, float | int) and 0 <= self.momentum < 1):
            raise ValueError(f"momentum={self.momentum!r}: use a number in [0, 1).")
        for name in ("rate", "damping"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be positive.")
        if not self.data_damping >= 0:
            raise ValueError(f"data_damping={self.data_damping!r} must not be negative.")


@dataclass
class LayerwiseParts(StepParts):
    """The parts of a layerwise step.

    Attributes:
        options: the settings.
        direction: makes natural gradients.
        motion: momentum and sizes.
        average: of the iterates.
        misfit: how far predictions are from the data.
        total_steps: the horizon, at whose end the rate falls; None: none.
        skipped: steps left out because there was no gradient or no curvature.
    """

    options: LayerwiseStep = field(default_factory=LayerwiseStep)
    direction: RelativeDirection = field(kw_only=True)
    motion: Motion = field(kw_only=True)
    average: Average = field(kw_only=True)
    misfit: Misfit = field(default_factory=Misfit)
    total_steps: int | None = None
    skipped: int = 0
    _rows: WeightRows = field(default_factory=WeightRows, init=False, repr=False)
    _found: tuple[Any, list[Unit]] = field(default=(None, []), init=False, repr=False)

    @property
    def uncovered_step(self) -> str:
        return "Adam's steps"

    @property
    def spares(self) -> bool:
        return False  # they tell whether the path still leads down

    def repeats(self, step: int) -> bool:
        return False

    def row_inverse(self, capture: Capture, rates: Mapping[str, float]) -> RowInverse | None:
        return self.direction.row_inverse(capture, rates)

    def make_step(self, model: nn.Module, trained: TrainedParameters, step: int, *, whole: bool) -> None:
        gradients, due = trained.gradients(), self.statistics.is_due(step)
        if self.total_steps and step >= self.total_steps:
            self.watch.beyond(step, self.total_steps, LAST)
        taken = self.take(gradients, step)
        figures = self.statistics.figures
        if due and (misfit := figures.misfit) is not None:
            self.misfit.follow(misfit, next(iter(self.statistics.parameters.values())).device)
        self.direction.follow(self.statistics.layers, step)
        if not gradients or not (self.statistics.ready or (self.statistics.examined and not self.statistics.layers)):
            self.skipped += 1
            self.watch.idle(step, seen=bool(gradients) or taken.seen)
            return
        # In the first steps inverses follow statistics at once: a GPT that used older ones trained half as fast.
        wait = due and self.statistics.next_due >= step + min(APART, self.statistics.refresh.statistics)
        left = self.misfit.left
        self.direction.renew(step, figures.pass_cost, left, wait=wait)
        self.statistics.schedule_bases(self.direction.due)
        with self._timed("update"):
            natural = self.direction.apply(gradients, taken.rows)
            self._rows.even([block for one in self.direction.inverses for block in one.blocks], natural)
            self.motion.follow(self._units(trained), next(iter(gradients.values())).device)
            averages = self.average.averages if self.options.average else None
            self.motion.move(
                trained, gradients, natural, self.rate(step), self.misfit, averages, self.direction.changes.even
            )
            if self.options.average:
                self.average.update(model, trained.named, left, look=due)

    def rate(self, step: int) -> float | Tensor:
        """The rate at this step, before factors of units: smaller for batches of few rows, which are mostly noise."""
        rows = self.statistics.figures.rows  # a tensor where examples are masked
        few = rows.div(ROWS).clamp(max=1.0) if isinstance(rows, Tensor) else min(1.0, rows / ROWS)
        return self.options.rate * self.annealing(step) * few**0.5

    def annealing(self, step: int) -> float:
        """The factor on every rate that the horizon gives."""
        if not self.total_steps:
            return 1.0
        left = 1 - min(step / self.total_steps, 1.0)
        return LAST + (1 - LAST) * min(left / TAIL, 1.0)

    def _units(self, trained: TrainedParameters) -> list[Unit]:
        """The units, the same list as long as layers and parameters are the same."""
        layers = [layer for layer in self.statistics.layers if layer.average is not None]
        seen = layers, self.statistics.tables, list(trained.named)
        if seen != self._found[0]:
            blocks = (block for layer in layers for block in layer.blocks)
            self._found = seen, find_units(blocks, self.statistics.tables, trained.named)
        return self._found[1]

    @property
    def evaluating(self) -> bool:
        return self.average.evaluating

    def evaluate(self, evaluating: bool, parameters: Mapping[str, nn.Parameter]) -> None:
        if evaluating == self.average.evaluating or not self.average.steps:
            return
        if self.average.swap(self.forward_backward.model, parameters):
            return
        warnings.warn(
            "The model does not hold the weights that optimizer.eval() put there: others were loaded, or it was "
            "changed. Training goes on from what it holds now, and the average begins anew. Save and load model and "
            "optimiser together, both before optimizer.eval() or both after it.",
            NumericalWarning,
            stacklevel=3,
        )

    def extend(self, parameters: dict[str, nn.Parameter]) -> None:
        self.statistics.extend(parameters)
        self.direction.extend(parameters)

    def report(self, step: int) -> TrainingReport:
        statistics, loss = self.statistics, self.forward_backward.loss
        seconds = {**self.seconds, "statistics": statistics.seconds, "inverses": self.direction.seconds}
        seconds["forward and backward"] -= statistics.seconds_in_backward
        return TrainingReport(
            step=step,
            loss=None if loss is None else float(loss),
            damping=None,
            step_size=float(self.rate(step)) if self.statistics.examined else self.options.rate,
            momentum=self.options.momentum,
            ratio=None,
            rejected=0,
            skipped=self.skipped + int(self.motion.skipped),
            dropped=statistics.dropped,
            seconds=seconds,
            stale=self.direction.overdue(step),
            troubles=self.direction.troubles,
            uncovered=statistics.uncovered,
            uncovered_step=self.uncovered_step,
            coupled=tuple(statistics.coupled),
            cuts=tuple(statistics.cuts),
            warnings=tuple(self.watch.told.values()),
            overdue=self.watch.overdue,
            beyond=max(0, step - self.total_steps) if self.total_steps else 0,
            sent=statistics.sent,
            collectives=statistics.collectives,
        )

    @staticmethod
    def names() -> tuple[str, ...]:
        return "forward_backward", "statistics", "direction", "motion", "average", "misfit", "watch", "skipped"

    def state_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name).state_dict() for name in self.names() if name != "skipped"}
        return {**own, "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.statistics.load_state_dict(state["statistics"])  # the first: it refuses what does not belong
        self.direction.load_state_dict(state["direction"], self.statistics.layers)
        self.forward_backward.load_state_dict(state["forward_backward"])
        device = next(iter(self.statistics.parameters.values())).device
        self.motion.load_state_dict(state["motion"], device)
        self.average.load_state_dict(state["average"], device)
        self.misfit.load_state_dict(state["misfit"], device)
        self.watch.load_state_dict(state["watch"])
        self.skipped = state["skipped"]
