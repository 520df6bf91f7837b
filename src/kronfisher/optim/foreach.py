"""Torch's operations on lists of tensors, which its own optimisers are made of."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "add_",
    "add_products_",
    "average_squares_",
    "clamp_min_",
    "copy_",
    "differences",
    "divided",
    "lerp_",
    "lerp_to_each_",
    "mul_",
    "norms",
    "over_roots",
]


def add_(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """``tensor += other``, each."""
    torch._foreach_add_(list(tensors), list(others))  # pyright: ignore[reportPrivateImportUsage]


def add_products_(tensors: Sequence[Tensor], others: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """``tensor += other · factor``, each; factors are 0-dim."""
    torch._foreach_addcmul_(list(tensors), list(others), list(factors))  # pyright: ignore[reportPrivateImportUsage]


def average_squares_(tensors: Sequence[Tensor], others: Sequence[Tensor], decay: float) -> None:
    """``tensor = decay tensor + (1 − decay) other²``, each."""
    torch._foreach_mul_(list(tensors), decay)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_addcmul_(list(tensors), list(others), list(others), 1 - decay)  # pyright: ignore[reportPrivateImportUsage]


def clamp_min_(tensors: Sequence[Tensor], least: float) -> None:
    """``tensor = max(tensor, least)``, each."""
    torch._foreach_clamp_min_(list(tensors), least)  # pyright: ignore[reportPrivateImportUsage]


def copy_(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """``tensor = other``, each, in place."""
    torch._foreach_copy_(list(tensors), list(others))  # pyright: ignore[reportPrivateImportUsage]


def differences(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """``tensor − other``, each."""
    return list(torch._foreach_sub(list(tensors), list(others)))  # pyright: ignore[reportPrivateImportUsage]


def divided(tensors: Sequence[Tensor], divisors: Sequence[float]) -> list[Tensor]:
    """``tensor / divisor``, each."""
    return list(torch._foreach_div(list(tensors), list(divisors)))  # pyright: ignore[reportPrivateImportUsage]


def lerp_(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """``tensor += weight (end − tensor)``, each."""
    torch._foreach_lerp_(list(tensors), list(ends), weight)  # pyright: ignore[reportPrivateImportUsage]


def lerp_to_each_(tensors: Sequence[Tensor], ends: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """``tensor += weight (end − tensor)``, each; weights are 0-dim."""
    torch._foreach_lerp_(list(tensors), list(ends), list(weights))  # pyright: ignore[reportPrivateImportUsage]


def mul_(tensors: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """``tensor *= factor``, each; factors are 0-dim, or broadcast."""
    torch._foreach_mul_(list(tensors), list(factors))  # pyright: ignore[reportPrivateImportUsage]


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Norms, each 0-dim."""
    return list(torch._foreach_norm(list(tensors)))  # pyright: ignore[reportPrivateImportUsage]


def over_roots(tensors: list[Tensor], squares: list[Tensor], epsilon: float) -> list[Tensor]:
    """``tensor / (√square + ε)``, each; both lists are used up."""
    torch._foreach_sqrt_(squares)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_add_(squares, epsilon)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_div_(tensors, squares)  # pyright: ignore[reportPrivateImportUsage]
    return tensors
