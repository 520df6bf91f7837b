"""Inputs that are rows of the identity, or weighted sums of a few, as of a lookup in a table; stored as indices."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kronfisher.layers.activations import Activations
from kronfisher.linalg import WORKSPACE, chunks

__all__ = ["Indices"]


@dataclass(frozen=True)
class Indices(Activations):
    """``a[k, t] = Σ_j w[k, t, j] e_{i[k, t, j]}`` with unit vectors e: J = 1 for an embedding, more for a bag of them.

    Attributes:
        values: the indices i, ``[n, T, J]``.
        weights: w, ``[n, T, J]``; zero for entries that do not count.
        width: I, the rows of the table.

    Example:
        >>> inputs = Indices(torch.tensor([[[2], [0]]]), torch.ones(1, 2, 1), 3)
        >>> inputs.dense()[0, 0].tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """

    onehot = True

    values: Tensor
    weights: Tensor
    width: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        samples, positions, _ = self.values.shape
        return 1, samples, positions, self.width

    @property
    def numel(self) -> int:
        return self.values.numel() + self.weights.numel()

    def part(self, low: int, high: int) -> "Indices":
        return replace(self, values=self.values[low:high], weights=self.weights[low:high])

    def select(self, index: Tensor) -> "Indices":
        return replace(self, values=self.values[index], weights=self.weights[index])

    def dense(self, low: int = 0, high: int | None = None) -> Tensor:
        values, weights = self.values[low:high], self.weights[low:high]
        return weights.new_zeros(*values.shape[:2], self.width).scatter_add_(2, values, weights)[None]

    def times(self, matrix: Tensor, low: int = 0, high: int | None = None) -> Tensor:
        values, weights = self.values[low:high], self.weights[low:high].to(matrix.dtype)
        return (matrix[0][values] * weights[..., None]).sum(dim=2)[None]

    def copy(self) -> "Indices":
        return replace(self, values=self.values.clone(), weights=self.weights.clone())

    def add_covariance_(self, total: Tensor, workspace: int = WORKSPACE) -> None:
        if self.values.shape[2] == 1:
            self.add_squares_(total.diagonal(dim1=1, dim2=2), workspace)
        else:
            super().add_covariance_(total, workspace)

    def column_pieces(self, gradients: Tensor, workspace: int) -> Iterator[tuple[Tensor, Tensor]]:
        size = 4 * gradients.element_size() * gradients[0, 0].numel() * self.values.shape[2]
        ranges = chunks(len(self.values), size, workspace)
        return (self.part(low, high).columns(gradients[:, low:high]) for low, high in ranges)

    def add_squares_(self, total: Tensor, workspace: int = WORKSPACE) -> None:
        positions = torch.arange(self.values[..., 0].numel(), device=self.values.device).view(*self.values.shape[:2], 1)
        ones = self.weights.new_ones(()).expand(*self.values.shape, 1)
        self._add_squares(total[0, :, None], positions.expand_as(self.values), ones, slice(None))

    def reduce(self, workspace: int = WORKSPACE) -> "Indices":
        return Indices(self.values.flatten(1)[:, None], self.weights.flatten(1)[:, None], self.width)

    def apply_mask(self, mask: Tensor) -> "Indices":
        return replace(self, weights=self.weights * mask.to(self.weights.dtype)[..., None])

    def scale(self, factor: Tensor) -> "Indices":
        return replace(self, weights=self.weights * factor[0].to(self.weights.dtype)[self.values])

    def squares(self, gradients: Tensor, workspace: int) -> Tensor:
        total = gradients.new_zeros(self.width, gradients.shape[-1])
        samples, _, entries = self.values.shape
        for low, high in chunks(samples, 3 * entries * gradients[0, 0].numel() * gradients.element_size(), workspace):
            some = slice(low, high)
            examples = torch.arange(high - low, device=self.values.device).view(-1, 1, 1).expand_as(self.values[some])
            rows = gradients[0, some, :, None].expand(-1, -1, entries, -1)
            self._add_squares(total, examples, rows, some)
        return total.mT[None]

    def columns(self, gradients: Tensor) -> tuple[Tensor, Tensor]:
        n, _, entries = self.values.shape
        examples = torch.arange(n, device=self.values.device).view(-1, 1, 1).expand_as(self.values)
        places, inverse = (examples * self.width + self.values).flatten().unique(return_inverse=True)
        rows = gradients[0, :, :, None].expand(-1, -1, entries, -1) * self.weights[..., None].to(gradients.dtype)
        sums = rows.new_zeros(len(places), rows.shape[-1]).index_add_(0, inverse, rows.flatten(0, 2))
        return places % self.width, sums[None]

    def _add_squares(self, total: Tensor, examples: Tensor, rows: Tensor, some: slice) -> None:
        """``total[i] += Σ_example (Σ w · row over the example's entries with index i)∘²``, ``[I, O]``."""
        values, weights = self.values[some], self.weights[some].to(total.dtype)
        places, inverse = (examples * self.width + values).flatten().unique(return_inverse=True)
        sums = total.new_zeros(len(places), total.shape[1])
        sums.index_add_(0, inverse, (rows.to(total.dtype) * weights[..., None]).flatten(0, 2))
        total.index_add_(0, places % self.width, sums.square())

    @classmethod
    def concatenate(cls, inputs: Sequence["Indices"]) -> "Indices | None":
        if len({each.values.shape[2] for each in inputs}) > 1:
            return None
        values = torch.cat([each.values for each in inputs], dim=1)
        return Indices(values, torch.cat([each.weights for each in inputs], dim=1), inputs[0].width)
