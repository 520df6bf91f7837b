"""Preconditioned queries ``P = (F + λ)⁻¹ ∇m`` and self-scores, through the structure of every block of F."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kronfisher.errors import SingularError
from kronfisher.fisher import Fisher
from kronfisher.fisher.blocks import Block, Key
from kronfisher.fisher.layout import Blocks, block_name, gather
from kronfisher.fisher.owned_precision import agree, precision_of
from kronfisher.fits.quadratic_forms import factored, quadratics
from kronfisher.influence.contractions import Apart, LowRank, gradient_norms
from kronfisher.influence.vectors import Rows, Vectors, add_gradients_
from kronfisher.layers.samples import Samples
from kronfisher.linalg import chunks
from kronfisher.operators.owned import Owned

__all__ = ["Damped", "Queries", "written_out"]

_ROOM = 2**25  # bytes of temporaries while queries are solved


class Damped:
    """``F + λ`` of every block.

    Args:
        fisher: F, a mean over examples.
        damping: λ of every entry.

    Attributes:
        fisher: F.
        damping: λ of every entry.
        precisions: c X + λ of every entry, with c = 1.
        open: numbers of the entries that are zero (a share of zero damps nothing): no training example moves there.
    """

    def __init__(self, fisher: Fisher, damping: Sequence[float]) -> None:
        self.fisher, self.damping = fisher, tuple(damping)
        self.precisions = [
            precision_of(op, 1.0, torch.tensor(value, dtype=op.dtype, device=op.device), op.name)
            for (_, op), value in zip(fisher.entries, damping, strict=True)
        ]
        entries = enumerate(zip(fisher.entries, damping, strict=True))
        self.open = {n for n, ((_, operator), value) in entries if value == 0 and not float(operator.trace()) > 0}

    def agree_on_queries(self, batch: Any) -> None:
        """Where ranks hold blocks apart, require that all of them solve the same queries; see `read` for None."""
        agree(self.precisions, "the queries", batch)

    def agree_on_data(self, batch: Any) -> None:
        """Where ranks hold blocks apart, require that all of them read the same training data."""
        agree(self.precisions, "the training data (of refined, normalised and self-scores)", batch)

    @contextmanager
    def advice(self, number: int) -> Iterator[None]:
        """Say how a block without an inverse is damped here: the Fisher itself has to come as it was estimated."""
        try:
            yield
        except SingularError as error:
            name = block_name(self.fisher.entries[number][0])
            raise type(error)(
                f"{error} Influence adds it: λ was {self.damping[number]:.3g} here; give "
                f"damping={{{name!r}: λ, '*': kf.Share(0.1)}}, or a damping for all blocks."
            ) from error

    def solve_(self, vectors: Vectors) -> Tensor:
        """Replace K vectors by ``(F + λ)⁻¹`` times them, a few at a time: as much memory again is not needed.

        Returns:
            ``vᵀ (F + λ)⁻¹ v`` ``[K]``.

        Raises:
            SingularError: λ is zero, and a block has no inverse. IndefiniteError: nor has a sum of products that is
                indefinite.
        """
        products = vectors.parts[0].new_zeros(len(vectors))
        for number, (part, precision) in enumerate(zip(vectors.parts, self.precisions, strict=True)):
            if not bool(part.any()):  # a parameter that nothing depends on has no inverse
                continue
            for low, high in chunks(len(part), 4 * part[0].nbytes, _ROOM):
                given = part[low:high]
                with self.advice(number):
                    solved = precision.solves(given.to(precision.operator.dtype)).to(given.dtype)
                products[low:high] += (given * solved).sum(1)
                given.copy_(solved)
        return products

    def solved(self, block: Block, samples: Samples) -> Tensor | None:
        """``(F + λ)⁻¹ vec(G_k)`` ``[n, D]``, where inputs and output gradients are rotated at less cost than G is.

        None: where they are not, or the block shares an operator of F with others, or has no basis of factors.
        """
        same = [k for k, (mine, _) in enumerate(self.fisher.entries) if [own.key for own in mine] == [block.key]]
        _, outputs, inputs = samples.shape
        if not same or samples.positions * (outputs**2 + inputs**2) > outputs * inputs * (outputs + inputs):
            return None
        (mine, operator), precision = self.fisher.entries[same[0]], self.precisions[same[0]]
        if isinstance(operator, Owned):  # its basis is at one rank
            return None
        if operator.dtype != samples.gradients.dtype or not float(operator.trace()) > 0:
            return None
        with self.advice(same[0]):
            found = factored(precision, mine, samples)
        if found is None:
            return None
        basis, weights = found
        written = samples.rotated(basis.A, basis.B)
        return torch.cat([basis.back((G * weights[:, None]).transpose(0, 1).flatten(1)) for G in written])

    def solve(self, rows: Mapping[str, Tensor]) -> Rows:
        """``(F + λ)⁻¹`` times K vectors ``{name: [K, *shape]}``; raises as `solve_`."""
        given = Vectors.of_rows(self.fisher, rows)
        own = Vectors(self.fisher, tuple(part.clone() for part in given.parts))
        self.solve_(own)
        return own.rows()

    def together(self, blocks: Sequence[Block]) -> list[Blocks]:
        """Groups of blocks whose gradients an operator of F, or several that share parameters, treat together."""
        keys = {block.key: block for block in blocks}
        alike = [mine for mine, _ in self.fisher.entries if all(block.key in keys for block in mine)]
        while True:  # an operator whose parameters other blocks use as well is not enough for their products
            covered = {block.key for mine in alike for block in mine}
            left = [block for key, block in keys.items() if key not in covered]
            shared = {name for block in left for name in block.parameters}
            alone = [mine for mine in alike if not shared & _names(mine)]
            if len(alone) == len(alike):
                break
            alike = alone
        parts = [(_names((block,)), [block]) for block in left]
        for mine, _ in self.fisher.entries:
            met = [part for part in parts if part[0] & _names(mine)]
            if len(met) > 1:  # one operator ties them together
                parts = [part for part in parts if part not in met]
                parts.append((set().union(*(names for names, _ in met)), [block for _, some in met for block in some]))
        matched = [tuple(keys[block.key] for block in mine) for mine in alike]
        return [*matched, *(tuple(some) for _, some in parts)]

    def self_products(self, blocks: Blocks, samples: tuple[Samples, ...]) -> Tensor:
        """``vec(G_k)ᵀ (F + λ)⁻¹ vec(G_k)`` ``[n]`` of a group that `together` made."""
        keys = [block.key for block in blocks]
        for number, ((mine, _), precision) in enumerate(zip(self.fisher.entries, self.precisions, strict=True)):
            if [block.key for block in mine] == keys:
                if number in self.open and not any(bool(gradient_norms(use).any()) for use in samples):
                    return samples[0].gradients.new_zeros(len(samples[0]))
                with self.advice(number):
                    return quadratics(samples, precision, mine)
        parts = []
        for vectors in self.written(blocks, samples):
            total = samples[0].gradients.new_zeros(len(next(iter(vectors.values()))))
            for number, rows in vectors.items():
                if bool(rows.any()):
                    with self.advice(number):
                        total += (rows * self.precisions[number].solves(rows)).sum(1).to(total.dtype)
            parts.append(total)
        return torch.cat(parts)

    def tied(self, blocks: Sequence[Block]) -> list[int]:
        """The numbers of F's entries that have a parameter in common with some blocks."""
        names = _names(blocks)
        return [number for number, (mine, _) in enumerate(self.fisher.entries) if _names(mine) & names]

    def written(self, blocks: Blocks, samples: tuple[Samples, ...]) -> Iterator[dict[int, Tensor]]:
        """Gradients of a group that `together` made, in the form of the entries of F that it is `tied` to.

        Yields:
            For a few examples at a time: number of the entry → canonical rows of all its blocks ``[n', D]``.
        """
        numbers, like = self.tied(blocks), samples[0].gradients
        # An operator may tie in parameters that this batch does not use: their gradients are zero.
        entries = [self.fisher.entries[number] for number in numbers]
        every = _names(blocks).union(*(_names(mine) for mine, _ in entries))
        size = 4 * like.element_size() * sum(self.fisher.shapes[name].numel() for name in every)
        for low, high in chunks(len(samples[0]), size, samples[0].workspace):
            rows = {name: like.new_zeros(high - low, *self.fisher.shapes[name]) for name in every}
            for block, use in zip(blocks, samples, strict=True):
                add_gradients_(rows, block, written_out(use.part(low, high)))
            yield {n: gather(mine, rows).to(own.dtype) for n, (mine, own) in zip(numbers, entries, strict=True)}


def _names(blocks: Sequence[Block]) -> set[str]:
    return {name for block in blocks for name in block.parameters}


def written_out(samples: Samples) -> Tensor:
    """``vec(G_k)`` ``[n, H·O·I]``."""
    return torch.cat([G.transpose(0, 1).flatten(1) for G in samples.per_sample()])


class Queries:
    """Preconditioned queries, in the canonical form of whichever block asks.

    Args:
        vectors: Q of them; their memory may be rearranged.
        rank: truncates the matrix of every query and block to it; None: whole.
    """

    def __init__(self, vectors: Vectors, rank: int | None = None) -> None:
        self.vectors, self.rank = vectors, rank
        self._made: dict[Key, Tensor | LowRank] = {}
        self._apart: dict[Key, Apart | None] = {}

    def of(self, block: Block) -> Tensor | LowRank:
        """``[Q, H, O, I]``, or of low rank where that is less than full."""
        if block.key not in self._made:
            if not self.vectors.holds(block):  # then its numbers are read from those of others
                for key in list(self._apart):
                    self._put_back(key)
            matrices = self.vectors.of(block)
            low = self.rank is not None and self.rank < min(block.shape[1:])
            self._made[block.key] = LowRank.of(matrices, self.rank) if low and self.rank else matrices
        self._put_back(block.key)
        return self._made[block.key]

    def for_products(self, block: Block, samples: Samples) -> Tensor | LowRank | Apart:
        """As `of`, or with the column of the bias apart, where products with these samples then take less time."""
        if self.rank is not None or not Apart.suits(samples):
            return self.of(block)
        if block.key not in self._apart:
            place = self.vectors.place(block)
            self._apart[block.key] = None if place is None else Apart.of_(place, block.shape)
        return self._apart[block.key] or self.of(block)

    def _put_back(self, key: Key) -> None:
        if (apart := self._apart.get(key)) is not None:
            del self._apart[key]
            apart.back_()
