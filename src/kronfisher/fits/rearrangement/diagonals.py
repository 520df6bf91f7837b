"""ℛ(F) with one side kept as its diagonal: the best product under that constraint."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from kronfisher.fits.rearrangement.rearranged import Rearranged
from kronfisher.fits.rearrangement.rows import dense_pieces
from kronfisher.layers.onehot import Indices
from kronfisher.layers.samples import Samples
from kronfisher.linalg import add_symmetric_product_, chunks, completed_, turned

__all__ = ["Diagonals"]


class Diagonals(Rearranged):
    """Any T, sides as diagonals ``[H, D]`` where asked for; what is looked up in a table is never written out.

    Args:
        samples: some; their positions may differ.
        sides: shapes of A and B, ``[H, D, D]`` or ``[H, D]``.
    """

    def __init__(self, samples: Sequence[Samples], sides: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
        self.samples, self._sides = samples, sides
        self.shape = samples[0].shape

    @property
    def sides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._sides

    def like(self) -> Tensor:
        return self.samples[0].gradients

    def outputs(self, A: Tensor, odd: bool = False) -> Tensor:
        total = self.like().new_zeros(self.sides[1])
        for several in self.samples:
            if A.dim() == 2 and isinstance(several.activations, Indices):
                for places, rows in _gathered(several):
                    add_symmetric_product_(total, A[:, places][..., None] * rows, rows)
                continue
            for a, g in dense_pieces(several):
                W = turned(a, A) @ a.mT
                add_symmetric_product_(total, (W @ g).flatten(1, 2), g.flatten(1, 2))
        return completed_(total) if total.dim() == 3 else total

    def inputs(self, B: Tensor, odd: bool = False) -> Tensor:
        total = self.like().new_zeros(self.sides[0])
        for several in self.samples:
            if total.dim() == 2 and isinstance(several.activations, Indices):
                for places, rows in _gathered(several):
                    total.index_add_(1, places, (turned(rows[:, None], B)[:, 0] * rows).sum(-1))
                continue
            for a, g in dense_pieces(several):
                W = turned(g, B) @ g.mT
                add_symmetric_product_(total, (W @ a).flatten(1, 2), a.flatten(1, 2))
        return completed_(total) if total.dim() == 3 else total


def _gathered(samples: Samples) -> Iterator[tuple[Tensor, Tensor]]:
    """Columns of the gradients G_k that are not zero, some samples at a time: places ``[R]`` and they ``[1, R, O]``."""
    assert isinstance(samples.activations, Indices)
    several = samples.activations.values.shape[2]
    size = 4 * samples.gradients.element_size() * samples.gradients[0, 0].numel() * several
    for low, high in chunks(len(samples), size, samples.workspace):
        yield samples.activations.part(low, high).columns(samples.gradients[:, low:high])
