"""Rank correlations and confidence intervals of what attribution measures."""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

__all__ = ["Interval", "mean_interval", "pearson", "share_interval", "spearman", "two_way_interval"]

_Z = 1.959964  # of 95 %
_GROUPS = 10  # of the jackknife


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % confidence interval.

    Attributes:
        value: the estimate.
        low: the lower end.
        high: the upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """The correlation of columns ``[M, Q]`` of x and y, ``[Q]``; zero where one of them is constant."""
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    norms = x.square().sum(0).sqrt() * y.square().sum(0).sqrt()
    return torch.where(norms > 0, (x * y).sum(0) / norms, 0)


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """The rank correlation of columns ``[M, Q]`` of x and y, ``[Q]``; equal numbers share their mean rank.

    Example:
        >>> round(float(spearman(torch.tensor([[1.0], [2.0], [9.0]]), torch.tensor([[0.0], [5.0], [6.0]]))), 6)
        1.0
    """
    return pearson(_ranks(x), _ranks(y))


def _ranks(x: Tensor) -> Tensor:
    columns = []
    for column in x.mT:
        _, inverse, counts = column.unique(return_inverse=True, return_counts=True)
        columns.append((counts.cumsum(0) - (counts - 1) / 2)[inverse])
    return torch.stack(columns, dim=1) if columns else x.double()


def mean_interval(values: Tensor) -> Interval:
    """The mean of independent values ``[Q]``, by their standard error."""
    values = values.double()
    mean = float(values.mean())
    error = float(values.std() / sqrt(len(values))) if len(values) > 1 else float("inf")
    return Interval(mean, mean - _Z * error, mean + _Z * error)


def two_way_interval(statistic: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Interval:
    """The mean over queries of a correlation ``statistic(x, y) [Q]`` of ``[M, Q]``; queries and rows are samples.

    The variance is that of the mean over queries (of a single one: nothing) and that over rows, the latter by the
    jackknife over ten groups. The ends are no further than −1 and 1.
    """
    found = statistic(x, y)
    by_query = mean_interval(found if len(found) > 1 else found.repeat(2))
    count = max(min(_GROUPS, len(x)), 1)
    group = torch.arange(len(x)) % count
    left_out = torch.stack([statistic(x[group != k], y[group != k]).mean() for k in range(count)])
    by_row = float((count - 1) * left_out.var(correction=0)) if count > 2 else float("inf")
    error = sqrt(((by_query.high - by_query.value) / _Z) ** 2 + by_row)
    return Interval(by_query.value, max(by_query.value - _Z * error, -1), min(by_query.value + _Z * error, 1))


def share_interval(found: int, of: int) -> Interval:
    """A share of independent yes-or-no answers, by Wilson's interval (1927, J. Am. Stat. Assoc. 22:209).

    Example:
        >>> str(share_interval(8, 10))
        '0.800 [0.490, 0.943]'
    """
    share = found / of
    middle, spread = share + _Z**2 / (2 * of), _Z * sqrt(share * (1 - share) / of + _Z**2 / (4 * of**2))
    scale = 1 + _Z**2 / of
    return Interval(share, (middle - spread) / scale, (middle + spread) / scale)
