"""How good scores are: against training again without some of the data, and at finding wrong labels.

Trainings are done by a function of yours, ``retrain(kept, seed) -> [Q]``: it trains on the examples with the indices
``kept`` and gives the measurement of every query that the scores are of. Keep the 1/N of the loss of all data, where
training on fewer examples would change the weight decay relative to it. Results are appended to a file where one is
given, so that an interrupted study goes on, and several scores are compared on the same trainings.

Example:
    >>> import kronfisher as kf
    >>> wrong = torch.tensor([False, True, False, True])
    >>> curve = kf.attribution.mislabelled(torch.tensor([0.1, 2.0, 0.3, 1.0]), wrong, shares=(0.5,))
    >>> round(curve.intervals[0].value, 2)  # both wrong labels are in the first half
    1.0
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kronfisher.errors import DataError, require_integer
from kronfisher.estimation.progress import Progress
from kronfisher.influence.judgements import Correlation, Curve, require_comparable, total
from kronfisher.influence.removals import brittleness, removal
from kronfisher.influence.retraining import Retrain, Trainings
from kronfisher.influence.scores import Scores
from kronfisher.influence.statistics import Interval, pearson, share_interval, spearman, two_way_interval

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


def random_subsets(examples: int, subsets: int, share: float = 0.5, seed: int = 0) -> list[Tensor]:
    """Sorted indices of random subsets, the same for the same seed."""
    if not 0 < share < 1:
        raise ValueError(f"share={share}: the subsets are a share of the data between 0 and 1.")
    given = {"examples": (examples, 1), "subsets": (subsets, 1), "seed": (seed, -math.inf)}
    examples, subsets, seed = (
        require_integer(name, value, least, f"use an integer of at least {least}")
        for name, (value, least) in given.items()
    )
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
    values = total(scores)
    kept = random_subsets(values.shape[1], subsets, share, seed)
    actual = Trainings(retrain, seeds, path, workers, progress).measure(kept, len(values))
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
        ValueError: `examples` are no indices, nor a number of them.
    """
    values = total(scores)
    everything = torch.arange(values.shape[1])
    chosen = _left_out(examples, len(everything), seed)
    kept = [everything, *(everything[everything != k] for k in chosen)]
    found = Trainings(retrain, seeds, path, workers, progress).measure(kept, len(values))
    actual, predicted = found[1:] - found[0], values[:, chosen].mT
    return Correlation(two_way_interval(pearson, predicted, actual), pearson(predicted, actual), predicted, actual)


def _left_out(examples: Sequence[int] | Tensor | int, size: int, seed: int) -> Tensor:
    """Indices of the examples to leave out; ValueError, before anything is trained, if they are none."""
    several = isinstance(examples, Sequence) or getattr(examples, "ndim", 0)
    if isinstance(examples, str) or not several:
        count = require_integer("examples", examples, 1, "give indices, or how many, an integer of at least 1")
        return torch.randperm(size, generator=torch.Generator("cpu").manual_seed(seed))[:count]
    remedy = f"give indices from 0 to {size - 1}"
    indices = [require_integer("examples", k, 0, remedy) for k in np.asarray(examples).tolist()]
    if not indices or max(indices) >= size:
        raise ValueError(f"examples={indices}: {remedy}.")
    return torch.tensor(indices)


def mislabelled(scores: Tensor, wrong: Tensor, *, shares: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5)) -> Curve:
    """The share of wrong labels that is found when the data are inspected in the order of their scores.

    Args:
        scores: ``[N]``, such as self-scores or losses; the highest are inspected first.
        wrong: bool ``[N]``.
        shares: of the data that are inspected.

    Raises:
        DataError: the shapes differ, no label is wrong, or a score is NaN.
        ValueError: a share is not between 0 and 1.

    Example:
        >>> scores, wrong = torch.tensor([3.0, 9.0, 1.0, 2.0]), torch.tensor([False, True, False, False])
        >>> str(mislabelled(scores, wrong, shares=[0.25]).intervals[0])
        '1.000 [0.207, 1.000]'
    """
    if scores.shape != wrong.shape or scores.dim() != 1 or not bool(wrong.any()):
        raise DataError(f"scores {list(scores.shape)} need one answer each, some of them true; {list(wrong.shape)}.")
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"shares={tuple(shares)}: each is a share of the data, between 0 and 1.")
    order = wrong.bool()[require_comparable(scores).argsort(descending=True, stable=True)]
    total = int(order.sum())
    found = [int(order[: round(share * len(order))].sum()) for share in shares]
    return Curve(tuple(shares), tuple(share_interval(number, total) for number in found))
