"""The damping λ while a model is trained: the rules that choose it, and its value."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import torch

from kronfisher.errors import keep_integer

__all__ = ["Constant", "DampingSchedule", "LevenbergMarquardt", "Schedule", "ScheduledDamping"]


@dataclass(frozen=True)
class DampingSchedule(ABC):
    """A rule for λ. It holds settings only; `ScheduledDamping` holds the value.

    λ is in the units of the Fisher matrix of one example (a mean over examples), as everywhere in the library. Only
    `start` has to be defined. All other methods are called for every schedule; their defaults keep λ and every step.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Halved(DampingSchedule):
        ...     def start(self, mean: float) -> float:
        ...         return 0.1 * mean
        ...     def compares(self, step: int) -> bool:
        ...         return step % 5 == 0
        ...     def adapted(self, value: float, ratio: float, step: int) -> float:
        ...         return value / 2 if ratio > 0.5 else 2 * value
        >>> Halved().adapted(1.0, ratio=0.9, step=5), Halved().compares_losses
        (0.5, True)
    """

    @abstractmethod
    def start(self, mean: float) -> float:
        """λ at the first step, when the mean eigenvalue of the Fisher matrix is `mean`."""

    def at(self, step: int, value: float) -> float:
        """λ at a step, when it was `value` before."""
        return value

    def compares(self, step: int) -> bool:
        """Whether the loss is evaluated again after this step, to be compared with the quadratic model's prediction."""
        return False

    @property
    def compares_losses(self) -> bool:
        """Whether `compares` may be true at some step, so that every loss must be one that can be evaluated again."""
        return type(self).compares is not DampingSchedule.compares

    def adapted(self, value: float, ratio: float, step: int) -> float:
        """λ after a comparison: `ratio` is the change of the loss over the predicted change."""
        return value

    def rejects(self, change: float, predicted: float) -> bool:
        """Whether to undo a step that changed the loss by `change`; one that is not finite is always undone."""
        return False

    def refused(self, value: float) -> float:
        """λ after a step that was undone."""
        return value

    def after_solving(self, value: float, step_size: float) -> float:
        """λ after the exact quadratic model has chosen the step size α."""
        return value

    def bounded(self, value: float, mean: float) -> float:
        """λ within its bounds, for the mean eigenvalue at the start; called after comparisons and changes."""
        return value

    def longest(self, step: int) -> float:
        """The largest part of any weight matrix that ``αΔ`` may change at this step, by norms."""
        return inf

    def warnings(self, value: float, mean: float) -> Iterable[str]:
        """Messages to the user about λ = `value`, for the mean eigenvalue at the start."""
        return ()


@dataclass(frozen=True)
class Constant(DampingSchedule):
    """The same λ at every step.

    Args:
        value: λ; None takes `relative` times the mean eigenvalue that the Fisher matrix has at the start.
        relative: see `value`.

    Raises:
        ValueError: λ is not positive.

    Example:
        >>> Constant(1e-3).start(mean=7.0), Constant(relative=0.5).start(mean=7.0)
        (0.001, 3.5)
    """

    value: float | None = None
    relative: float = 0.1

    def __post_init__(self) -> None:
        _positive(self.relative if self.value is None else self.value, "Constant(value)")

    def start(self, mean: float) -> float:
        return self.relative * mean if self.value is None else self.value


@dataclass(frozen=True)
class Schedule(DampingSchedule):
    """λ as a function of the step, from 0.

    Example:
        >>> Schedule(lambda step: max(0.1 * 0.9**step, 1e-4)).at(1, 0.1)
        0.09000000000000001
    """

    function: Callable[[int], float]

    def start(self, mean: float) -> float:
        return self.at(0, 0.0)

    def at(self, step: int, value: float) -> float:
        return _positive(float(self.function(step)), f"λ at step {step}, as the schedule gives it,")


@dataclass(frozen=True)
class LevenbergMarquardt(DampingSchedule):
    """λ falls while the loss changes as the quadratic model predicts, and rises when it does not.

    Every `every` steps the loss of the same batch is evaluated again after the step. Its change over the predicted
    change is the ratio ρ: λ falls by ``decay**every`` for ρ > ¾ and rises by as much for ρ < ¼ (Martens & Grosse 2015,
    section 6.5). A step is undone if the loss rises by more than the predicted decrease, or is not finite.

    The first λ needs no tuning: it is a share of the mean eigenvalue of the Fisher matrix. In the first `warmup` steps
    the loss is compared at every step, and λ moves `quick` times as fast (in its logarithm).

    In these first steps no weight matrix changes by more than a share `stride` of its norm. The Fisher matrix is then
    estimated from few examples, and a step that is too long saturates units whose gradient never comes back, although
    the loss falls as predicted: ρ does not show it.

    Args:
        initial: the first λ; None takes `relative` times the mean eigenvalue.
        relative: see `initial`.
        every: steps between two comparisons.
        decay: the change of λ per step, in (0, 1).
        floor: the smallest λ as a share of the mean eigenvalue of the Fisher matrix at the start.
        ceiling: the largest, likewise.
        warmup: steps at the start that are all compared, and bounded by `stride`.
        quick: how much faster λ moves in them.
        stride: the largest ``‖αΔ‖ / ‖W‖`` of a weight matrix W during `warmup`; ``math.inf`` for no bound.
        reject: undo steps after which the loss rises by more than `reject` times the predicted decrease; ``math.inf``
            undoes only those after which it is not finite.
        least: the exact step size α below which λ rises tenfold. A direction so much too long is mostly noise where the
            matrix is nearly zero, as in networks whose mean eigenvalue is far from the large ones; ρ does not show it.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> import torch, kronfisher as kf
        >>> model, x, y = torch.nn.Linear(4, 3), torch.randn(64, 4), torch.randint(3, (64,))
        >>> optimizer = kf.NaturalGradient(model, kf.Categorical(), trust=kf.LevenbergMarquardt(every=5))
        >>> losses = [optimizer.step(lambda: model(x), y).item() for _ in range(10)]
        >>> losses[-1] < losses[0]
        True
    """

    initial: float | None = None
    relative: float = 2e-2
    every: int = 10
    decay: float = 19 / 20
    floor: float = 2e-2
    ceiling: float = 1e6
    warmup: int = 10
    quick: float = 1.0
    stride: float = 0.1
    reject: float = 1.0
    least: float = 1e-3

    def __post_init__(self) -> None:
        if self.initial is not None:
            _positive(self.initial, "LevenbergMarquardt(initial)")
        if not 0 < self.decay < 1:
            raise ValueError(f"LevenbergMarquardt(decay={self.decay}): λ changes by a factor between 0 and 1.")
        if not self.least >= 0:
            raise ValueError(f"LevenbergMarquardt(least={self.least}): a step size is not negative.")
        if not self.stride > 0:
            raise ValueError(f"LevenbergMarquardt(stride={self.stride}): a share of a weight's norm is positive.")
        keep_integer(self, "every", 1)
        keep_integer(self, "warmup", 0)
        if not 0 < self.floor <= self.relative <= self.ceiling:
            raise ValueError(f"{self}: 0 < floor ≤ relative ≤ ceiling is needed.")

    def start(self, mean: float) -> float:
        return self.relative * mean if self.initial is None else self.initial

    def compares(self, step: int) -> bool:
        return step < self.warmup or step % self.every == 0

    def longest(self, step: int) -> float:
        return self.stride if step < self.warmup else inf

    def adapted(self, value: float, ratio: float, step: int) -> float:
        steps = self.quick if step < self.warmup else self.every
        if not isfinite(ratio) or ratio < 0.25:
            return value / self.decay**steps
        return value * self.decay**steps if ratio > 0.75 else value

    def rejects(self, change: float, predicted: float) -> bool:
        return change > self.reject * max(-predicted, 0.0)

    def refused(self, value: float) -> float:
        return 4 * value

    def after_solving(self, value: float, step_size: float) -> float:
        return 10 * value if 0 < step_size < self.least else value

    def bounded(self, value: float, mean: float) -> float:
        return min(max(value, self.floor * mean), self.ceiling * mean)

    def warnings(self, value: float, mean: float) -> Iterable[str]:
        if value <= self.floor * mean * 1.0001:
            yield "λ reached its lower bound; a lower `floor` may train faster"
        if value >= self.ceiling * mean / 1.0001:
            yield "λ reached its upper bound: steps are those of plain gradient descent; check the loss and the data"


@dataclass
class ScheduledDamping:
    """λ while a model is trained.

    Attributes:
        schedule: the rule.
        value: λ; None before the first statistics.
        first_mean: the mean eigenvalue of the Fisher matrix at the start.
        ratio: the change of the loss over the predicted change, at the last comparison.
    """

    schedule: DampingSchedule
    value: float | None = None
    first_mean: float = 0.0
    ratio: float | None = None

    def at(self, step: int, measure: Callable[[], float]) -> float:
        """λ of a step; `measure` gives the mean eigenvalue at the first."""
        if self.value is None:
            self.first_mean = max(measure(), torch.finfo(torch.float32).tiny)
            self.value = self.schedule.start(self.first_mean)
        self.value = self.schedule.at(step, self.value)
        return self.value

    def compare(self, change: float, predicted: float, step: int) -> bool:
        """Adapt λ to a comparison; whether the step is to be undone."""
        assert self.value is not None
        self.ratio = change / predicted if predicted < 0 else float("nan")
        undone = not isfinite(change) or self.schedule.rejects(change, predicted)
        schedule, old = self.schedule, self.value
        value = schedule.refused(old) if undone else schedule.adapted(old, self.ratio, step)
        self.value = schedule.bounded(value, self.first_mean)
        return undone

    def check_step_size(self, step_size: float) -> None:
        """Adapt λ to the step size α that the exact quadratic model has chosen."""
        if self.value is not None:
            value = self.schedule.after_solving(self.value, step_size)
            if value != self.value:
                self.value = self.schedule.bounded(value, self.first_mean)

    def refuse(self) -> None:
        """Adapt λ because a step was undone."""
        if self.value is not None:
            self.value = self.schedule.bounded(self.schedule.refused(self.value), self.first_mean)

    def raise_for_fixed_rate(self) -> None:
        """Raise λ to at least the default of a fixed rate, because there is no exact quadratic model."""
        self.value = max(self.value or 0.0, Constant().start(self.first_mean))

    def warnings(self) -> Iterable[str]:
        """Messages to the user."""
        if self.value is not None:
            yield from self.schedule.warnings(self.value, self.first_mean)
        if self.ratio is not None and not self.ratio > 0:
            yield "the model ratio is negative: the loss rose against the prediction; the batch may be too small"

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs."""
        return {"value": self.value, "first_mean": self.first_mean, "ratio": self.ratio}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.value, self.first_mean, self.ratio = state["value"], state["first_mean"], state["ratio"]


def _positive(value: float, what: str) -> float:
    if not (isfinite(value) and value > 0):
        raise ValueError(f"{what} must be a positive number; it is {value}")
    return value
