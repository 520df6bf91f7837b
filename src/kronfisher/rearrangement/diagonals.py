"""ℛ(F) with one side kept as its diagonal: the best product under that constraint."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kronfisher.indices import Indices
from kronfisher.rearrangement.maps import Rearranged
from kronfisher.samples import Samples, applied, chunks

__all__ = ["Diagonals"]


class Diagonals(Rearranged):
    """Any T, sides as diagonals ``[H, D]`` where asked for; what is looked up in a table is never written out.

    Args:
        samples: some; their positions may differ.
        sides: shapes of A and B, ``[H, D, D]`` or ``[H, D]``.
    """

    def __init__(self, samples: Sequence[Samples], sides: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
        self.samples, self.sides = samples, sides
        self.shape = samples[0].shape

    def like(self) -> Tensor:
        return self.samples[0].gradients

    def first(self) -> Tensor:
        heads, _, width = self.shape
        return self.like().new_ones(heads, width) if len(self.sides[0]) == 2 else super().first()

    def outputs(self, A: Tensor) -> Tensor:
        total = self.like().new_zeros(self.sides[1])
        for several in self.samples:
            if A.dim() == 2 and isinstance(several.activations, Indices):
                for places, rows in _gathered(several):
                    _add(total, A[:, places][..., None] * rows, rows)
                continue
            for a, g in _pieces(several):
                W = _times(a, A) @ a.mT
                _add(total, (W @ g).flatten(1, 2), g.flatten(1, 2))
        return total

    def inputs(self, B: Tensor) -> Tensor:
        total = self.like().new_zeros(self.sides[0])
        for several in self.samples:
            if total.dim() == 2 and isinstance(several.activations, Indices):
                for places, rows in _gathered(several):
                    total.index_add_(1, places, (_times(rows[:, None], B)[:, 0] * rows).sum(-1))
                continue
            for a, g in _pieces(several):
                W = _times(g, B) @ g.mT
                _add(total, (W @ a).flatten(1, 2), a.flatten(1, 2))
        return total


def _pieces(samples: Samples) -> Iterator[tuple[Tensor, Tensor]]:
    for piece in samples.pieces():
        yield piece.activations.dense(), piece.gradients


def _times(rows: Tensor, side: Tensor) -> Tensor:
    return applied(rows, side) if side.dim() == 3 else rows * side[:, None, None]


def _add(total: Tensor, x: Tensor, y: Tensor) -> None:
    """``total += xᵀ y``, or the diagonal of that."""
    total += x.mT @ y if total.dim() == 3 else (x * y).sum(1)


def _gathered(samples: Samples) -> Iterator[tuple[Tensor, Tensor]]:
    """Columns of the gradients G_k that are not zero, some samples at a time: places ``[R]`` and they ``[1, R, O]``."""
    size = 4 * samples.gradients.element_size() * samples.gradients[0, 0].numel()
    inputs = samples.activations
    assert isinstance(inputs, Indices)
    for low, high in chunks(len(samples), size * inputs.values.shape[2], samples.workspace):
        part = inputs.part(low, high)
        several = part.values.shape[2]
        owners = torch.arange(high - low, device=part.values.device).view(-1, 1, 1).expand_as(part.values)
        places, inverse = (owners * part.width + part.values).flatten().unique(return_inverse=True)
        rows = samples.gradients[0, low:high, :, None].expand(-1, -1, several, -1) * part.weights[..., None]
        sums = rows.new_zeros(len(places), rows.shape[-1]).index_add_(0, inverse, rows.flatten(0, 2))
        yield places % part.width, sums[None]
