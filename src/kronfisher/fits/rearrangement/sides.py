"""Sides of Kronecker products as ``[H, ...]``: norms and scales of every group, and what a finished side has to be."""

import torch
from torch import Tensor

from kronfisher.linalg import eigh, mirror

__all__ = ["inverted", "norm", "over", "semidefinite", "times", "whole"]

_PIECE = 2**20  # numbers of a matrix that are scaled at once
_SHORT = 2**15  # and of one that is rather squared in float64


def norm(matrices: Tensor) -> Tensor:
    """Frobenius norms ``[H]`` of ``[H, ...]``; squares of entries of 1e-20, as late in training, do not vanish."""
    flat = matrices.flatten(1)
    if flat.dtype != torch.float64 and flat.shape[1] <= _SHORT:
        return torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64).to(flat.dtype)
    pieces = flat.split(_PIECE, dim=1)
    largest = torch.stack([part.abs().amax(1) for part in pieces]).amax(0)  # many times faster than the norm of order ∞
    parts = [torch.linalg.vector_norm(over(part, largest), dim=1) for part in pieces]
    return largest * (parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), dim=0))


def over(matrices: Tensor, scale: Tensor) -> Tensor:
    """``[H, ...]`` divided by ``[H]``, zero where the divisor is (or has no finite inverse)."""
    return matrices * inverted(scale).view(-1, *[1] * (matrices.dim() - 1))


def inverted(scale: Tensor) -> Tensor:
    """One over each scale, zero where that has no finite inverse."""
    return torch.where(scale > torch.finfo(scale.dtype).tiny, scale.reciprocal(), 0)


def times(matrices: Tensor, scale: Tensor) -> Tensor:
    """``[H, ...]`` times ``[H]``."""
    return matrices * scale.view(-1, *[1] * (matrices.dim() - 1))


def whole(side: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """A side times a scale, from its upper triangle where it is a matrix."""
    return mirror(side, scale) if side.dim() == 3 else side * scale


def semidefinite(side: Tensor, name: str, rounded: bool = False) -> Tensor:
    """The nearest positive semidefinite side: without its negative eigenvalues.

    Where `rounded`, those of rounding may stay: they do no harm in a single product, and to see that there are no
    others is far cheaper than to find them all.
    """
    if side.dim() == 2:
        return side.clamp_min(0)
    if rounded:
        shifted = side.clone()
        diagonals = shifted.diagonal(dim1=-2, dim2=-1)
        diagonals += torch.finfo(side.dtype).eps * diagonals.sum(-1, keepdim=True)
        if not bool(torch.linalg.cholesky_ex(shifted).info.any()):
            return side
    values, vectors = eigh(side, name)
    return (vectors * values.unsqueeze(1)) @ vectors.mT
