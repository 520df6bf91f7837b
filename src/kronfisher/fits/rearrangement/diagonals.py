"""ℛ(F) with a factor kept as its diagonal: the best product under that constraint."""

from collections.abc import Sequence

from torch import Tensor

from kronfisher.fits.rearrangement.rearranged import Rearranged
from kronfisher.fits.rearrangement.rows import dense_pieces
from kronfisher.layers.samples import Samples
from kronfisher.operators.factors import Factor

__all__ = ["Diagonals"]


class Diagonals(Rearranged):
    """Any T, factors as diagonals ``[H, D]`` where asked for; what is looked up in a table is never written out.

    Args:
        samples: some; their positions may differ.
        factor_shapes: of A and B, ``[H, D, D]`` or ``[H, D]``.
    """

    def __init__(self, samples: Sequence[Samples], factor_shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
        self.samples, self._factor_shapes = samples, factor_shapes
        self.shape = samples[0].shape

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._factor_shapes

    def like(self) -> Tensor:
        return self.samples[0].gradients

    def outputs(self, A: Tensor, odd: bool = False) -> Tensor:
        total, right = Factor.of(self.like().new_zeros(self.factor_shapes[1])), Factor.of(A)
        for use in self.samples:
            columns = use.activations.column_pieces(use.gradients, use.workspace) if right.is_diagonal else None
            if columns is not None:
                for places, rows in columns:
                    total.add_product_(A[:, places][..., None] * rows, rows)
                continue
            for a, g in dense_pieces(use):
                W = right.rotate(a) @ a.mT
                total.add_product_((W @ g).flatten(1, 2), g.flatten(1, 2))
        return total.complete_().tensor

    def inputs(self, B: Tensor, odd: bool = False) -> Tensor:
        total, left = Factor.of(self.like().new_zeros(self.factor_shapes[0])), Factor.of(B)
        for use in self.samples:
            columns = use.activations.column_pieces(use.gradients, use.workspace) if total.is_diagonal else None
            if columns is not None:
                for places, rows in columns:
                    total.tensor.index_add_(1, places, (left.rotate(rows[:, None])[:, 0] * rows).sum(-1))
                continue
            for a, g in dense_pieces(use):
                W = left.rotate(g) @ g.mT
                total.add_product_((W @ a).flatten(1, 2), a.flatten(1, 2))
        return total.complete_().tensor
