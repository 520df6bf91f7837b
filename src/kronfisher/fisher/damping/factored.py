"""Factored Tikhonov damping of Kronecker products (Martens & Grosse 2015, section 6.3)."""

from dataclasses import dataclass

from kronfisher.fisher.damping.damping import Damping
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
        >>> import torch
        >>> from kronfisher.operators import Kronecker
        >>> X = Kronecker(A=torch.tensor([[[4.0]]]), B=torch.tensor([[[1.0]]]))
        >>> (X + FactoredTikhonov(1.0)).to_dense()  # pi = 2: (4 + 2) * (1 + 1/2)
        tensor([[9.]])
    """

    def damp(self, operator: Operator, value: float) -> Operator:
        """The damped product, sum with its first term damped, or eigenvalues; ``X + λ·1`` for any other structure.

        Warns:
            NumericalWarning: λ was raised to the floor, or is below the precision of an exactly damped operator.
        """
        return operator.factored_damping(value)
