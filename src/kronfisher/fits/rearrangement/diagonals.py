"""ℛ(F) with a factor kept as its diagonal: the best product under that constraint."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kronfisher.fits.rearrangement.rearranged import Rearranged
from kronfisher.fits.rearrangement.rows import dense_pieces
from kronfisher.fits.rearrangement.source import Pair
from kronfisher.layers.activations import Dense
from kronfisher.layers.samples import Samples
from kronfisher.linalg import stable_norm
from kronfisher.operators.factors import Factor

__all__ = ["Diagonals"]

_KEPT, _MANY = 1024, 8  # numbers of a diagonal that tell a start, where it has so many times more


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

    def leading(self, start: Tensor | None = None, tolerance: float = 1e-3, iterations: int = 50) -> Pair:
        """From a start that the largest numbers of a long diagonal tell: few steps over all of them are left."""
        if start is None and (part := self._largest_rows()) is not None:
            found = part.leading(None, tolerance, iterations)
            start = found.A if found.A.dim() == 3 else self.inputs(found.B)
        return super().leading(start, tolerance, iterations)

    def _largest_rows(self) -> "Diagonals | None":
        """ℛ of the inputs or outputs with the largest numbers, where one factor alone is a diagonal and much longer."""
        left, right = (len(shape) == 2 for shape in reversed(self.factor_shapes))
        if (
            left == right
            or self.shape[1 if left else 2] <= _MANY * _KEPT
            or any(use.activations.onehot for use in self.samples)
        ):
            return None
        rows = [use.gradients if left else use.activations.dense() for use in self.samples]
        sizes = torch.stack([stable_norm(each.flatten(1, 2).mT) for each in rows]).amax(0)
        keep = sizes.topk(_KEPT, dim=1).indices  # [H, kept]
        parts = []
        for use, each in zip(self.samples, rows, strict=True):
            some = each.gather(-1, keep[:, None, None].expand(*each.shape[:-1], -1))
            parts.append(replace(use, gradients=some) if left else replace(use, activations=Dense(some)))
        shapes = list(self.factor_shapes)
        shapes[1 if left else 0] = tuple(keep.shape)
        return Diagonals(parts, (shapes[0], shapes[1]))

    def outputs(self, A: Tensor, odd: bool = False) -> Tensor:
        total, right = Factor.of(self.like().new_zeros(self.factor_shapes[1])), Factor.of(A)
        for use in self.samples:
            columns = use.activations.column_pieces(use.gradients, use.workspace) if right.is_diagonal else None
            if columns is not None:
                for places, rows in columns:
                    total.add_product_(A[:, places][..., None] * rows, rows)
                continue
            if self._shorter(use):
                for G in use.per_sample():
                    _add_products_(total, right.rotate(G).mT, G.mT)
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
            if self._shorter(use):
                for G in use.per_sample():
                    _add_products_(total, left.rotate(G.mT).mT, G)
                continue
            for a, g in dense_pieces(use):
                W = left.rotate(g) @ g.mT
                total.add_product_((W @ a).flatten(1, 2), a.flatten(1, 2))
        return total.complete_().tensor

    def _shorter(self, use: Samples) -> bool:
        """Whether the gradients written out are cheaper than ``[T, T]`` products, by multiplications in a half step."""
        widths = [shape[1] for shape in self.factor_shapes if len(shape) == 3]
        if len(widths) != 1:
            return False
        (width,), T, (_, O, I) = widths, use.positions, self.shape
        return O * I * (T + width) < T * T * (I + O) + T * width**2


def _add_products_(total: Factor, x: Tensor, y: Tensor) -> None:
    """``total += Σ_k xᵀ y`` for ``[H, n', R, D]``."""
    if total.is_diagonal:
        total.tensor.add_((x * y).sum((1, 2)))
    else:
        total.add_product_(x.flatten(1, 2), y.flatten(1, 2))
