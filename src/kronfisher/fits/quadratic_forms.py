"""Quadratic forms ``vec(G)ᵀ Λ⁻¹ vec(G)`` of per-example gradients ``G = Σ_t g aᵀ``, through the structure of Λ.

H groups, O outputs and I inputs of a block, T positions, n examples, C outputs of the network, D = H·O·I.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kronfisher.fisher.precision import Group, Precision
from kronfisher.layers.onehot import Indices
from kronfisher.layers.samples import Samples
from kronfisher.linalg import chunks
from kronfisher.operators import KroneckerBasis

__all__ = ["factored", "pairs", "products", "quadratics"]


def quadratics(samples: tuple[Samples, ...], precision: Precision, blocks: Group) -> Tensor:
    """``vec(G_k)ᵀ Λ⁻¹ vec(G_k)`` of every sample k, ``[n]``."""
    return precision.where_held(lambda own: _quadratics(samples, own, blocks))


def _quadratics(samples: tuple[Samples, ...], precision: Precision, blocks: Group) -> Tensor:
    parts: list[Tensor] = []
    if (found := factored(precision, blocks, samples[0])) is None:
        for rows in _rows([samples], precision.operator.dim):
            rows = rows[:, 0].to(precision.operator.dtype)
            parts.append((rows * precision.solves(rows)).sum(1))
        return torch.cat(parts)
    basis, weights = found
    lookup = _is_lookup(samples[0]) and basis.input_factor.is_diagonal  # rotated by a matrix they are rows of it
    if samples[0].positions > 1 and not lookup:
        written = samples[0].rotated(basis.A, basis.B)
        return torch.cat([(G.square() * weights[:, None]).sum(dim=(0, 2, 3)) for G in written])
    for piece in samples[0].rotate(basis.A, basis.B):
        if lookup:
            parts.append(_lookup_pairs([piece.gradients], piece, weights)[:, 0, 0])
        else:
            a, g = piece.activations.dense()[:, :, 0].square(), piece.gradients[:, :, 0].square()
            parts.append(((g @ weights) * a).sum(dim=(0, 2)))
    return torch.cat(parts)


def pairs(kept: list[tuple[Samples, ...]], precision: Precision, blocks: Group) -> Tensor:
    """``vec(G_kc)ᵀ Λ⁻¹ vec(G_kd)`` for all outputs c, d of every sample k, ``[n, C, C]``."""
    first = kept[0][0]
    found = factored(precision, blocks, first)
    if found is not None and (first.positions == 1 or _is_lookup(first)):
        basis, weights = found
        gradients = [basis.output_factor.rotate(use.gradients) for (use,) in kept]
        if _is_lookup(first) and basis.input_factor.is_diagonal:
            scaled = replace(first, activations=first.activations.scale(basis.A))
            return _lookup_pairs(gradients, scaled, weights)
        if first.positions == 1:
            pieces = [piece.activations.dense()[:, :, 0].square() for piece in first.rotate(basis.A, None)]
            middle = torch.cat(pieces, dim=1) @ weights.mT  # [H, n, O]
            g = torch.cat(gradients, dim=2)  # [H, n, C, O]
            return ((g * middle[:, :, None]) @ g.mT).sum(0)
    parts = []
    for rows in _rows(kept, precision.operator.dim):
        flat = rows.flatten(0, 1).to(precision.operator.dtype)
        solved = precision.solves(flat).reshape(rows.shape)
        parts.append(flat.reshape(rows.shape) @ solved.mT)
    return torch.cat(parts)


def _is_lookup(samples: Samples) -> bool:
    """Whether each input is one row of a table."""
    return isinstance(samples.activations, Indices) and samples.activations.values.shape[2] == 1


def _lookup_pairs(gradients: list[Tensor], samples: Samples, weights: Tensor) -> Tensor:
    """As `pairs` where inputs are single rows i of a table, and never as wide as it: only equal rows meet."""
    inputs = samples.activations
    assert isinstance(inputs, Indices)
    index, size = inputs.values[..., 0], inputs.weights[..., 0].to(weights.dtype)
    meet = (index[:, :, None] == index[:, None, :]).to(weights.dtype)  # [n, T, T]
    each = weights[0].mT[index]  # [n, T, O]
    g = torch.stack([rows[0] * size[..., None] for rows in gradients], dim=1)  # [n, C, T, O]
    other = meet[:, None] @ g
    return (g * each[:, None]).flatten(2) @ other.flatten(2).mT


def products(samples: Samples, matrices: Tensor) -> Tensor:
    """``⟨G_k, W_s⟩`` for every sample k and S matrices ``[S, H, O, I]``: ``[S, n]``, by ``Σ_t g · (W a)``."""
    groups, _, positions, outputs = samples.gradients.shape
    size = groups * positions * (samples.shape[2] + outputs) * samples.gradients.element_size()
    parts = []
    for low, high in chunks(len(samples), size, samples.workspace):
        g = samples.gradients[:, low:high]
        columns = [(samples.activations.times(W.mT.to(g), low, high) * g).sum(dim=(0, 2, 3)) for W in matrices]
        parts.append(torch.stack(columns))
    return torch.cat(parts, dim=1)


def factored(precision: Precision, blocks: Group, samples: Samples) -> tuple[KroneckerBasis, Tensor] | None:
    """K and 1/v ``[H, O, I]`` with ``Λ⁻¹ = K diag(1/v) Kᵀ``, for one block; a diagonal has the identity for K."""
    if len(blocks) > 1:
        return None
    like = samples.gradients
    if (own := precision.factored) is not None:
        basis, values = own
        return KroneckerBasis(basis.A.to(like), basis.B.to(like)), (1 / values).to(like)
    if (diagonal := precision.variances()) is not None:
        groups, outputs, inputs = samples.shape
        basis = KroneckerBasis(like.new_ones(groups, inputs), like.new_ones(groups, outputs))
        return basis, diagonal.to(like).reshape(samples.shape)
    return None


def _rows(kept: Sequence[tuple[Samples, ...]], dim: int) -> Iterator[Tensor]:
    """Gradients written out in canonical order, ``[n', C, D]`` for a few samples at a time and C outputs."""
    first = kept[0][0]
    size = 3 * len(kept) * dim * first.gradients.element_size()
    for low, high in chunks(len(first), size, first.workspace):
        columns = [torch.cat([_gradients(use, low, high) for use in samples], dim=1) for samples in kept]
        yield torch.stack(columns, dim=1)


def _gradients(samples: Samples, low: int, high: int) -> Tensor:
    a, g = samples.activations.dense(low, high), samples.gradients[:, low:high]
    return (g.mT @ a).transpose(0, 1).flatten(1)
