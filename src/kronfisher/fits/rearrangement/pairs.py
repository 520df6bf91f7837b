"""Sums over pairs of samples with T = 1: products of their inputs times products of their output gradients."""

import torch
from torch import Tensor

from kronfisher.fits.rearrangement.scales import over, power_of_two, reciprocal
from kronfisher.linalg import add_symmetric_product_, mirror_

__all__ = ["packed", "packs", "square", "squares_of_columns", "sum_over_pairs", "sum_products"]

_PANEL = 128  # samples whose products with all others are in hand at a time


def square(products: Tensor) -> tuple[Tensor, Tensor]:
    """``[H, n, n]`` squared over about the largest entry, and the root of that ``[H]``: nothing underflows."""
    largest = power_of_two(products.diagonal(dim1=-2, dim2=-1).amax(1))
    return products.mul_(reciprocal(largest)[:, None, None]).square_(), largest


def sum_products(inputs: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """``Σ_k`` and ``Σ_{k≠l}`` of ``K_a K_g`` entry by entry, each ``[1, n, n]`` with the root of its scale."""
    left, right = inputs[0][0], outputs[0][0]  # of ⟨G_k, G_l⟩²
    scale = (inputs[1].double() * outputs[1].double()).square()[0]
    same = (left.diagonal() * right.diagonal()).sum(dtype=torch.float64)
    return same * scale, (torch.linalg.vecdot(left, right).sum(dtype=torch.float64) - same) * scale


def packs(g: Tensor, columns: int) -> bool:
    """Whether ``Σ_c g_c g_cᵀ`` of each input takes fewer numbers than the products of all columns of two inputs."""
    width = g.shape[-1]
    return width * (width + 1) // 2 <= columns**2 * width


def packed(g: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Of ``S_k = Σ_c g_kc g_kcᵀ`` for ``[H, n·C, O]`` the upper triangle in a row ``[H, n, O(O+1)/2]``.

    And the weights of their entries with which inner products of rows are those of the S_k, ``Σ_{c,d} ⟨g_kc, g_ld⟩²``:
    two beside the diagonal.
    """
    g = g.unflatten(1, (-1, columns))
    twice = g.new_full(2 * g.shape[-1:], 2.0).fill_diagonal_(1.0)
    return _triangle(g.mT @ g), _triangle(twice)


def _triangle(matrices: Tensor) -> Tensor:
    """The upper triangle of ``[..., D, D]``, row after row."""
    return torch.cat([row[..., k:] for k, row in enumerate(matrices.unbind(-2))], dim=-1)


def sum_over_pairs(a: Tensor, g: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """``Σ_k`` and ``Σ_{k,l}`` of ``(Σ_h ⟨a_k, a_l⟩ ⟨g_k, g_l⟩)²``; of ``⟨a_k, a_l⟩² ⟨g_k, g_l⟩`` if g are packed.

    A panel at a time, which is no more than a processor's cache holds, and from the diagonal on.
    """
    same, every = [], []
    for low in range(0, a.shape[1], _PANEL):
        left, part = torch.bmm(a[:, low : low + _PANEL], a[:, low:].mT), g[:, low : low + _PANEL]
        right = torch.bmm(part if weights is None else part * weights, g[:, low:].mT)
        if weights is None:
            left = right = left.mul_(right)[0] if len(left) == 1 else left.mul_(right).sum(0)
        else:  # of one group
            left, right = left.square_()[0], right[0]
        square = slice(len(left))  # products of the panel's samples with each other, which are there twice
        same.append((left.diagonal() * right.diagonal()).sum(dtype=torch.float64))
        every.append(2 * torch.linalg.vecdot(left, right).sum(dtype=torch.float64))
        every.append(-torch.linalg.vecdot(left[:, square], right[:, square]).sum(dtype=torch.float64))
    return torch.stack(same).sum(), torch.stack(every).sum()


def squares_of_columns(g: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """``Σ_{c,d} ⟨g_kc, g_ld⟩² [H, n, n]``, divided by about the largest, and the root of that, for ``[H, n·C, O]``."""
    length = power_of_two(torch.linalg.vector_norm(g, dim=-1).amax(1))
    g = over(g, length).unflatten(1, (-1, columns))
    if packs(g, columns):
        flat, weights = packed(g.flatten(1, 2), columns)
        gram = flat.new_zeros(len(g), *2 * g.shape[1:2])
        gram = mirror_(add_symmetric_product_(gram, flat.mT, (flat * weights).mT))
    else:
        rows = g.flatten(1, 2).mT
        gram = g.new_zeros(len(g), *2 * g.shape[1:2])
        for c in range(columns):
            gram += (g[:, :, c] @ rows).square_().unflatten(2, (-1, columns)).sum(3)
    root = power_of_two(gram.diagonal(dim1=-2, dim2=-1).amax(1).sqrt())
    return over(gram, root.square()), length.square() * root
