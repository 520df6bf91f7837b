"""ℛ(F) with one side kept as its diagonal: the best product under that constraint."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from kronfisher.fits.rearrangement.rearranged import Rearranged
from kronfisher.fits.rearrangement.rows import dense_pieces
from kronfisher.layers.onehot import Indices
from kronfisher.layers.samples import Samples
from kronfisher.linalg import chunks
from kronfisher.operators.factors import Factor

__all__ = ["Diagonals"]


class Diagonals(Rearranged):
    """Any T, sides as diagonals ``[H, D]`` where asked for; what is looked up in a table is never written out.

    Args:
        samples: some; their positions may differ.
        sides: shapes of A and B, ``[H, D, D]`` or ``[H, D]``.
    """

    def __init__(self, samples: Sequence[Samples], sides: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
        self.samples, self._factor_shapes = samples, sides
        self.shape = samples[0].shape

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._factor_shapes

    def like(self) -> Tensor:
        return self.samples[0].gradients

    def outputs(self, A: Tensor, odd: bool = False) -> Tensor:
        total, right = Factor.of(self.like().new_zeros(self.factor_shapes[1])), Factor.of(A)
        for several in self.samples:
            if right.is_diagonal and isinstance(several.activations, Indices):
                for places, rows in _nonzero_columns(several):
                    total.add_product_(A[:, places][..., None] * rows, rows)
                continue
            for a, g in dense_pieces(several):
                W = right.rotate(a) @ a.mT
                total.add_product_((W @ g).flatten(1, 2), g.flatten(1, 2))
        return total.complete_().tensor

    def inputs(self, B: Tensor, odd: bool = False) -> Tensor:
        total, left = Factor.of(self.like().new_zeros(self.factor_shapes[0])), Factor.of(B)
        for several in self.samples:
            if total.is_diagonal and isinstance(several.activations, Indices):
                for places, rows in _nonzero_columns(several):
                    total.tensor.index_add_(1, places, (left.rotate(rows[:, None])[:, 0] * rows).sum(-1))
                continue
            for a, g in dense_pieces(several):
                W = left.rotate(g) @ g.mT
                total.add_product_((W @ a).flatten(1, 2), a.flatten(1, 2))
        return total.complete_().tensor


def _nonzero_columns(samples: Samples) -> Iterator[tuple[Tensor, Tensor]]:
    """Columns of the gradients G_k that are not zero, some samples at a time: places ``[R]`` and they ``[1, R, O]``."""
    assert isinstance(samples.activations, Indices)
    several = samples.activations.values.shape[2]
    size = 4 * samples.gradients.element_size() * samples.gradients[0, 0].numel() * several
    for low, high in chunks(len(samples), size, samples.workspace):
        yield samples.activations.part(low, high).columns(samples.gradients[:, low:high])
