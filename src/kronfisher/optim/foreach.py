"""Torch's operations on lists of tensors, which its own optimisers are made of."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["add_", "lerp_", "mul_", "norms"]


def add_(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """``tensor += other``, each."""
    torch._foreach_add_(list(tensors), list(others))  # pyright: ignore[reportPrivateImportUsage]


def lerp_(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """``tensor += weight (end − tensor)``, each."""
    torch._foreach_lerp_(list(tensors), list(ends), weight)  # pyright: ignore[reportPrivateImportUsage]


def mul_(tensors: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """``tensor *= factor``, each; factors are 0-dim."""
    torch._foreach_mul_(list(tensors), list(factors))  # pyright: ignore[reportPrivateImportUsage]


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Norms, each 0-dim."""
    return list(torch._foreach_norm(list(tensors)))  # pyright: ignore[reportPrivateImportUsage]
