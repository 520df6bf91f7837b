"""Inner products of the true block with an operator and with itself, from samples."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kronfisher.fits.rearrangement import Gram
from kronfisher.layers.samples import Samples
from kronfisher.linalg import chunks
from kronfisher.operators import Diagonal, Eigen, Kronecker, KroneckerBasis, KroneckerSum, Operator

__all__ = ["joint_quadratic", "quadratic", "squared_norm"]


def quadratic(samples: Samples, operator: Operator) -> Tensor:
    """``Σ_k vec(G_k)ᵀ X vec(G_k)``, through the structure of X where it has one."""
    if isinstance(operator, Kronecker):
        total = samples.gradients.new_zeros((), dtype=torch.float64)
        A, B = operator.input_factor.mT.tensor, operator.output_factor.mT.tensor
        if operator.input_factor.is_diagonal:
            (turned,) = samples.rotated(A, B)
            return samples.inner(turned)
        for plain, turned in zip(samples.pieces(), samples.rotated(A, B), strict=True):
            total += plain.inner(turned)
        return total
    if isinstance(operator, Eigen) and isinstance(operator.basis, KroneckerBasis):
        basis = operator.basis
        turned = torch.stack([part.squares().double() for part in samples.rotated(basis.A, basis.B)]).sum(dim=0)
        return (turned.flatten() * operator.values.double()).sum()
    if isinstance(operator, Diagonal):
        return (samples.squares().flatten().double() * operator.values.double()).sum()
    if isinstance(operator, KroneckerSum):
        total = torch.stack([quadratic(samples, term) for term in operator.terms]).sum()
        return total + operator.shift * samples.squares().sum(dtype=torch.float64)
    total = samples.gradients.new_zeros((), dtype=torch.float64)
    for gradients in samples.per_sample():
        rows = gradients.transpose(0, 1).flatten(1)
        total += (rows * operator.matvecs(rows)).sum(dtype=torch.float64)
    return total


def joint_quadratic(samples: Sequence[Samples], operator: Operator) -> Tensor:
    """``Σ_k v_kᵀ X v_k`` where ``v_k`` is ``vec(G_k)`` of all the blocks that X treats together, sorted by sample."""
    if len(samples) == 1:
        return quadratic(samples[0], operator)
    total = samples[0].gradients.new_zeros((), dtype=torch.float64)
    size = 4 * samples[0].gradients.element_size() * operator.dim
    for low, high in chunks(len(samples[0]), size, samples[0].workspace):
        rows = torch.cat([torch.cat(list(_rows([use.part(low, high)]))) for use in samples], dim=1)
        total += (rows * operator.matvecs(rows)).sum(dtype=torch.float64)
    return total


def squared_norm(samples: Sequence[Samples]) -> Tensor:
    """``‖Σ_k vec(G_k) vec(G_k)ᵀ‖² = Σ_{k,l} ⟨G_k, G_l⟩²`` with the cross terms of all groups, in float64."""
    if all(several.positions == 1 for several in samples):
        return torch.stack(Gram(samples).squared_products()).sum()
    total = samples[0].gradients.new_zeros((), dtype=torch.float64)
    for left in _rows(samples):
        for right in _rows(samples):
            total += (left @ right.mT).double().square().sum()
    return total


def _rows(samples: Sequence[Samples]) -> Iterator[Tensor]:
    """``vec(G_k) [n', H·O·I]``, some at a time."""
    for several in samples:
        for part in several.per_sample():
            yield part.transpose(0, 1).flatten(1)
