"""Scores of queries and training data, and who comes first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kronfisher.errors import DataError, require_integer

__all__ = ["Scores", "Top"]


class Top(NamedTuple):
    """The first k of every query.

    Attributes:
        values: scores ``[Q, k]``.
        indices: examples' places in the training data ``[Q, k]``.
    """

    values: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Scores:
    """Scores of Q queries and N training examples; positive: the query's measurement rises if the example is left out.

    A positive score of a loss names a helpful example, a negative one a harmful example.

    Attributes:
        values: ``[Q, N]``; ``[Q, N, B]`` by blocks or groups of blocks, ``[Q, N, T]`` by positions.
        per: None, "block", "group" or "position".
        names: of the B blocks.
        bounds: ``[Q, N]``, on what truncated queries may have changed a score; None: nothing was truncated.
        fallback: parameter → why only per-example gradients cover it.
        residuals: ``[Q]``, relative residuals of the refined queries; None: they were not refined.
        settings: what the scores are of.

    Example:
        >>> import kronfisher as kf
        >>> scores = kf.Scores(torch.tensor([[[1.0, 2.0], [0.0, -3.0]]]), per="block", names=("0", "2"))
        >>> scores
        <Scores of 1 queries and 2 examples by block>
        >>> scores.total
        tensor([[ 3., -3.]])
    """

    values: Tensor
    per: str | None = None
    names: tuple[str, ...] = ()
    bounds: Tensor | None = None
    fallback: Mapping[str, str] = field(default_factory=dict)
    residuals: Tensor | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def total(self) -> Tensor:
        """``[Q, N]``, summed over blocks or positions."""
        return self.values if self.per is None else self.values.sum(-1)

    def top(self, k: int, *, lowest: bool = False) -> Top:
        """The k examples of the highest scores of every query, the highest first; or of the lowest.

        Raises:
            ValueError: k is no number of examples.

        Example:
            >>> Scores(torch.tensor([[1.0, 3.0, -2.0]])).top(2).indices
            tensor([[1, 0]])
        """
        size = self.values.shape[1]
        if require_integer("k", k, 1, f"use an integer from 1 to {size}, the number of training examples") > size:
            raise ValueError(f"k={k}: there are {size} training examples.")
        return Top(*self.total.topk(k, dim=1, largest=not lowest))

    def sum(
        self, *, data: Sequence[int] | Tensor | None = None, queries: Sequence[int] | Tensor | None = None
    ) -> "Scores":
        """Scores of groups: sums over the training examples, or the queries, of the same label.

        Args:
            data: a label from 0 for every training example.
            queries: a label from 0 for every query.

        Raises:
            DataError: there is not one label for each, or one is no integer of at least 0.

        Example:
            >>> Scores(torch.tensor([[1.0, 3.0, -2.0]])).sum(data=[0, 0, 1]).values
            tensor([[ 4., -2.]])
        """
        summed = self
        for axis, labels in ((0, queries), (1, data)):
            if labels is not None:
                bounds = None if summed.bounds is None else _sum(summed.bounds, axis, labels)
                residuals = summed.residuals if axis else None
                summed = replace(summed, values=_sum(summed.values, axis, labels), bounds=bounds, residuals=residuals)
        return summed

    def __repr__(self) -> str:
        by = f" by {self.per}" if self.per else ""
        return f"<Scores of {self.values.shape[0]} queries and {self.values.shape[1]} examples{by}>"


def _sum(values: Tensor, axis: int, labels: Sequence[int] | Tensor) -> Tensor:
    needs = f"groups of {'data' if axis else 'queries'} need a label, an integer from 0, for each of the"
    try:
        index = torch.as_tensor(labels, device=values.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{needs} {values.shape[axis]}; {error}. Number the groups from 0.") from error
    whole = not (index.is_floating_point() or index.is_complex())
    if not whole or index.shape != values.shape[axis : axis + 1] or bool((index < 0).any()):
        low = f", the least {index.min()}" if whole and index.numel() and index.min() < 0 else ""
        found = f"{list(index.shape)} of {index.dtype}{low}"
        raise DataError(f"{needs} {values.shape[axis]}; found {found}. Number the groups from 0.")
    index = index.long()
    shape = [*values.shape]
    shape[axis] = int(index.max()) + 1 if len(index) else 0
    return values.new_zeros(shape).index_add_(axis, index, values)
