"""Exact Tikhonov damping."""

from dataclasses import dataclass

from kronfisher.fisher.damping.damping import Damping
from kronfisher.operators.operator import Operator

__all__ = ["Tikhonov"]


@dataclass(frozen=True)
class Tikhonov(Damping, kind="tikhonov"):
    """``X + λ·1``, exactly; the same as ``X + λ``. Through the eigenvectors, which copies with another λ share.

    Needs no floor: eigenvalues are nonnegative before λ is added to them. A warning tells when λ is below the rounding
    error of the largest of them.

    Example:
        >>> import torch
        >>> from kronfisher.operators import Diagonal
        >>> (Diagonal(torch.tensor([0.0, 1.0])) + Tikhonov(0.5)).inverse().diagonal()
        tensor([2.0000, 0.6667])
    """

    def damp(self, operator: Operator, value: float) -> Operator:
        """``X + λ·1``."""
        return operator.shifted(value)
