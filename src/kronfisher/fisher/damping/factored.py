"""Factored Tikhonov damping of Kronecker products (Martens & Grosse 2015, section 6.3)."""

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kronfisher.errors import NumericalWarning
from kronfisher.fisher.damping.damping import Damping
from kronfisher.operators.block_tridiagonal import Tridiagonal
from kronfisher.operators.eigen import Eigen, KroneckerBasis
from kronfisher.operators.kronecker import Kronecker
from kronfisher.operators.kronecker_sum import KroneckerSum
from kronfisher.operators.operator import Operator

__all__ = ["FactoredTikhonov"]


@dataclass(frozen=True)
class FactoredTikhonov(Damping, kind="factored"):
    """``(B + √λ/π·1) ⊗ (A + π√λ·1)`` with ``π² = (tr A / I) / (tr B / O)``: stays one product, so Cholesky inverts it.

    It is ``B ⊗ A + λ·1`` and two terms more, ``π√λ·B ⊗ 1 + √λ/π·1 ⊗ A``: an approximation with an inverse of its own.
    π makes it independent of how a scale is split between A and B. Groups are damped one by one. A product that is zero
    becomes ``λ·1``. Of a sum of products the first term is damped so: two terms keep an exact inverse. In a
    block-tridiagonal matrix each layer is damped so, the links stay as they are. Operators of any other structure get
    exact Tikhonov damping.

    Corrected eigenvalues S ``[H, O, I]`` (EKFAC) get what the product with their row and column sums would get:
    ``S + π√λ·b 1ᵀ + √λ/π·1 aᵀ + λ`` with ``b aᵀ = (S 1)(1ᵀ S) / Σ S``. Small eigenvalues are the worst known, and exact
    damping leaves those beside large ones (in the same row or column) as small as all others.

    λ is raised, with a warning, to ``(10 ε max(I, O))²`` times the mean eigenvalue of ``B ⊗ A`` (ε of the dtype) if it
    is smaller: the added diagonals would drown in the rounding errors of A and B.

    Example:
        >>> X = Kronecker(A=torch.tensor([[[4.0]]]), B=torch.tensor([[[1.0]]]))
        >>> (X + FactoredTikhonov(1.0)).to_dense()  # pi = 2: (4 + 2) * (1 + 1/2)
        tensor([[9.]])
    """

    def damp(self, operator: Operator, value: float) -> Operator:
        """The damped product, sum with its first term damped, or eigenvalues; ``X + λ·1`` for any other structure.

        Warns:
            NumericalWarning: λ was raised to the floor, or is below the precision of an exactly damped operator.
        """
        if isinstance(operator, KroneckerSum):
            return operator.with_first(self._product(operator.terms[0], value))
        if isinstance(operator, Eigen) and isinstance(operator.basis, KroneckerBasis) and not operator.form:
            return self._eigenvalues(operator, operator.basis, value)
        if isinstance(operator, Tridiagonal):
            return operator.with_layers(tuple(self._product(layer, value) for layer in operator.layers))
        if not isinstance(operator, Kronecker):
            return operator.shifted(value)
        return self._product(operator, value)

    def _eigenvalues(self, operator: Eigen, basis: KroneckerBasis, value: float) -> Eigen:
        values = operator.values.reshape(len(basis.A), basis.B.shape[1], basis.A.shape[1])
        rows, columns = values.mean(2, keepdim=True).clamp_min(0), values.mean(1, keepdim=True).clamp_min(0)
        mean = rows.mean(1, keepdim=True)
        root = torch.where(mean > 0, value / torch.where(mean > 0, mean, 1), 0).sqrt()  # balanced: a and b of one mean
        return replace(operator.shifted(value), values=(values + value + root * (rows + columns)).flatten())

    def _product(self, operator: Kronecker, value: float) -> Kronecker:
        left, right = operator.output_factor, operator.input_factor
        root_a, root_b = (factor.diagonal().mean(1).clamp_min(0).sqrt() for factor in (right, left))
        nonzero = (root_a > 0) & (root_b > 0)  # a factor of zero trace is zero, and so is the product
        ratio = torch.where(nonzero, root_a, 1) / torch.where(nonzero, root_b, 1)
        root = self._root(value, root_a * root_b, operator)
        return Kronecker(
            right.scaled(nonzero).shifted(ratio * root).tensor,  # the shift alone where the product is zero
            left.scaled(nonzero).shifted(root / ratio).tensor,
            operator.name,
            definite=True,
        )

    def _root(self, value: float, mean_root: Tensor, operator: Kronecker) -> Tensor:
        # √λ per group. The shift relative to the mean eigenvalue of its side is √(λ / mean of X) on both sides alike.
        width = max(operator.A.shape[1], operator.B.shape[1])
        floor = 10 * torch.finfo(operator.dtype).eps * width * mean_root
        root = torch.full_like(floor, value**0.5)
        if bool((root < floor).any()):
            lowest = float(floor.max().item()) ** 2
            warnings.warn(
                f"{operator.name or operator.structure}: λ = {value:.1e} is too small for {operator.dtype}; raised to "
                f"{lowest:.1e}. Use a larger λ or float64.",
                NumericalWarning,
                stacklevel=5,
            )
        return torch.maximum(root, floor)
