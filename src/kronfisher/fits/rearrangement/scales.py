"""Norms and scales of every group, for tensors ``[H, ...]``."""

from math import frexp

import torch
from torch import Tensor

__all__ = ["norm", "over", "power_of_two", "reciprocal", "times"]

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
    return matrices * reciprocal(scale).view(-1, *[1] * (matrices.dim() - 1))


def reciprocal(scale: Tensor) -> Tensor:
    """One over each scale, zero where that has no finite inverse."""
    return torch.where(scale > torch.finfo(scale.dtype).tiny, scale.reciprocal(), 0)


def power_of_two(scale: Tensor) -> Tensor:
    """The power of two above each scale, one for zero: to multiply or divide by it changes no digit."""
    most = -frexp(torch.finfo(scale.dtype).tiny)[1]
    exponent = torch.where(scale > 0, torch.frexp(scale).exponent, 0).clamp(-most, most)
    return torch.ldexp(torch.ones_like(scale), exponent)


def times(matrices: Tensor, scale: Tensor) -> Tensor:
    """``[H, ...]`` times ``[H]``."""
    return matrices * scale.view(-1, *[1] * (matrices.dim() - 1))
