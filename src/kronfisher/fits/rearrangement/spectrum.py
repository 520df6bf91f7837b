"""Several singular triplets of the rearranged Fisher matrix at once: the best sums of Kronecker products.

ℛ(F) maps symmetric matrices to symmetric and antisymmetric ones to antisymmetric ones, so that each kind has a spectrum
of its own and no iteration passes from one to the other: they are found separately, each from a start of its kind. For
T = 1 the antisymmetric half is zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kronfisher.fits.rearrangement.joint import Joint, Terms
from kronfisher.fits.rearrangement.rearranged import Rearranged
from kronfisher.fits.rearrangement.scales import norm, over, times
from kronfisher.operators.factors import Factor

__all__ = ["Triplets", "deflate", "lanczos"]


@dataclass
class Triplets:
    """The leading singular triplets ``σ_r B_r ⊗ A_r``, all A and B of norm one (zero where σ is), of one kind.

    Attributes:
        A: ``[R, H, I, I]``, or diagonals ``[R, H, I]`` where those of ℛ(F) are.
        B: ``[R, H, O, O]``, likewise.
        sigma: ``[R, H]``, descending.
        steps: double steps taken.
        change: how far they are from converged: a residual ``‖ℛᵀB_r − σ_r A_r‖ / σ₁``, or what another step is
            expected to change of an A.
    """

    A: Tensor
    B: Tensor
    sigma: Tensor
    steps: Tensor
    change: Tensor


def random_start(source: Rearranged, antisymmetric: bool) -> Tensor:
    """A ``[H, I, I]`` of norm one of the kind, in general position; the same at every call."""
    noise = torch.randn(source.factor_shapes[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = _part_of_kind(noise, -1 if antisymmetric else 1).to(source.like())
    return over(noise, norm(noise))


def _part_of_kind(factor: Tensor, sign: int) -> Tensor:
    """The symmetric or the antisymmetric part; a diagonal is symmetric."""
    return Factor.of(factor).part(sign).tensor


def _dimension(shape: tuple[int, ...], sign: int) -> int:
    """Of the space of all factors ``[H, D, D]`` or ``[H, D]`` of a kind."""
    return Factor.type_of(shape).dimension(shape[-1], sign)


class OfKind(Rearranged):
    """ℛ(F) on one kind alone: rounding errors of the other kind would grow wherever its singular values are larger."""

    def __init__(self, source: Rearranged, antisymmetric: bool) -> None:
        self.source, self.sign = source, -1 if antisymmetric else 1
        self.shape = source.shape

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.source.factor_shapes

    def like(self) -> Tensor:
        return self.source.like()

    def outputs(self, A: Tensor, odd: bool = False) -> Tensor:
        return _part_of_kind(self.source.outputs(A, self.sign < 0), self.sign)

    def inputs(self, B: Tensor, odd: bool = False) -> Tensor:
        return _part_of_kind(self.source.inputs(B, self.sign < 0), self.sign)


def lanczos(
    source: Rearranged, rank: int, antisymmetric: bool = False, tolerance: float = 1e-3, iterations: int = 50
) -> Triplets:
    """By Golub-Kahan bidiagonalisation with full re-orthogonalisation, as two steps alone do not converge.

    It keeps every direction it has met: ``iterations · (I² + O²)`` numbers a group at most. Of a singular value that
    occurs several times it finds one.

    Args:
        source: ℛ(F).
        rank: R; fewer where the space of the kind is smaller, padded by zeros.
        antisymmetric: which of the two kinds.
        tolerance: stop when the residuals of all R triplets are below this share of the first singular value.
        iterations: double steps at most; at least R + 1 are taken.
    """
    source, sign = OfKind(source, antisymmetric), -1 if antisymmetric else 1
    groups, dimensions = source.shape[0], [_dimension(shape, sign) for shape in source.factor_shapes]
    room = min(dimensions)
    limit = min(max(iterations, rank + 1), room)
    like = source.like()
    if limit < 1:
        A, B = (like.new_zeros(rank, *shape) for shape in source.factor_shapes)
        zero = like.new_zeros(())
        return Triplets(A, B, like.new_zeros(rank, groups), zero, zero)
    V, U = [random_start(source, antisymmetric)], []
    alphas, betas = [], []
    previous, change = None, like.new_full((), torch.inf)
    for step in range(limit):
        u, alpha = _orthogonalise(source.outputs(V[-1]), U)
        alphas.append(alpha)
        U.append(over(u, alpha))
        v, beta = _orthogonalise(source.inputs(U[-1]), V)
        previous = step + 1
        if previous >= min(rank, limit):
            P, sigma, _ = torch.linalg.svd(_bidiagonal(alphas, betas))
            largest = sigma[:, :1].clamp_min(torch.finfo(torch.float64).tiny)
            change = ((beta.double()[:, None] * P[:, -1].abs())[:, : min(rank, previous)] / largest).amax().to(like)
        V.append(over(v, beta))
        betas.append(beta)
        if previous == limit or (previous >= rank and bool(change <= tolerance)):
            break
    if len(U) == dimensions[1]:
        change = torch.zeros_like(change)  # all there is
    # With the last direction as well: what the outputs span is exact then, and it is everything where they are few.
    P, sigma, Q = torch.linalg.svd(_bidiagonal(alphas, betas), full_matrices=False)
    keep = min(rank, len(U))
    B = torch.einsum("kh...,hkr->rh...", torch.stack(U), P[:, :, :keep].to(like))
    A = torch.einsum("kh...,hrk->rh...", torch.stack(V), Q[:, :keep].to(like))
    sizes = sigma[:, :keep].mT.to(like)
    if keep < rank:
        A, B, sizes = (torch.cat([t, t.new_zeros(rank - keep, *t.shape[1:])]) for t in (A, B, sizes))
    return Triplets(A, B, sizes, like.new_full((), previous or 0), change)


def _orthogonalise(matrix: Tensor, basis: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Without its components along the basis (twice, which is enough), and the norm of what is left."""
    if not basis:
        return matrix, norm(matrix)
    stack = torch.stack(basis, dim=1).flatten(2)  # [H, k, D²]
    before, rest = norm(matrix), matrix.flatten(1).unsqueeze(2)
    for _ in range(2):
        rest = torch.baddbmm(rest, stack.mT, stack @ rest, alpha=-1)
    matrix = rest.view(matrix.shape)
    # What is left of a direction that lay in the span is rounding noise, not a new direction.
    left = norm(matrix)
    left = torch.where(left <= 100 * torch.finfo(matrix.dtype).eps * before, 0, left)
    return torch.where((left > 0).view(-1, *[1] * (matrix.dim() - 1)), matrix, 0), left


def _bidiagonal(alphas: list[Tensor], betas: list[Tensor]) -> Tensor:
    """``[H, k, k]`` with the alphas on the diagonal and the betas above it; one more column if there are k betas.

    In float64, as what is made of it.
    """
    rows, columns = len(alphas), max(len(alphas), len(betas) + 1)
    matrix = alphas[0].new_zeros(len(alphas[0]), rows, columns, dtype=torch.float64)
    matrix.diagonal(dim1=1, dim2=2).copy_(torch.stack(alphas, dim=1))
    if betas:
        matrix.diagonal(1, dim1=1, dim2=2).copy_(torch.stack(betas, dim=1))
    return matrix


def deflate(
    source: Rearranged, rank: int, antisymmetric: bool = False, tolerance: float = 1e-3, iterations: int = 50
) -> Triplets:
    """One after the other by power iteration on what the triplets before leave: ``B ← ℛ A − Σ_j ⟨A_j, A⟩ B_j``.

    Args:
        source: ℛ(F).
        rank: R.
        antisymmetric: which of the two kinds.
        tolerance: a triplet is done when its A, of norm one, is expected to change by no more in another step.
        iterations: double steps at most, for each.
    """
    source = OfKind(source, antisymmetric)
    like = source.like()
    As, Bs, sigmas = [], [], []
    steps, change = like.new_zeros(()), like.new_zeros(())
    for number in range(rank):
        first = number == 0 and not antisymmetric
        rest = source
        if As:
            scaled = torch.stack([times(B, sigma) for sigma, B in zip(sigmas, Bs, strict=True)])
            rest = Joint(source, Terms(torch.stack(As), scaled, sign=-1.0))
        pair = rest.leading(None if first else random_start(source, antisymmetric), tolerance, iterations)
        As.append(pair.A)
        Bs.append(pair.B)
        sigmas.append(pair.sigma)
        noise = (pair.sigma <= 100 * torch.finfo(like.dtype).eps * sigmas[0]).all()  # nothing was left to converge
        steps, change = steps + pair.steps, torch.maximum(change, torch.where(noise, 0, pair.change))
    return Triplets(torch.stack(As), torch.stack(Bs), torch.stack(sigmas), steps, change)
