"""Training again without the examples that a query's scores name, all of them together."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kronfisher.errors import DataError, require_integer
from kronfisher.estimation.progress import Progress
from kronfisher.influence.judgements import Curve, total
from kronfisher.influence.retraining import Retrain, Trainings
from kronfisher.influence.scores import Scores
from kronfisher.influence.statistics import mean_interval, share_interval

__all__ = ["brittleness", "removal"]


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

    For several queries together, give the sum of their scores (``scores.sum(queries=[0] * Q)``), and a `retrain` that
    gives their mean measurement, ``[1]``.

    Args:
        scores: ``[Q, N]``.
        retrain: ``retrain(kept, seed) -> [Q]``; of each training one query's number is used.
        counts: how many are removed, rising.
        seeds: trainings for each, whose measurements are averaged.
        lowest: remove those of the lowest scores.
        path: as for `lds`.
        workers: as for `lds`.
        progress: as for `lds`.

    Returns:
        The mean change over queries at every count, and each query's. The interval is over queries; where there is one,
        over seeds.

    Raises:
        DataError: as `lds`.
        ValueError: the counts are none.
    """
    trainings = Trainings(retrain, seeds, path, workers, progress)
    before, after = _removed(scores, trainings, counts, lowest)
    change = after - before  # [counts, S, Q]
    by_query = change.mean(1)
    samples = by_query if change.shape[2] > 1 else change[:, :, 0]
    return Curve(tuple(counts), tuple(mean_interval(row) for row in samples), by_query)


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
        ValueError: as `removal`.
    """
    found = _removed(scores, Trainings(retrain, seeds, path, workers, progress), counts, True)
    before, after = (measured.mean(-2) for measured in found)
    right = before > 0
    if not bool(right.any()):
        raise DataError("no query has a positive margin before anything is removed.")
    flipped = (after[:, right] < 0).long().cummax(0).values
    intervals = tuple(share_interval(int(row.sum()), len(row)) for row in flipped)
    return Curve(tuple(counts), intervals, flipped)


def _removed(
    scores: Scores | Tensor, trainings: Trainings, counts: Sequence[int], lowest: bool
) -> tuple[Tensor, Tensor]:
    """Measurements ``[S, Q]`` before, and ``[counts, S, Q]`` after each query's own first examples were removed."""
    values = total(scores)
    size = values.shape[1]
    remedy = f"between 1 and {size - 1} of the {size} examples can be removed"
    counts = [require_integer("counts", count, 1, remedy) for count in counts]
    if not counts or max(counts) >= size or sorted(set(counts)) != counts:
        raise ValueError(f"counts={counts}: {remedy}, in rising numbers.")
    order = values.argsort(dim=1, descending=not lowest, stable=True)
    kept = [torch.arange(size), *(order[q, count:].sort().values for count in counts for q in range(len(values)))]
    found = trainings.by_seed(kept, len(values))
    return found[0], found[1:].unflatten(0, (len(counts), len(values))).diagonal(dim1=1, dim2=3)
