"""Inner products ``⟨P_q, G_k⟩`` of preconditioned queries with per-example gradients ``G_k = Σ_t g aᵀ``.

For queries of low rank, ``P = U Vᵀ``, no gradient of an example is formed: ``Σ_t (g U)·(a V)`` costs r (I + O) a
position and query. At full rank G is formed once for a few examples at a time, and multiplied with all queries.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from kronfisher.layers.activations import Activations, Dense
from kronfisher.layers.onehot import Indices
from kronfisher.layers.samples import Samples
from kronfisher.linalg import chunks, eigh

__all__ = ["Apart", "LowRank", "by_position", "gradient_norms", "inner_products"]

_CACHE = 2**21  # bytes of temporaries that are read again at once
_ROOM = 2**25  # bytes of temporaries while queries are truncated
_BATCH = 128  # rows of a product that reads all queries
_BESIDE = 2  # numbers of a gradient written in the time that one is taken of products with queries, row by row


@dataclass(frozen=True)
class LowRank:
    """Q matrices ``P_q = U_q V_qᵀ`` of a block.

    Attributes:
        U: ``[H, O, Q·r]``.
        V: ``[H, I, Q·r]``.
        discarded: ``‖P_q − U_q V_qᵀ‖`` ``[Q]``.
    """

    U: Tensor
    V: Tensor
    discarded: Tensor

    @classmethod
    def of(cls, matrices: Tensor, rank: int) -> "LowRank":
        """The best approximation of rank `rank` of matrices ``[Q, H, O, I]``, each H by itself.

        It projects the shorter side onto the leading eigenvectors of its products, which cost much less than singular
        vectors. What it leaves out is measured and not derived, so that their rounding does not matter.
        """
        count, groups, outputs, inputs = matrices.shape
        U, V = (matrices.new_empty(groups, size, count, rank) for size in (outputs, inputs))
        discarded = matrices.new_empty(count)
        each = 4 * groups * outputs * inputs * matrices.element_size()
        for low, high in chunks(count, each, _ROOM):
            some = matrices[low:high]
            if outputs <= inputs:
                left = eigh(some @ some.mT, "a query")[1][..., -rank:]
                right = some.mT @ left
            else:
                right = eigh(some.mT @ some, "a query")[1][..., -rank:]
                left = some @ right
            discarded[low:high] = torch.linalg.vector_norm(some - left @ right.mT, dim=(1, 2, 3))
            U[:, :, low:high], V[:, :, low:high] = left.permute(1, 2, 0, 3), right.permute(1, 2, 0, 3)
        return cls(U.flatten(2), V.flatten(2), discarded)

    def __len__(self) -> int:
        return len(self.discarded)

    @property
    def rank(self) -> int:
        return self.U.shape[-1] // len(self)

    @cached_property
    def matrices(self) -> Tensor:
        """``[Q, H, O, I]``, for products with gradients written out; kept, as every batch needs them."""
        U, V = (factor.unflatten(2, (len(self), self.rank)).permute(2, 0, 1, 3) for factor in (self.U, self.V))
        return U @ V.mT


@dataclass(frozen=True)
class Apart:
    """Q whole matrices of a block, with the column of the bias after the others in the same memory.

    Gradients are then written out without that column. With it, every input would have to be copied first, and rows
    would be a number longer than a round width, which the products that make them take a sixth more time for.

    Attributes:
        rows: of every query, the matrix without its last column, and then that column ``[Q, H·O·I]``.
        shape: H, O, I.
    """

    rows: Tensor
    shape: tuple[int, int, int]

    @staticmethod
    def suits(samples: Samples) -> bool:
        """Whether gradients of these samples are written out, and have a column of a bias."""
        return samples.positions > 1 and isinstance(samples.activations, Dense) and samples.activations.bias

    @classmethod
    def of_(cls, rows: Tensor, shape: tuple[int, int, int]) -> "Apart":
        """Canonical rows ``[Q, H·O·I]``, rearranged where they are."""
        own = cls(rows, shape)
        for some in own._pieces():
            whole = some.clone().unflatten(1, (-1, shape[2]))
            own._columns(some).copy_(whole[..., :-1])
            own._last(some).copy_(whole[..., -1])
        return own

    def back_(self) -> Tensor:
        """Canonical rows again, where they were."""
        for some in self._pieces():
            given, whole = some.clone(), some.unflatten(1, (-1, self.shape[2]))
            whole[..., :-1] = self._columns(given)
            whole[..., -1] = self._last(given)
        return self.rows

    def products(self, samples: Samples) -> Tensor:
        """``⟨P_q, G_k⟩`` ``[n, Q]`` for samples that it suits."""
        assert isinstance(samples.activations, Dense)
        rows, g = self.rows.to(samples.gradients), samples.gradients
        plain = replace(samples, activations=replace(samples.activations, bias=False))
        found = _by_gradients(plain, rows[:, : self._split].mT)
        return found.addmm_(g.sum(2).transpose(0, 1).flatten(1), self._last(rows).mT)

    @property
    def _split(self) -> int:
        groups, outputs, inputs = self.shape
        return groups * outputs * (inputs - 1)

    def _columns(self, rows: Tensor) -> Tensor:
        """``[Q', H·O, I − 1]``."""
        return rows[:, : self._split].unflatten(1, (-1, self.shape[2] - 1))

    def _last(self, rows: Tensor) -> Tensor:
        """``[Q', H·O]``."""
        return rows[:, self._split :]

    def _pieces(self) -> Iterator[Tensor]:
        for low, high in chunks(len(self.rows), self.rows[0].nbytes, _ROOM):
            yield self.rows[low:high]


def inner_products(samples: Samples, queries: Tensor | LowRank | Apart) -> Tensor:
    """``⟨P_q, G_k⟩`` ``[n, Q]`` for queries ``[Q, H, O, I]``; the cheaper way by multiplications."""
    if isinstance(queries, Apart):
        return queries.products(samples)
    _, outputs, inputs = samples.shape
    positions, lookup = samples.positions, isinstance(samples.activations, Indices)
    if isinstance(queries, LowRank):
        formed = outputs * inputs * (positions + len(queries))
        if lookup or positions * len(queries) * queries.rank * (inputs + outputs) < formed:
            return _by_factors(samples, queries)
    matrices = queries if isinstance(queries, Tensor) else queries.matrices
    matrices = matrices.to(samples.gradients)
    if lookup or (positions == 1 and _BESIDE * len(matrices) < max(inputs, outputs)):
        return by_position(samples, matrices).sum(1)  # as many multiplications, and less to write
    return _by_gradients(samples, matrices.flatten(1).mT)


def _by_gradients(samples: Samples, matrix: Tensor) -> Tensor:
    """``[n, Q]`` of gradients written out for a few samples at a time, and a matrix ``[H·O·I, Q]``."""
    (groups, outputs, inputs), element = samples.shape, samples.gradients.element_size()
    rows = groups * inputs * (outputs + samples.positions) * element
    products = []
    for G in samples.per_sample(max(_BATCH * rows, 2**22)):  # many, because all queries are read for each product
        products.append(G.transpose(0, 1).flatten(1) @ matrix)
        del G  # or it would stay while the next ones are written
    return torch.cat(products)


def by_position(samples: Samples, queries: Tensor) -> Tensor:
    """``g_tᵀ P_q a_t`` ``[n, T, Q]`` of every position alone, for queries ``[Q, H, O, I]``."""
    queries, g = queries.to(samples.gradients), samples.gradients
    groups, (count, _, outputs, inputs) = len(g), queries.shape
    wide = outputs > 2 * inputs and groups == 1 and not isinstance(samples.activations, Indices)
    found = g.new_empty(len(samples), samples.positions, count)
    for low, high, some in _pieces(samples, min(outputs, inputs) if wide else outputs, count):
        rows, inputs_here = g[:, low:high], _times_faster(samples.activations, low, high)
        for first, last in some:
            if wide:
                products = rows[0].flatten(0, 1).expand(last - first, -1, -1) @ queries[first:last, 0]
                products *= inputs_here.dense()[0].flatten(0, 1)
                found[low:high, :, first:last] = products.sum(-1).mT.unflatten(0, rows.shape[1:3])
            else:  # the queries as they lie in memory
                matrix = queries[first:last].transpose(0, 1).reshape(groups, -1, inputs).mT
                products = inputs_here.times(matrix).unflatten(-1, (last - first, outputs))
                found[low:high, :, first:last] = _times(products, rows.unsqueeze(-2)).sum(dim=-1).sum(0)
    return found


def _by_factors(samples: Samples, queries: LowRank) -> Tensor:
    """``Σ_t (g U)·(a V)``, with no gradient of an example formed."""
    found, rank = samples.gradients.new_empty(len(samples), len(queries)), queries.rank
    for low, high, some in _pieces(samples, 2 * rank, len(queries)):
        rows, inputs = samples.gradients[:, low:high], _times_faster(samples.activations, low, high)
        for first, last in some:
            U, V = (factor[..., first * rank : last * rank].to(rows) for factor in (queries.U, queries.V))
            products = inputs.times(V)
            outputs = (rows.flatten(1, 2) @ U).unflatten(1, products.shape[1:3])
            products = products.mul_(outputs) if products.is_contiguous() else products * outputs
            found[low:high, first:last] = products.unflatten(-1, (last - first, rank)).sum(dim=(0, 2, 4))
    return found


def _times(products: Tensor, factor: Tensor) -> Tensor:
    """``x ∘ y``, in the place of x where it is not a view that repeats itself.

    The sum that follows takes a third of the time of as many products of a small matrix and a vector.
    """
    return products.mul_(factor) if products.is_contiguous() else products * factor


def _times_faster(activations: Activations, low: int, high: int) -> Activations:
    """Some of the inputs, for many products: a column of ones is cheaper than adding to each of these."""
    return Dense(activations.dense(low, high)) if isinstance(activations, Dense) else activations.part(low, high)


def _pieces(samples: Samples, width: int, count: int) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Ranges of samples, and of queries for each, for temporaries of some width for each position and query."""
    each = len(samples.gradients) * samples.positions * width * samples.gradients.element_size()
    room = min(samples.workspace, _CACHE) if samples.gradients.device.type == "cpu" else samples.workspace
    for low, high in chunks(len(samples), each, max(room, min(_BATCH * each, samples.workspace))):
        yield low, high, list(chunks(count, each * (high - low), room))


def gradient_norms(samples: Samples) -> Tensor:
    """An upper bound ``‖a_k‖ ‖g_k‖`` of ``‖G_k‖`` ``[n]``; equal for T = 1."""
    g = torch.linalg.vector_norm(samples.gradients, dim=3)  # [H, n, T]
    if isinstance(samples.activations, Indices):
        a = samples.activations.weights.abs().sum(2)[None]
    else:
        each = prod((len(g), samples.positions, samples.shape[2])) * samples.gradients.element_size()
        pieces = [
            torch.linalg.vector_norm(samples.activations.dense(low, high), dim=3)
            for low, high in chunks(len(samples), each, samples.workspace)
        ]
        a = torch.cat(pieces, dim=1)
    by_group = torch.linalg.vector_norm(a, dim=2) * torch.linalg.vector_norm(g, dim=2)
    return torch.linalg.vector_norm(by_group, dim=0)
