"""The rearranged Fisher matrix, whose singular pairs are the best Kronecker products.

``ℛ(F): M [I, I] ↦ Σ_k G_k M G_kᵀ [O, O]`` takes symmetric positive semidefinite matrices to such, and its transpose
``M [O, O] ↦ Σ_k G_kᵀ M G_k`` takes them back, so that alternating between the two finds the best product ``B ⊗ A`` with
both factors positive semidefinite (Schnaus, Lee & Triebel 2021). The ways to take a half step differ in cost alone:

- Gram (T = 1): everything in the span of the samples, by ``(a aᵀ)∘²`` and ``(g gᵀ)∘²``;
- weights (T = 1): ``u_k = a_kᵀ A a_k``, then ``Σ u_k g_k g_kᵀ``;
- rows: ``W_k = a_k A a_kᵀ [T, T]``, then ``Σ g_kᵀ W_k g_k``;
- explicit: the gradients ``G_k`` written out;
- projected: through the leading directions of A and B alone (`kronfisher.fits.rearrangement.projected`).
"""

from abc import abstractmethod

import torch
from torch import Tensor

from kronfisher.fits.rearrangement.scales import norm, over, times
from kronfisher.fits.rearrangement.source import Pair, Source
from kronfisher.fits.rearrangement.stopping import ended, expected, kept
from kronfisher.linalg import eigh
from kronfisher.operators.factors import Factor

__all__ = ["Rearranged", "mixture"]


class Rearranged(Source):
    """ℛ(F) of one block, one map per group, that takes any matrix."""

    @abstractmethod
    def outputs(self, A: Tensor, odd: bool = False) -> Tensor:
        """``Σ_k G_k A G_kᵀ [H, O, O]`` for A ``[H, I, I]``, symmetric, or antisymmetric where A is: `odd`."""

    @abstractmethod
    def inputs(self, B: Tensor, odd: bool = False) -> Tensor:
        """``Σ_k G_kᵀ B G_k [H, I, I]`` for B ``[H, O, O]``, symmetric, or antisymmetric where B is: `odd`."""

    @abstractmethod
    def like(self) -> Tensor:
        """Some tensor with the dtype and device of the numbers."""

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B: ``[H, D, D]``, or ``[H, D]`` where a factor is kept as its diagonal."""
        groups, outputs, width = self.shape
        return (groups, width, width), (groups, outputs, outputs)

    def first(self) -> Tensor:
        """The identity in place of A."""
        shape = self.factor_shapes[0]
        return Factor.type_of(shape).identity(shape, self.like())

    def outputs_of_identity(self) -> Tensor:
        """`outputs` of the identity, or of a multiple of it."""
        return self.outputs(self.first())

    def leading(self, start: Tensor | None = None, tolerance: float = 1e-3, iterations: int = 50) -> Pair:
        """The first singular pair by alternating half steps; every iterate is positive semidefinite.

        Args:
            start: A ``[H, I, I]``, positive semidefinite; None: the identity.
            tolerance: stop when A, of norm one, is expected to change by no more in another double step.
            iterations: double steps at most.
        """
        like, A = self.like(), self.first()
        groups = len(A)
        A = over(A, norm(A))
        if start is not None:  # a little of the identity: a component that the start lacks would never appear
            A = A.mul_(0.01).add_(over(start, norm(start)))
            A = over(A, norm(A))
        steps, last = like.new_zeros((), dtype=torch.int64), like.new_full((), torch.inf)
        change = last
        done, B, sigma = change <= tolerance, like.new_zeros(()), like.new_zeros(groups)
        for step in range(max(iterations, 1)):
            half = self.outputs(A) if step or start is not None else self.outputs_of_identity()
            B = kept(done, B, over(half, norm(half)))
            half = self.inputs(B)
            size = norm(half)
            # As large as the factors, so in place.
            half *= torch.where(size > torch.finfo(size.dtype).tiny, 1 / size, 0)[(..., *[None] * (half.dim() - 1))]
            half = kept(done, A, half)
            steps, sigma = steps + ~done, kept(done, sigma, size)
            before, last = last, norm(A.sub_(half)).max()
            change = kept(done, change, expected(before, last))
            A, done = half, change <= tolerance
            if ended(done):
                break
        return Pair(A, B, sigma, steps, change)

    def leading_terms(
        self, rank: int, before: Tensor | None = None, tolerance: float = 1e-3, iterations: int = 50
    ) -> tuple[Pair, Tensor, Tensor]:
        """The leading pair, and A ``[R, H, I, I]`` and B ``[R, H, O, O]`` of about the best sum ``Σ_r B_r ⊗ A_r``.

        The other terms are from half steps beside the pair, among symmetric matrices orthogonal to it. The last one is
        over all samples: whatever those before it find, on a part, the sum is ℛ(F) behind a projection.

        Args:
            rank: R.
            before: A of terms of other samples of the block, to go on from; None: from noise.
            tolerance: of the pair, see `leading`.
            iterations: for the pair.
        """
        pair = self.leading(None if before is None else before[0], tolerance, iterations)
        root = pair.sigma.sqrt()  # shared by both factors: squares of σ may leave the range of numbers
        A, B = times(pair.A, root)[None], times(pair.B, root)[None]  # the last half step was ℛᵀ of B
        if rank == 1:
            return pair, A, B
        more = _basis_beside(self._others(pair, rank - 1, before), pair.B)
        others = torch.stack([over(self.inputs(each), root) for each in more])  # orthogonal to A, as ℛ of that is σ B
        return pair, torch.cat([A, others]), torch.cat([B, torch.stack([times(each, root) for each in more])])

    def _others(self, pair: Pair, number: int, before: Tensor | None) -> Tensor:
        """B of other terms ``[number, H, O, O]``, about, from those samples that tell them."""
        part = self.part()
        if before is None:
            others = torch.stack([part.inputs(each) for each in _basis_beside(_noise(pair.B, number), pair.B)])
        else:
            others = before[1 : number + 1]
        return torch.stack([part.outputs(each) for each in _basis_beside(others, pair.A)])

    def part(self) -> "Rearranged":
        """ℛ of those samples that it is largest for, which tell directions."""
        return self


def _noise(like: Tensor, number: int) -> Tensor:
    """Symmetric matrices ``[number, H, D, D]``, the same at every call."""
    noise = torch.randn(number, *like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (noise + noise.mT).to(like)


def mixture(gram: Tensor) -> Tensor:
    """X ``[H, R, R]`` that makes vectors with this Gram matrix orthonormal; zero for what they do not span."""
    scale = gram.diagonal(dim1=-2, dim2=-1).amax(1)
    values, vectors = eigh(over(gram, scale), "products of terms")
    root = torch.where(values > values[:, -1:] * 1e-12, values.clamp_min(1e-300).rsqrt(), 0)
    return over(vectors * root.unsqueeze(1), scale.sqrt())


def _basis_beside(matrices: Tensor, direction: Tensor) -> Tensor:
    """An orthonormal basis of what ``[R, H, D, D]`` span beside a direction ``[H, D, D]`` of norm one."""
    return _orthonormalise(_project_out(matrices, direction))


def _project_out(matrices: Tensor, direction: Tensor) -> Tensor:
    """``[R, H, D, D]`` without their component along ``[H, D, D]`` of norm one; zero where that is all there is."""
    before = torch.stack([norm(each) for each in matrices])
    for _ in range(2):
        matrices = matrices - torch.stack([times(direction, (each * direction).sum((1, 2))) for each in matrices])
    left = torch.stack([norm(each) for each in matrices])
    noise = left <= 100 * torch.finfo(matrices.dtype).eps * before  # not a direction of its own
    return torch.where(noise[..., None, None], 0, matrices)


def _orthonormalise(matrices: Tensor) -> Tensor:
    """An orthonormal basis of what ``[R, H, D, D]`` span, group by group."""
    sizes = torch.stack([norm(each) for each in matrices])
    matrices = torch.stack([over(each, size) for each, size in zip(matrices, sizes, strict=True)])
    gram = torch.einsum("rh...,sh...->hrs", matrices.double(), matrices.double())
    return torch.einsum("hrs,rh...->sh...", mixture(gram).to(matrices), matrices)
