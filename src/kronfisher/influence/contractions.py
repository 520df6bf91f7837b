"""Inner products ``⟨P_q, G_k⟩`` of preconditioned queries with per-example gradients ``G_k = Σ_t g aᵀ``.

For queries of low rank, ``P = U Vᵀ``, no gradient of an example is formed: ``Σ_t (g U)·(a V)`` costs r (I + O) a
position and query. At full rank G is formed once for a few examples at a time, and multiplied with all queries.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from kronfisher.layers.onehot import Indices
from kronfisher.layers.samples import Samples
from kronfisher.linalg import chunks

__all__ = ["LowRank", "by_position", "gradient_norms", "inner_products"]


@dataclass(frozen=True)
class LowRank:
    """Q matrices ``P_q = U_q V_qᵀ`` of a block.

    Attributes:
        U: ``[Q, H, O, r]``.
        V: ``[Q, H, I, r]``.
        discarded: ``‖P_q − U_q V_qᵀ‖`` ``[Q]``.
    """

    U: Tensor
    V: Tensor
    discarded: Tensor

    @classmethod
    def of(cls, matrices: Tensor, rank: int) -> "LowRank":
        """The best approximation of rank `rank` of matrices ``[Q, H, O, I]``, each H by itself."""
        U, S, Vh = torch.linalg.svd(matrices, full_matrices=False)
        discarded = torch.linalg.vector_norm(S[..., rank:], dim=(1, 2))
        return cls(U[..., :rank] * S[..., None, :rank], Vh[..., :rank, :].mT, discarded)

    def matrices(self) -> Tensor:
        """``[Q, H, O, I]``."""
        return self.U @ self.V.mT


def inner_products(samples: Samples, queries: Tensor | LowRank) -> Tensor:
    """``⟨P_q, G_k⟩`` ``[n, Q]`` for queries ``[Q, H, O, I]``; the cheaper way by multiplications."""
    _, outputs, inputs = samples.shape
    positions = samples.positions
    if isinstance(queries, LowRank):
        count, rank = len(queries.U), queries.U.shape[-1]
        formed = outputs * inputs * (positions + count)
        width = 1 if isinstance(samples.activations, Indices) else inputs
        if positions * count * rank * (width + outputs) < formed or isinstance(samples.activations, Indices):
            return _by_factors(samples, queries)
        queries = queries.matrices()
    queries = queries.to(samples.gradients)
    if isinstance(samples.activations, Indices) or (positions == 1 and len(queries) < inputs):
        return by_position(samples, queries).sum(1)  # as many multiplications, and less to write
    flat, room = queries.flatten(1).mT, samples.workspace  # many rows: all queries are read for each product
    return torch.cat([G.transpose(0, 1).flatten(1) @ flat for G in samples.per_sample(room)])


def by_position(samples: Samples, queries: Tensor) -> Tensor:
    """``g_tᵀ P_q a_t`` ``[n, T, Q]`` of every position alone, for queries ``[Q, H, O, I]``."""
    groups, positions, (count, _, outputs, inputs) = len(samples.gradients), samples.positions, queries.shape
    matrix = queries.to(samples.gradients).permute(1, 3, 0, 2).reshape(groups, inputs, count * outputs)
    size = 2 * groups * positions * count * outputs * samples.gradients.element_size()
    parts = []
    for low, high in chunks(len(samples), size, samples.workspace):
        rows = samples.activations.times(matrix, low, high).unflatten(-1, (count, outputs))
        parts.append((rows @ samples.gradients[:, low:high].unsqueeze(-1)).squeeze(-1).sum(0))
    return torch.cat(parts)


def _by_factors(samples: Samples, queries: LowRank) -> Tensor:
    """``Σ_t (g U)·(a V)``, with no gradient of an example formed."""
    count, groups, _, rank = queries.U.shape
    U, V = (
        factor.to(samples.gradients).permute(1, 2, 0, 3).reshape(groups, -1, count * rank)
        for factor in (queries.U, queries.V)
    )
    size = 3 * groups * samples.positions * count * rank * samples.gradients.element_size()
    parts = []
    for low, high in chunks(len(samples), size, samples.workspace):
        inputs = samples.activations.times(V, low, high)
        outputs = (samples.gradients[:, low:high].flatten(1, 2) @ U).unflatten(1, inputs.shape[1:3])
        products = inputs.mul_(outputs) if inputs.is_contiguous() else inputs * outputs
        parts.append(products.unflatten(-1, (count, rank)).sum(dim=(0, 2, 4)))
    return torch.cat(parts)


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
