"""Sums of Kronecker products whose every term is positive semidefinite.

With both sides of every term in the cone spanned by given positive semidefinite matrices, ``A_i = Σ_k w_ki A'_k`` and
``B_i = Σ_k u_ki B'_k`` with nonnegative weights, the distance from ``Σ_k B'_k ⊗ A'_k`` depends on the Gram matrices of
the given ones alone. Inner products of positive semidefinite matrices are nonnegative, so that Lee and Seung's
multiplicative updates (2001) descend and keep the weights nonnegative. For T = 1 the given matrices are those of single
samples, ``a aᵀ`` and ``g gᵀ``.
"""

import torch
from torch import Tensor

from kronfisher.linalg import eigh
from kronfisher.rearrangement.maps import Rearranged, norm, over

__all__ = ["nonnegative_weights", "positive_terms"]

_STARTS = 3


def nonnegative_weights(
    KA: Tensor, KB: Tensor, rank: int, tolerance: float = 1e-3, iterations: int = 500
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights W and U ``[H, s, R]`` of a short nonnegative sum for ``Σ_k B_k ⊗ A_k``, and its squared error.

    Args:
        KA: ``⟨A_k, A_l⟩ [H, s, s]``, entrywise nonnegative.
        KB: ``⟨B_k, B_l⟩ [H, s, s]``, likewise.
        rank: R.
        tolerance: stop when the relative error falls by less than a hundredth of this in ten updates of both.
        iterations: updates at most.

    Returns:
        W, U, the squared error ``[H]`` relative to ``‖Σ_k B_k ⊗ A_k‖²``, and the number of updates taken.
    """
    scale = [K.diagonal(dim1=1, dim2=2).amax(1).clamp_min(torch.finfo(K.dtype).tiny) for K in (KA, KB)]
    KA, KB = (K.clamp_min(0).double() / size.double()[:, None, None] for K, size in zip((KA, KB), scale, strict=True))
    whole = (KA * KB).sum((1, 2))
    best: tuple[Tensor, Tensor, Tensor] | None = None
    taken = 0
    for start in range(_STARTS if rank > 1 else 1):
        W, U = _start(KA, KB, rank, start)
        error = torch.full_like(whole, torch.inf)
        for step in range(iterations):
            GW = KA @ W
            U = U * _ratio(KB @ GW, (KB @ U) @ (W.mT @ GW))
            GU = KB @ U
            W = W * _ratio(KA @ GU, (KA @ W) @ (U.mT @ GU))
            taken += 1
            if step % 10 == 9:
                new = _error(KA, KB, W, U, whole)
                still = error - new > 1e-2 * tolerance * new.clamp_min(1e-12).sqrt()
                error = new
                if not bool(still.any()):
                    break
        W = W * _scale(KA, KB, W, U)[:, None, None]
        error = _error(KA, KB, W, U, whole)
        if best is None:
            best = W, U, error
        else:
            better = (error < best[2])[:, None, None]
            best = torch.where(better, W, best[0]), torch.where(better, U, best[1]), torch.minimum(error, best[2])
    assert best is not None
    return *best, torch.tensor(float(taken))


def positive_terms(
    source: Rearranged, A: Tensor, B: Tensor, tolerance: float = 1e-3, iterations: int = 30
) -> tuple[Tensor, Tensor, int, float]:
    """A nearer sum of positive semidefinite terms, by block coordinate descent: every step is the exact minimum.

    With all other sides fixed, the best A_j is ``(ℛᵀB_j − Σ_{i≠j} ⟨B_i, B_j⟩ A_i) / ‖B_j‖²``, and the best positive
    semidefinite one is that without its negative eigenvalues. R half steps and R decompositions a side and sweep.

    Args:
        source: ℛ(F).
        A: ``[R, H, I, I]``, positive semidefinite.
        B: ``[R, H, O, O]``, positive semidefinite.
        tolerance: stop when ``‖X‖`` changes by less than a tenth of this share in a sweep.
        iterations: sweeps at most.

    Returns:
        A, B, the sweeps taken and the last change.
    """
    A, B, sweeps, change = A.clone(), B.clone(), 0, float("inf")
    old = _size(A, B)
    for sweep in range(iterations):
        sweeps = sweep + 1
        for sides, others, back in ((A, B, source.inputs), (B, A, source.outputs)):
            _shift_scale_(others, sides)
            for j in range(len(sides)):
                inner = torch.einsum("rhop,hop->rh", others, others[j])  # at most one: others[j] has norm one or zero
                rest = back(others[j]) - torch.einsum("rh,rhij->hij", inner, sides) + _by(inner[j], sides[j])
                side = _by(torch.where(inner[j] > 0, 1 / inner[j], 0), rest)
                values, vectors = eigh(side, "a term of a sum")
                sides[j] = (vectors * values.unsqueeze(1)) @ vectors.mT
        new = _size(A, B)
        change = float(((new - old).abs() / new.clamp_min(torch.finfo(new.dtype).tiny)).max())
        old = new
        if change <= 0.1 * tolerance:
            break
    mapped = zip(A, B, strict=True)  # A of norm one
    cross = torch.stack([(source.outputs(a).double() * b.double()).sum((1, 2)) for a, b in mapped]).sum(0)
    own = _size(A, B).square()
    B = B * torch.where(own > 0, cross / own, 1).to(B)[:, None, None]
    for a, b in zip(A, B, strict=True):
        root = norm(b).sqrt()
        a.copy_(_by(root, a))
        b.copy_(over(b, root))
    return A, B, sweeps, change


def _shift_scale_(sides: Tensor, others: Tensor) -> None:
    """Bring `sides` to norm one and leave the scale of every term to `others`, in place: no square of it vanishes."""
    for side, other in zip(sides, others, strict=True):
        size = norm(side)
        side.copy_(over(side, size))
        other.copy_(_by(size, other))


def _size(A: Tensor, B: Tensor) -> Tensor:
    """``‖Σ B_r ⊗ A_r‖ [H]``, in float64."""
    grams = [torch.einsum("rhij,shij->hrs", side.double(), side.double()) for side in (A, B)]
    return (grams[0] * grams[1]).sum((1, 2)).clamp_min(0).sqrt()


def _by(scale: Tensor, matrices: Tensor) -> Tensor:
    return matrices * scale[:, None, None]


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return above / below.clamp_min(torch.finfo(below.dtype).tiny)


def _scale(KA: Tensor, KB: Tensor, W: Tensor, U: Tensor) -> Tensor:
    """``⟨F, X⟩ / ‖X‖²``: with it the squared error is ``‖F‖² − ‖X‖²``, converged or not."""
    GW, GU = KA @ W, KB @ U
    own = ((W.mT @ GW) * (U.mT @ GU)).sum((1, 2))
    return (GW * GU).sum((1, 2)) / own.clamp_min(torch.finfo(own.dtype).tiny)


def _error(KA: Tensor, KB: Tensor, W: Tensor, U: Tensor, whole: Tensor) -> Tensor:
    """``‖F − X‖² / ‖F‖²``, from Gram matrices alone."""
    GW, GU = KA @ W, KB @ U
    cross = (GW * GU).sum((1, 2))
    own = ((W.mT @ GW) * (U.mT @ GU)).sum((1, 2))
    return ((whole - 2 * cross + own) / whole.clamp_min(torch.finfo(whole.dtype).tiny)).clamp_min(0)


def _start(KA: Tensor, KB: Tensor, rank: int, number: int) -> tuple[Tensor, Tensor]:
    """Weights that prefer one of R seeds each, far from one another by ``⟨F_k, F_l⟩``; all of them positive."""
    K = KA * KB
    size = K.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    near = K / (size[:, :, None] * size[:, None, :]).clamp_min(torch.finfo(K.dtype).tiny)
    order = size.argsort(dim=1, descending=True)
    seeds = [order[:, min(number, order.shape[1] - 1)]]
    closest = near.gather(1, seeds[0][:, None, None].expand(-1, 1, K.shape[1]))[:, 0]
    for _ in range(rank - 1):
        seeds.append(((1 - closest) * size).argmax(1))
        closest = torch.maximum(closest, near.gather(1, seeds[-1][:, None, None].expand(-1, 1, K.shape[1]))[:, 0])
    index = torch.stack(seeds, dim=1)  # [H, R]
    like = near.gather(2, index[:, None, :].expand(-1, K.shape[1], -1))
    weights = 0.05 + like
    return weights, weights.clone()
