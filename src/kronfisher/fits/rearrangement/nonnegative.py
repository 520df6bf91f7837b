"""Sums of Kronecker products whose every term is positive semidefinite.

With both factors of every term in the cone spanned by given positive semidefinite matrices, ``A_i = Σ_k w_ki A'_k`` and
``B_i = Σ_k u_ki B'_k`` with nonnegative weights, the distance from ``Σ_k B'_k ⊗ A'_k`` depends on the Gram matrices of
the given ones alone. Inner products of positive semidefinite matrices are nonnegative, so that Lee and Seung's
multiplicative updates (2001) descend and keep the weights nonnegative. For T = 1 the given matrices are those of single
samples, ``a aᵀ`` and ``g gᵀ``.
"""

import torch
from torch import Tensor

from kronfisher.fits.rearrangement.rearranged import Rearranged
from kronfisher.fits.rearrangement.scales import norm, over, times
from kronfisher.operators.factors import Factor

__all__ = ["nonnegative_weights", "positive_terms"]

_STARTS = 3
_FEW = 64  # matrices up to which more starts cost nothing
_FIRST = 30  # updates after which the starts are compared


def nonnegative_weights(
    KA: Tensor, KB: Tensor, rank: int, tolerance: float = 1e-3, iterations: int = 500
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights W and U ``[H, s, R]`` of a short nonnegative sum for ``Σ_k B_k ⊗ A_k``, and its squared error.

    Args:
        KA: ``⟨A_k, A_l⟩ [H, s, s]``, entrywise nonnegative.
        KB: ``⟨B_k, B_l⟩ [H, s, s]``, likewise.
        rank: R.
        tolerance: stop when the relative error falls by less than this in ten updates of both.
        iterations: updates at most.

    Returns:
        W, U, the squared error ``[H]`` relative to ``‖Σ_k B_k ⊗ A_k‖²``, and the number of updates taken.
    """
    scale = [K.diagonal(dim1=1, dim2=2).amax(1).clamp_min(torch.finfo(K.dtype).tiny) for K in (KA, KB)]
    KA, KB = (K.clamp_min(0).double() / size.double()[:, None, None] for K, size in zip((KA, KB), scale, strict=True))
    descent = Descent(KA, KB)
    taken = 0
    starts = _STARTS if KA.shape[1] > _FEW else 4 * _STARTS
    for start in range(starts if rank > 1 else 1):
        taken += descent.try_(*_start(KA, KB, rank, start), min(_FIRST, iterations))
    while taken < iterations:  # from the best of the starts, group by group
        before = descent.error
        taken += descent.try_(descent.W, descent.U, min(10, iterations - taken))
        if not bool((before.sqrt() - descent.error.sqrt() > tolerance).any()):
            break
    return descent.W, descent.U, descent.error, torch.tensor(float(taken))


class Descent:
    """Multiplicative updates, and the best weights so far.

    Args:
        KA: ``[H, s, s]``.
        KB: ``[H, s, s]``.

    Attributes:
        W: ``[H, s, R]``.
        U: ``[H, s, R]``.
        error: squared and relative ``[H]``; infinite as long as nothing was tried.
    """

    def __init__(self, KA: Tensor, KB: Tensor) -> None:
        self.KA, self.KB, self.whole = KA, KB, (KA * KB).sum((1, 2))
        self.W = self.U = KA[:, :, :0]
        self.error = torch.full_like(self.whole, torch.inf)

    def try_(self, W: Tensor, U: Tensor, updates: int) -> int:
        """Descend from some weights; groups where that is better than before keep what it leads to."""
        GW, GU = self.KA @ W, self.KB @ U
        for _ in range(updates):
            U = U * _ratio(self.KB @ GW, GU @ (W.mT @ GW))
            GU = self.KB @ U
            W = W * _ratio(self.KA @ GU, GW @ (U.mT @ GU))
            GW = self.KA @ W
        cross, own = (GW * GU).sum((1, 2)), ((W.mT @ GW) * (U.mT @ GU)).sum((1, 2))
        tiny = torch.finfo(own.dtype).tiny
        scale = cross / own.clamp_min(tiny)  # ⟨F, X⟩ / ‖X‖²: with it the squared error is ‖F‖² − ‖X‖²
        error = torch.where(self.whole > 0, 1 - cross * scale / self.whole.clamp_min(tiny), 0).clamp_min(0)
        W, better = W * scale[:, None, None], (error < self.error)[:, None, None]
        if not self.W.shape[-1]:
            self.W, self.U, self.error = W, U, error
        else:
            self.W, self.U = torch.where(better, W, self.W), torch.where(better, U, self.U)
            self.error = torch.minimum(error, self.error)
        return updates


def positive_terms(
    source: Rearranged, A: Tensor, B: Tensor, tolerance: float = 1e-3, iterations: int = 30
) -> tuple[Tensor, Tensor, int, float]:
    """A nearer sum of positive semidefinite terms, by block coordinate descent: every step is the exact minimum.

    With all other factors fixed, the best A_j is ``(ℛᵀB_j − Σ_{i≠j} ⟨B_i, B_j⟩ A_i) / ‖B_j‖²``, and the best positive
    semidefinite one is that without its negative eigenvalues. R half steps and R decompositions a factor and sweep.

    Args:
        source: ℛ(F).
        A: ``[R, H, I, I]``, positive semidefinite, or diagonals ``[R, H, I]`` where those of `source` are.
        B: ``[R, H, O, O]``, likewise.
        tolerance: stop when ``‖X‖`` changes by less than 3 % of this share in a sweep.
        iterations: sweeps at most.

    Returns:
        A, B, the sweeps taken and the last change.
    """
    A, B, sweeps, change = A.clone(), B.clone(), 0, float("inf")
    old = _size(A, B)
    for sweep in range(iterations):
        sweeps = sweep + 1
        for factors, others, back in ((A, B, source.inputs), (B, A, source.outputs)):
            _shift_scale_(others, factors)
            for j in range(len(factors)):
                inner = torch.einsum("rh...,h...->rh", others, others[j])  # at most one: others[j] has norm one or zero
                rest = back(others[j]) - torch.einsum("rh,rh...->h...", inner, factors) + times(factors[j], inner[j])
                factors[j] = Factor.of(over(rest, inner[j])).nearest_semidefinite("a term of a sum").tensor
        new = _size(A, B)
        change = float(((new - old).abs() / new.clamp_min(torch.finfo(new.dtype).tiny)).max())
        old = new
        if change <= 0.03 * tolerance:
            break
    mapped = zip(A, B, strict=True)  # A of norm one
    cross = torch.stack([(source.outputs(a).double() * b.double()).flatten(1).sum(1) for a, b in mapped]).sum(0)
    own = _size(A, B).square()
    scale = torch.where(own > 0, cross / own, 1).to(B)
    B = torch.stack([times(b, scale) for b in B])
    for a, b in zip(A, B, strict=True):
        root = norm(b).sqrt()
        a.copy_(times(a, root))
        b.copy_(over(b, root))
    return A, B, sweeps, change


def _shift_scale_(factors: Tensor, others: Tensor) -> None:
    """Bring `factors` to norm one and leave the scale of every term to `others`, in place: no square of it vanishes."""
    for factor, other in zip(factors, others, strict=True):
        size = norm(factor)
        factor.copy_(over(factor, size))
        other.copy_(times(other, size))


def _size(A: Tensor, B: Tensor) -> Tensor:
    """``‖Σ B_r ⊗ A_r‖ [H]``, in float64."""
    grams = [torch.einsum("rh...,sh...->hrs", factor.double(), factor.double()) for factor in (A, B)]
    return (grams[0] * grams[1]).sum((1, 2)).clamp_min(0).sqrt()


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return above / below.clamp_min(torch.finfo(below.dtype).tiny)


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
