"""Inner products of the true block with an operator and with itself, from samples."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kronfisher.fits.rearrangement import Weights
from kronfisher.layers.samples import Samples
from kronfisher.linalg import chunks
from kronfisher.operators import Operator

__all__ = ["joint_quadratic", "squared_norm"]


def joint_quadratic(samples: Sequence[Samples], operator: Operator) -> Tensor:
    """``Σ_k v_kᵀ X v_k`` where ``v_k`` is ``vec(G_k)`` of all the blocks that X treats together, sorted by sample."""
    if len(samples) == 1:
        return operator.quadratic(samples[0])
    total = samples[0].gradients.new_zeros((), dtype=torch.float64)
    size = 4 * samples[0].gradients.element_size() * operator.dim
    for low, high in chunks(len(samples[0]), size, samples[0].workspace):
        rows = torch.cat([torch.cat(list(_rows([use.part(low, high)]))) for use in samples], dim=1)
        total += (rows * operator.matvecs(rows)).sum(dtype=torch.float64)
    return total


def squared_norm(samples: Sequence[Samples]) -> Tensor:
    """``‖Σ_k vec(G_k) vec(G_k)ᵀ‖² = Σ_{k,l} ⟨G_k, G_l⟩²`` with the cross terms of all groups, in float64."""
    if all(use.positions == 1 for use in samples):
        return torch.stack(Weights(samples).squared_products()).sum()
    total = samples[0].gradients.new_zeros((), dtype=torch.float64)
    for left in _rows(samples):
        for right in _rows(samples):
            total += (left @ right.mT).double().square().sum()
    return total


def _rows(samples: Sequence[Samples]) -> Iterator[Tensor]:
    """``vec(G_k) [n', H·O·I]``, some at a time."""
    for use in samples:
        for part in use.per_sample():
            yield part.transpose(0, 1).flatten(1)
