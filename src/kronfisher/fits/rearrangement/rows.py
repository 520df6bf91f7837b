"""Half steps for any number of positions: row by row, or with the gradients of samples written out."""

from collections.abc import Iterator, Sequence
from copy import copy

import torch
from torch import Tensor

from kronfisher.fits.rearrangement.parts import largest, share
from kronfisher.fits.rearrangement.rearranged import Rearranged
from kronfisher.fits.rearrangement.scales import reciprocal
from kronfisher.layers.samples import Samples
from kronfisher.linalg import WORKSPACE, add_symmetric_product_, complete_, multiply_rows

__all__ = ["Explicit", "Rows", "dense_pieces", "explicit_norm", "squared_products"]

_SMALL = 2**19  # bytes of gradients that are written out as one piece


def dense_pieces(samples: Samples) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and output gradients, some samples at a time."""
    for piece in samples.pieces():
        yield piece.activations.dense(), piece.gradients


class Rows(Rearranged):
    """Any T, through ``W_k [T, T]``; the gradients of samples are never written out.

    Args:
        samples: some; their positions may differ.
    """

    def __init__(self, samples: Sequence[Samples]) -> None:
        self.samples = samples
        self.shape = samples[0].shape

    def like(self) -> Tensor:
        return self.samples[0].gradients

    def outputs(self, A: Tensor, odd: bool = False) -> Tensor:
        total = self.like().new_zeros(self.factor_shapes[1])
        for a, g in (pair for use in self.samples for pair in dense_pieces(use)):
            W = multiply_rows(a, A) @ a.mT  # antisymmetric where A is: its transpose will not do
            add_symmetric_product_(total, g.flatten(1, 2), (W @ g).flatten(1, 2))
        return complete_(total, odd)

    def inputs(self, B: Tensor, odd: bool = False) -> Tensor:
        total = self.like().new_zeros(self.factor_shapes[0])
        for a, g in (pair for use in self.samples for pair in dense_pieces(use)):
            W = multiply_rows(g, B) @ g.mT
            add_symmetric_product_(total, a.flatten(1, 2), (W @ a).flatten(1, 2))
        return complete_(total, odd)

    def part(self) -> Rearranged:
        return Rows(largest(self.samples))

    def squared_norm(self, samples: Sequence[Samples], limit: int) -> Tensor | None:
        return explicit_norm(samples, limit)


class Explicit(Rearranged):
    """Any T, with the gradients of samples written out as ``[H, O, n, I]``, some at a time if they are many.

    Args:
        samples: some; their positions may differ.
        workspace: bytes that may be kept from one half step to the next.
    """

    def __init__(self, samples: Sequence[Samples], workspace: int = WORKSPACE) -> None:
        self.samples, self.workspace = samples, workspace
        self.shape = samples[0].shape
        groups, outputs, width = self.shape
        size = groups * outputs * width * sum(len(use) for use in samples) * self.like().element_size()
        self._kept = list(self._written_out()) if size <= workspace else None
        if self._kept is not None and size <= _SMALL:  # then calls count for more than the cache
            self._kept = [torch.cat(self._kept, dim=2)]

    def like(self) -> Tensor:
        return self.samples[0].gradients

    def _written_out(self) -> Iterator[Tensor]:
        for use in self.samples:
            for gradients in use.per_sample():
                yield gradients.transpose(1, 2).contiguous()

    def pieces(self) -> Iterator[Tensor]:
        """``[H, O, n', I]``, some samples at a time."""
        yield from self._written_out() if self._kept is None else self._kept

    def outputs(self, A: Tensor, odd: bool = False) -> Tensor:
        total = self.like().new_zeros(self.factor_shapes[1])
        for G in self.pieces():
            add_symmetric_product_(total, multiply_rows(G, A).flatten(2).mT, G.flatten(2).mT)
        return complete_(total, odd)

    def outputs_of_identity(self) -> Tensor:
        total = self.like().new_zeros(self.factor_shapes[1])
        for G in self.pieces():
            add_symmetric_product_(total, G.flatten(2).mT)
        return complete_(total)

    def inputs(self, B: Tensor, odd: bool = False) -> Tensor:
        total = self.like().new_zeros(self.factor_shapes[0])
        for G in self.pieces():
            add_symmetric_product_(total, G.flatten(1, 2), (B @ G.flatten(2)).view(G.shape).flatten(1, 2))
        return complete_(total, odd)

    def part(self) -> Rearranged:
        if self._kept is None:
            return Explicit(largest(self.samples), self.workspace)
        total, part = sum(map(len, self.samples)), copy(self)
        sizes = [torch.linalg.vector_norm(G, dim=(0, 1, 3)) for G in self._kept]
        places = [size.topk(share(len(size), total)).indices for size in sizes]
        part._kept = [G[:, :, some] for G, some in zip(self._kept, places, strict=True)]
        return part

    def squared_norm(self, samples: Sequence[Samples], limit: int) -> Tensor | None:
        if _pairs(samples) > limit:
            return None
        same, pairs = squared_products(self)
        return same + pairs


def squared_products(source: Explicit) -> tuple[Tensor, Tensor]:
    """``Σ_k ‖G_k‖⁴`` and ``Σ_{k≠l} ⟨G_k, G_l⟩²`` (over all groups together) of gradients written out, in float64."""
    rows = torch.cat([G.permute(2, 0, 1, 3).flatten(1) for G in source.pieces()])
    scale = torch.stack(rows.aminmax()).abs().amax()
    rows *= reciprocal(scale)
    products = add_symmetric_product_(rows.new_zeros(1, len(rows), len(rows)), rows.mT[None])[0]  # the upper triangle
    squares = products.triu_().square_()
    same, fourth = squares.diagonal().sum(dtype=torch.float64), scale.double() ** 4
    return same * fourth, 2 * (squares.sum(dtype=torch.float64) - same) * fourth


def explicit_norm(samples: Sequence[Samples], limit: int) -> Tensor | None:
    """``‖Σ_k vec(G_k) vec(G_k)ᵀ‖²`` by gradients written out; None where that takes more multiplications."""
    return Explicit(samples).squared_norm(samples, limit) if _pairs(samples) <= limit else None


def _pairs(samples: Sequence[Samples]) -> int:
    """Multiplications that the products of all pairs of gradients take."""
    n, (groups, outputs, inputs) = sum(map(len, samples)), samples[0].shape
    return n * groups * outputs * inputs * n
