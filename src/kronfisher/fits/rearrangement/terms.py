"""Sums of Kronecker products, as tensors: the best shorter sum for a given one."""

import math

import torch
from torch import Tensor

from kronfisher.errors import DataError, require_integer
from kronfisher.linalg import eigh
from kronfisher.operators.factors import Factor

__all__ = ["nearest_kronecker", "products", "truncate"]

_PIECE = 2**14  # numbers of each matrix that are taken to float64 at once


def nearest_kronecker(left: Tensor, right: Tensor, rank: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The best sum of `rank` Kronecker products for a given ``Σ_k L_k ⊗ R_k``, in Frobenius norm.

    The problem that algorithm 1 of Schnaus, Lee & Triebel (2021) solves by power iteration, for general rectangular
    L_k and R_k. The answer lies in the span of the given matrices, so two ``s × s`` Gram matrices decide everything
    and the whole spectrum comes at once.

    Args:
        left: ``[s, p, q]``, L_k.
        right: ``[s, m, n]``, R_k.
        rank: R, terms of the answer, at most s.

    Returns:
        ``[R, p, q]``, ``[R, m, n]`` and all s singular values ``[s]``, descending. Term r is scaled so that both
        matrices have the norm ``√σ_r``; the squared error is ``Σ_{r>R} σ_r²``. Singular values below the square root
        of the machine precision times the largest are rounding noise, and their terms are zero.

    Raises:
        DataError: the shapes do not fit each other.

    Example:
        >>> L, R = torch.randn(5, 2, 3), torch.randn(5, 4, 2)
        >>> left, right, sigma = nearest_kronecker(L, R, rank=5)
        >>> whole = sum(torch.kron(l, r) for l, r in zip(L, R))
        >>> torch.allclose(sum(torch.kron(l, r) for l, r in zip(left, right)), whole, atol=1e-3)
        True
    """
    if left.dim() != 3 or right.dim() != 3 or len(left) != len(right) or not len(left):
        raise DataError(
            f"left {list(left.shape)} and right {list(right.shape)} must be [s, p, q] and [s, m, n] for the same s ≥ 1."
        )
    rank = require_integer("rank", rank, -math.inf, "the number of terms is an integer")
    if not 1 <= rank <= len(left):
        raise DataError(f"rank={rank}: a sum of {len(left)} products has a rank from 1 to {len(left)}.")
    B, A, sigma = truncate(left[:, None], right[:, None], rank)
    return B[:, 0], A[:, 0], sigma[:, 0]


def truncate(
    left: Tensor,
    right: Tensor,
    rank: int,
    more: tuple[Tensor, Tensor] | None = None,
    across: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for every group: ``[s, H, p, q]``, ``[s, H, m, n]`` to ``[R, H, p, q]``, ``[R, H, m, n]``, ``[s, H]``.

    Either factor may be diagonals, ``[s, H, p]``. Signs are such that no right matrix has a negative trace. `more` are
    further terms, left and right, of the sum: stacked with the others they would be there twice. `across` are
    the `products` of those with these, where they are known.
    """
    stacks = [(left,), (right,)] if more is None else [(left, more[0]), (right, more[1])]
    grams = [_gram(stack, known) for stack, known in zip(stacks, across or (None, None), strict=True)]
    sizes = [gram.diagonal(dim1=-2, dim2=-1).sqrt() for gram in grams]
    shared = (sizes[0] * sizes[1]).sqrt()  # how a term's size is split between its factors must not matter
    root_left, back_left = _root(grams[0], sizes[0], shared)
    root_right, back_right = _root(grams[1], sizes[1], shared)
    U, sigma, V = torch.linalg.svd(root_left.mT @ root_right)  # [H, s, s]
    keep = sigma[:, :rank].sqrt()
    mix_left = (back_left @ U[..., :rank]) * keep.unsqueeze(1)
    mix_right = (back_right @ V[:, :rank].mT) * keep.unsqueeze(1)
    sign = torch.where(_traces(stacks[1]) @ mix_right < 0, -1.0, 1.0)
    return _mix(stacks[0], mix_left * sign), _mix(stacks[1], mix_right * sign), sigma.mT


def _traces(stacks: tuple[Tensor, ...]) -> Tensor:
    """Of all matrices of one or two stacks: ``[H, 1, s]``."""
    diagonals = [Factor.of(stack.flatten(0, 1)).diagonal().unflatten(0, stack.shape[:2]) for stack in stacks]
    return torch.cat([each.double().sum(-1) for each in diagonals]).mT.unsqueeze(1)


def _gram(stacks: tuple[Tensor, ...], across: Tensor | None) -> Tensor:
    """``⟨X_r, X_s⟩ [H, s, s]`` over all of one or two stacks, of which those of one with the other may be known."""
    first = products(stacks[0], stacks[0])
    if len(stacks) == 1:
        return first
    across, last = products(*stacks) if across is None else across, products(stacks[1], stacks[1])
    return torch.cat([torch.cat([first, across], dim=2), torch.cat([across.mT, last], dim=2)], dim=1)


def _mix(stacks: tuple[Tensor, ...], weights: Tensor) -> Tensor:
    """``Σ_s weights[h, s, r] X_s[h]`` over all stacks, ``[R, H, ...]``."""
    total, at = None, 0
    for stack in stacks:
        rows, mix = stack.transpose(0, 1).flatten(2), weights[:, at : at + len(stack)].mT.to(stack)
        total = mix @ rows if total is None else total.baddbmm_(mix, rows)  # each as large as all that is carried
        at += len(stack)
    assert total is not None
    return total.transpose(0, 1).contiguous().unflatten(2, stacks[0].shape[2:])


def _root(gram: Tensor, sizes: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """For matrices of this Gram matrix ``[H, s, s]``, brought from sizes ``[H, s]`` to those shared by both factors.

    X with ``X Xᵀ`` their Gram matrix then, and Y that takes X's columns back to the given matrices.
    """
    inverse = torch.where(sizes > 0, 1 / sizes, 0)
    scale = shared.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    factor = (inverse * (shared / scale))[..., None]
    gram = gram * factor * factor.mT
    values, vectors = eigh(gram, "products of terms")
    values = torch.where(values > values[:, -1:] * 1e-14, values, 0)
    root = values.sqrt()
    back = torch.where(root > 0, 1 / root, 0) / scale
    return (vectors * root.unsqueeze(1)) * scale[..., None], vectors * back.unsqueeze(1) * (shared * inverse)[..., None]


def products(x: Tensor, y: Tensor) -> Tensor:
    """``⟨X_r, Y_s⟩ [H, r, s]`` of ``[r, H, ...]`` and ``[s, H, ...]``, in float64.

    Piece by piece: a copy in float64 would be twice as large as what is there.
    """
    same = x is y
    x, y = (stack.transpose(0, 1).flatten(2) for stack in (x, y))
    total = x.new_zeros(len(x), x.shape[1], y.shape[1], dtype=torch.float64)
    for mine, theirs in zip(x.split(_PIECE, dim=2), y.split(_PIECE, dim=2), strict=True):
        mine = mine.double()
        total += mine @ (mine if same else theirs.double()).mT
    return total
