"""What comparisons of scores with training again give: a correlation, or a curve, each with its interval."""

from dataclasses import dataclass

from torch import Tensor

from kronfisher.errors import DataError
from kronfisher.influence.scores import Scores
from kronfisher.influence.statistics import Interval

__all__ = ["Correlation", "Curve", "require_comparable", "total"]


@dataclass(frozen=True)
class Correlation:
    """Predicted and actual measurements of Q queries after M trainings.

    Attributes:
        interval: the mean correlation over queries.
        by_query: ``[Q]``.
        predicted: ``[M, Q]``.
        actual: ``[M, Q]``.
    """

    interval: Interval
    by_query: Tensor
    predicted: Tensor
    actual: Tensor

    @property
    def value(self) -> float:
        """The mean correlation."""
        return self.interval.value

    def __str__(self) -> str:
        return str(self.interval)


@dataclass(frozen=True)
class Curve:
    """One number against another.

    Attributes:
        at: shares or counts.
        intervals: the number at each.
        by_query: ``[len(at), Q]``, where it is a mean over queries.
    """

    at: tuple[float, ...]
    intervals: tuple[Interval, ...]
    by_query: Tensor | None = None

    def __str__(self) -> str:
        return "\n".join(f"{x:>8g}  {interval}" for x, interval in zip(self.at, self.intervals, strict=True))


def total(scores: Scores | Tensor) -> Tensor:
    """``[Q, N]``, in main memory.

    Raises:
        DataError: they have another shape, or hold NaN.
    """
    values = scores.total if isinstance(scores, Scores) else scores
    if values.dim() != 2:
        raise DataError(f"scores must be [Q, N]; found {list(values.shape)}.")
    return require_comparable(values).detach().cpu()


def require_comparable(scores: Tensor) -> Tensor:
    """The same scores; DataError if one is NaN, which has no place in an order."""
    if bool(scores.isnan().any()):
        raise DataError("scores hold NaN, so that they have no order: look at what they were computed from.")
    return scores
