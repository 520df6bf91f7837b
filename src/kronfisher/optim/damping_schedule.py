"""Who chooses the damping λ while a model is trained."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite

__all__ = ["Constant", "LevenbergMarquardt", "Schedule", "Trust"]


@dataclass(frozen=True)
class Trust(ABC):
    """A rule for λ; frozen settings, the optimiser keeps the value.

    λ is in the units of the Fisher matrix of one datum (a mean over data), as everywhere in the library.
    """

    @abstractmethod
    def start(self, mean: float) -> float:
        """λ at the first step, when the mean eigenvalue of the Fisher matrix is `mean`."""

    def at(self, step: int, value: float) -> float:
        """λ at a step, when it was `value` before."""
        return value

    def compares(self, step: int) -> bool:
        """Whether the loss is evaluated again after this step, to be compared with what the model promised."""
        return False

    def adapted(self, value: float, ratio: float, step: int) -> float:
        """λ after a comparison: `ratio` is the change of the loss over the change that the model promised."""
        return value

    def longest(self, step: int) -> float:
        """The largest part of any weight matrix that ``αΔ`` may change at this step, by norms."""
        return inf


@dataclass(frozen=True)
class Constant(Trust):
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
class Schedule(Trust):
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
class LevenbergMarquardt(Trust):
    """λ falls while the loss does what the quadratic model promised, and rises when it does not.

    Every `every` steps the loss of the same batch is evaluated again after the step. Its change over the model's is the
    ratio ρ: λ falls by ``decay**every`` for ρ > ¾ and rises by as much for ρ < ¼ (Martens & Grosse 2015, section 6.5).
    A loss that rises by more than the model promised it to fall, or that is not finite, has the step undone.

    The first λ needs no tuning: it is a share of the mean eigenvalue of the Fisher matrix, and in the first steps the
    loss is compared at every one of them and λ moves `quick` times as fast (in its logarithm), until ρ leaves the side
    that it began on.

    In these first steps no weight matrix changes by more than a share `stride` of its norm. What is known of the Fisher
    matrix then comes from few data, and a step that is too long saturates units whose gradient is gone for good, while
    the loss falls as promised: ρ does not tell.

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
        reject: undo steps after which the loss rises by more than `reject` times what the model promised it to fall;
            ``math.inf`` undoes only those after which it is not finite.
        least: the exact step size α below which λ rises tenfold: the direction is that many times too long because it
            is mostly noise where the matrix is nearly zero, as in networks whose mean eigenvalue tells little of the
            large ones; ρ would not tell.

    Raises:
        ValueError: a setting is out of range.
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
        if self.every < 1 or not 0 < self.floor <= self.relative <= self.ceiling:
            raise ValueError(f"{self}: every ≥ 1 and 0 < floor ≤ relative ≤ ceiling are needed.")

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

    def refused(self, value: float) -> float:
        """λ after a step that was undone."""
        return 4 * value

    def bounded(self, value: float, mean: float) -> float:
        """λ between floor and ceiling, for the mean eigenvalue at the start."""
        return min(max(value, self.floor * mean), self.ceiling * mean)


def _positive(value: float, what: str) -> float:
    if not (isfinite(value) and value > 0):
        raise ValueError(f"{what} must be a positive number; it is {value}")
    return value
