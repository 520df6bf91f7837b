"""How good scores are: against training again without some of the data, and at finding wrong labels.

Trainings are done by a function of yours, ``retrain(kept, seed) -> [Q]``: it trains on the examples with the indices
``kept`` and gives the measurement of every query that the scores are of. Keep the 1/N of the loss of all data, where
training on fewer examples would change the weight decay relative to it. Results are appended to a file where one is
given, so that an interrupted study goes on, and several scores are compared on the same trainings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kronfisher.errors import DataError
from kronfisher.estimation.progress import Progress
from kronfisher.influence.retraining import Job, Retrain, run_all
from kronfisher.influence.scores import Scores
from kronfisher.influence.statistics import (
    Interval,
    mean_interval,
    pearson,
    share_interval,
    spearman,
    two_way_interval,
)

__all__ = [
    "Correlation",
    "Curve",
    "Interval",
    "brittleness",
    "lds",
    "leave_one_out",
    "mislabelled",
    "random_subsets",
    "removal",
]


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


def random_subsets(examples: int, subsets: int, share: float = 0.5, seed: int = 0) -> list[Tensor]:
    """Sorted indices of random subsets, the same for the same seed."""
    if not 0 < share < 1:
        raise ValueError(f"share={share}: the subsets are a share of the data between 0 and 1.")
    generator = torch.Generator("cpu").manual_seed(seed)
    size = max(1, round(share * examples))
    return [torch.randperm(examples, generator=generator)[:size].sort().values for _ in range(subsets)]


def lds(
    scores: Scores | Tensor,
    retrain: Retrain,
    *,
    subsets: int = 100,
    share: float = 0.5,
    seeds: int = 1,
    seed: int = 0,
    path: str | Path | None = None,
    workers: int = 1,
    progress: Progress = False,
) -> Correlation:
    """The linear datamodelling score (Park et al. 2023, arXiv:2303.14186).

    The rank correlation, over random subsets of the training data, of a query's measurement after training on them with
    the sum of the scores of what was left out; averaged over queries.

    Args:
        scores: ``[Q, N]``.
        retrain: ``retrain(kept, seed) -> [Q]``, see above.
        subsets: M.
        share: of the data in each.
        seeds: trainings of each subset, whose measurements are averaged.
        seed: of the subsets.
        path: of a file of results, see above.
        workers: processes.
        progress: as for `kronfisher.estimate`.

    Raises:
        DataError: retrain does not give one finite number for each query.

    Example:
        >>> x = torch.randn(30, dtype=torch.float64)
        >>> scores = -x.expand(2, -1)  # two queries whose loss is the mean of what is kept
        >>> str(lds(scores, lambda kept, seed: x[kept].sum().expand(2), subsets=20))
        '1.000 [1.000, 1.000]'
    """
    values = _total(scores)
    kept = random_subsets(values.shape[1], subsets, share, seed)
    jobs = [Job(indices, k) for indices in kept for k in range(seeds)]
    actual = run_all(retrain, jobs, queries=len(values), path=path, workers=workers, progress=progress)
    actual = actual.unflatten(0, (subsets, seeds)).mean(1)
    predicted = torch.stack([values.sum(1) - values[:, indices].sum(1) for indices in kept])
    return Correlation(two_way_interval(spearman, predicted, actual), spearman(predicted, actual), predicted, actual)


def leave_one_out(
    scores: Scores | Tensor,
    retrain: Retrain,
    *,
    examples: Sequence[int] | Tensor | int = 50,
    seeds: int = 1,
    seed: int = 0,
    path: str | Path | None = None,
    workers: int = 1,
    progress: Progress = False,
) -> Correlation:
    """The correlation of scores with the change of each query's measurement when one example is left out.

    Args:
        scores: ``[Q, N]``.
        retrain: ``retrain(kept, seed) -> [Q]``.
        examples: indices of those that are left out, one at a time, or how many random ones.
        seeds: trainings for each, whose measurements are averaged.
        seed: of the choice.
        path: as for `lds`.
        workers: as for `lds`.
        progress: as for `lds`.

    Raises:
        DataError: as `lds`.
    """
    values = _total(scores)
    everything = torch.arange(values.shape[1])
    if isinstance(examples, int):
        generator = torch.Generator("cpu").manual_seed(seed)
        examples = torch.randperm(len(everything), generator=generator)[:examples]
    chosen = torch.as_tensor(examples)
    kept = [everything, *(everything[everything != k] for k in chosen)]
    jobs = [Job(indices, k) for indices in kept for k in range(seeds)]
    found = run_all(retrain, jobs, queries=len(values), path=path, workers=workers, progress=progress)
    found = found.unflatten(0, (len(kept), seeds)).mean(1)
    actual, predicted = found[1:] - found[0], values[:, chosen].mT
    return Correlation(two_way_interval(pearson, predicted, actual), pearson(predicted, actual), predicted, actual)


def removal(
    scores: Scores | Tensor,
    retrain: Retrain,
    *,
    counts: Sequence[int] = (5, 10, 20, 30),
    seeds: int = 1,
    lowest: bool = False,
    path: str | Path | None = None,
    workers: int = 1,
    progress: Progress = False,
) -> Curve:
    """How much each query's measurement changes when the examples of its highest scores are removed together.

    Args:
        scores: ``[Q, N]``.
        retrain: ``retrain(kept, seed) -> [Q]``; of each training one query's number is used.
        counts: how many are removed.
        seeds: trainings for each, whose measurements are averaged.
        lowest: remove those of the lowest scores.
        path: as for `lds`.
        workers: as for `lds`.
        progress: as for `lds`.

    Returns:
        The mean change over queries at every count, and each query's.

    Raises:
        DataError: as `lds`.
    """
    before, after = _removed(scores, retrain, counts, seeds, lowest, path, workers, progress)
    change = after - before
    return Curve(tuple(counts), tuple(mean_interval(row) for row in change), change)


def brittleness(
    scores: Scores | Tensor,
    retrain: Retrain,
    *,
    counts: Sequence[int] = (5, 10, 20, 40, 80),
    seeds: int = 1,
    path: str | Path | None = None,
    workers: int = 1,
    progress: Progress = False,
) -> Curve:
    """The share of queries whose prediction has flipped once at most so many training examples are removed.

    Args:
        scores: ``[Q, N]`` of a margin, positive where the prediction is right; the examples that hold it up, of the
            lowest scores (the margin falls without them), are removed.
        retrain: ``retrain(kept, seed) -> [Q]``, the margins.
        counts: how many are removed, rising.
        seeds: trainings for each, whose margins are averaged.
        path: as for `lds`.
        workers: as for `lds`.
        progress: as for `lds`.

    Returns:
        The share at every count, of the queries that are right before; ``by_query`` is one once a query has flipped.

    Raises:
        DataError: as `lds`, or no query is right before.
    """
    before, after = _removed(scores, retrain, counts, seeds, True, path, workers, progress)
    right = before > 0
    if not bool(right.any()):
        raise DataError("no query has a positive margin before anything is removed.")
    flipped = (after[:, right] < 0).long().cummax(0).values
    intervals = tuple(share_interval(int(row.sum()), len(row)) for row in flipped)
    return Curve(tuple(counts), intervals, flipped)


def mislabelled(scores: Tensor, wrong: Tensor, *, shares: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5)) -> Curve:
    """The share of wrong labels that is found when the data are inspected in the order of their scores.

    Args:
        scores: ``[N]``, such as self-scores or losses; the highest are inspected first.
        wrong: bool ``[N]``.
        shares: of the data that are inspected.

    Raises:
        DataError: the shapes differ, or no label is wrong.

    Example:
        >>> scores, wrong = torch.tensor([3.0, 9.0, 1.0, 2.0]), torch.tensor([False, True, False, False])
        >>> str(mislabelled(scores, wrong, shares=[0.25]).intervals[0])
        '1.000 [0.207, 1.000]'
    """
    if scores.shape != wrong.shape or scores.dim() != 1 or not bool(wrong.any()):
        raise DataError(f"scores {list(scores.shape)} need one answer each, some of them true; {list(wrong.shape)}.")
    order = wrong.bool()[scores.argsort(descending=True, stable=True)]
    total = int(order.sum())
    found = [int(order[: round(share * len(order))].sum()) for share in shares]
    return Curve(tuple(shares), tuple(share_interval(number, total) for number in found))


def _total(scores: Scores | Tensor) -> Tensor:
    values = scores.total if isinstance(scores, Scores) else scores
    if values.dim() != 2:
        raise DataError(f"scores must be [Q, N]; found {list(values.shape)}.")
    return values.detach().cpu()


def _removed(
    scores: Scores | Tensor,
    retrain: Retrain,
    counts: Sequence[int],
    seeds: int,
    lowest: bool,
    path: str | Path | None,
    workers: int,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """Measurements ``[Q]`` before, and ``[counts, Q]`` after each query's own first examples were removed."""
    values = _total(scores)
    size = values.shape[1]
    if not all(0 < count < size for count in counts):
        raise ValueError(f"counts={list(counts)}: between 1 and {size - 1} of the {size} examples can be removed.")
    order = values.argsort(dim=1, descending=not lowest, stable=True)
    kept = [torch.arange(size), *(order[q, count:].sort().values for count in counts for q in range(len(values)))]
    jobs = [Job(indices, k) for indices in kept for k in range(seeds)]
    found = run_all(retrain, jobs, queries=len(values), path=path, workers=workers, progress=progress)
    found = found.unflatten(0, (len(kept), seeds)).mean(1)
    return found[0], found[1:].unflatten(0, (len(counts), len(values))).diagonal(dim1=1, dim2=2)
