"""The rearranged Fisher matrix, whose singular pairs are the best Kronecker products.

``ℛ(F): M [I, I] ↦ Σ_k G_k M G_kᵀ [O, O]`` takes symmetric positive semidefinite matrices to such, and its transpose
``M [O, O] ↦ Σ_k G_kᵀ M G_k`` takes them back, so that alternating between the two finds the best product ``B ⊗ A`` with
both sides positive semidefinite (Schnaus, Lee & Triebel 2021). How a half step is taken is a matter of cost alone:

- Gram (T = 1): everything in the span of the samples, by ``(a aᵀ)∘²`` and ``(g gᵀ)∘²``;
- weights (T = 1): ``u_k = a_kᵀ A a_k``, then ``Σ u_k g_k g_kᵀ``;
- rows: ``W_k = a_k A a_kᵀ [T, T]``, then ``Σ g_kᵀ W_k g_k``;
- explicit: the gradients ``G_k`` written out;
- projected: through the leading directions of A and B alone (`kronfisher.rearrangement.projected`).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kronfisher.linalg import add_symmetric_product_, eigh, mirror
from kronfisher.samples import WORKSPACE, Activations, Dense, Samples, applied

__all__ = [
    "Explicit",
    "Gram",
    "Joint",
    "Pair",
    "Rearranged",
    "Rows",
    "Terms",
    "Weights",
    "norm",
    "over",
    "semidefinite",
    "times",
    "whole",
]


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
    return matrices * _inverse(scale).view(-1, *[1] * (matrices.dim() - 1))


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > torch.finfo(scale.dtype).tiny, scale.reciprocal(), 0)


def times(matrices: Tensor, scale: Tensor) -> Tensor:
    """``[H, ...]`` times ``[H]``."""
    return matrices * scale.view(-1, *[1] * (matrices.dim() - 1))


def whole(side: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """A side times a scale, from its upper triangle where it is a matrix."""
    return mirror(side, scale) if side.dim() == 3 else side * scale


def semidefinite(side: Tensor, name: str) -> Tensor:
    """The nearest positive semidefinite side: without its negative eigenvalues."""
    if side.dim() == 2:
        return side.clamp_min(0)
    values, vectors = eigh(side, name)
    return (vectors * values.unsqueeze(1)) @ vectors.mT


@dataclass
class Pair:
    """A leading singular pair ``σ B ⊗ A``, where A and B have norm one (zero for a zero matrix).

    Attributes:
        A: ``[H, I, I]``.
        B: ``[H, O, O]``.
        sigma: σ ``[H]``, in the scale of ``Σ_k vec(G_k) vec(G_k)ᵀ``.
        steps: double steps taken, a 0-dim tensor.
        change: of A in the last one, ``‖A − A'‖``, the largest over the groups.
    """

    A: Tensor
    B: Tensor
    sigma: Tensor
    steps: Tensor
    change: Tensor


class Rearranged(ABC):
    """ℛ(F) of one block, one map per group.

    Attributes:
        shape: H, O, I.
    """

    shape: tuple[int, int, int]

    @abstractmethod
    def outputs(self, A: Tensor) -> Tensor:
        """``Σ_k G_k A G_kᵀ [H, O, O]`` for A ``[H, I, I]``, symmetric or antisymmetric as A is."""

    @abstractmethod
    def inputs(self, B: Tensor) -> Tensor:
        """``Σ_k G_kᵀ B G_k [H, I, I]`` for B ``[H, O, O]``, symmetric or antisymmetric as B is."""

    @abstractmethod
    def like(self) -> Tensor:
        """Some tensor with the dtype and device of the numbers."""

    @property
    def sides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B: ``[H, D, D]``, or ``[H, D]`` where a side is kept as its diagonal."""
        heads, outputs, width = self.shape
        return (heads, width, width), (heads, outputs, outputs)

    def first(self) -> Tensor:
        """The identity in place of A."""
        like, shape = self.like(), self.sides[0]
        if len(shape) == 2:
            return like.new_ones(shape)
        return torch.eye(shape[1], dtype=like.dtype, device=like.device).expand(shape)

    def leading(self, start: Tensor | None = None, tolerance: float = 1e-3, iterations: int = 50) -> Pair:
        """The first singular pair by alternating half steps; every iterate is positive semidefinite.

        Args:
            start: A ``[H, I, I]``, positive semidefinite; None: the identity.
            tolerance: stop when A, of norm one, changes by no more. On an accelerator the host does not wait to see
                that: iterations go on, and nothing changes any more.
            iterations: double steps at most.
        """
        like, A = self.like(), self.first()
        heads = len(A)
        A = over(A, norm(A))
        if start is not None:  # a little of the identity: what the start has none of would never come back
            A = A.mul_(0.01).add_(over(start, norm(start)))
            A = over(A, norm(A))
        steps, change = like.new_zeros((), dtype=torch.int64), like.new_full((), torch.inf)
        B, sigma = like.new_zeros(()), like.new_zeros(heads)
        for _ in range(max(iterations, 1)):
            half = self.outputs(A)
            B = over(half, norm(half))
            half = self.inputs(B)
            sigma = norm(half)
            half *= torch.where(sigma > torch.finfo(sigma.dtype).tiny, 1 / sigma, 0)[
                (..., *[None] * (half.dim() - 1))
            ]  # as large as the factors
            steps, change = steps + (change > tolerance), norm(A.sub_(half)).max()
            A = half
            if like.device.type == "cpu" and bool(change <= tolerance):
                break
        return Pair(A, B, sigma, steps, change)

    def leading_terms(
        self, rank: int, before: Tensor | None = None, tolerance: float = 1e-3, iterations: int = 50
    ) -> tuple[Pair, Tensor, Tensor]:
        """The leading pair, and A ``[R, H, I, I]`` and B ``[R, H, O, O]`` of about the best sum ``Σ_r B_r ⊗ A_r``.

        The other terms are from subspace iteration beside the pair, among symmetric matrices orthogonal to it, that
        starts from the terms A ``[R, H, I, I]`` of `before`, or from noise; whatever it finds, the sum is ℛ(F) behind
        a projection.
        """
        pair = self.leading(None if before is None else before[0], tolerance, iterations)
        A, B = times(pair.A, pair.sigma)[None], pair.B[None]  # the last half step was ℛᵀ of B
        if rank == 1:
            return pair, A, B
        others = _noise(pair.A, rank - 1) if before is None else before[1:rank]
        more = others
        for _ in range(_SUBSPACE if before is None else 1):
            others = _orthonormal(_without(others, pair.A))
            more = _orthonormal(_without(torch.stack([self.outputs(each) for each in others]), pair.B))
            others = torch.stack([self.inputs(each) for each in more])
        return pair, torch.cat([A, others]), torch.cat([B, more])


_SUBSPACE = 2  # steps of subspace iteration from noise


def _noise(like: Tensor, number: int) -> Tensor:
    """Symmetric matrices ``[number, H, D, D]``, the same at every call."""
    noise = torch.randn(number, *like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (noise + noise.mT).to(like)


def _mixture(gram: Tensor) -> Tensor:
    """X ``[H, R, R]`` that makes vectors with this Gram matrix orthonormal; zero for what they do not span."""
    scale = gram.diagonal(dim1=-2, dim2=-1).amax(1)
    values, vectors = torch.linalg.eigh(over(gram, scale))
    root = torch.where(values > values[:, -1:] * 1e-12, values.clamp_min(1e-300).rsqrt(), 0)
    return over(vectors * root.unsqueeze(1), scale.sqrt())


def _without(matrices: Tensor, direction: Tensor) -> Tensor:
    """``[R, H, D, D]`` without their component along ``[H, D, D]`` of norm one; zero where that is all there is."""
    before = torch.stack([norm(each) for each in matrices])
    for _ in range(2):
        matrices = matrices - torch.stack([times(direction, (each * direction).sum((1, 2))) for each in matrices])
    left = torch.stack([norm(each) for each in matrices])
    noise = left <= 100 * torch.finfo(matrices.dtype).eps * before  # not a direction of its own
    return torch.where(noise[..., None, None], 0, matrices)


def _orthonormal(matrices: Tensor) -> Tensor:
    """An orthonormal basis of what ``[R, H, D, D]`` span, group by group."""
    sizes = torch.stack([norm(each) for each in matrices])
    matrices = torch.stack([over(each, size) for each, size in zip(matrices, sizes, strict=True)])
    gram = torch.einsum("rh...,sh...->hrs", matrices.double(), matrices.double())
    return torch.einsum("hrs,rh...->sh...", _mixture(gram).to(matrices), matrices)


class Weights(Rearranged):
    """T = 1, by the weights ``a_kᵀ A a_k`` and ``g_kᵀ B g_k`` of the samples.

    Args:
        samples: with one position each.
    """

    def __init__(self, samples: Sequence[Samples]) -> None:
        self.activations = _joined([several.activations for several in samples])
        self.g = torch.cat([several.gradients[:, :, 0] for several in samples], dim=1)
        self.shape = samples[0].shape

    def like(self) -> Tensor:
        return self.g

    def outputs(self, A: Tensor) -> Tensor:
        a = self.activations.dense()[:, :, 0]
        return (self.g * torch.linalg.vecdot(a @ A, a)[..., None]).mT @ self.g

    def inputs(self, B: Tensor) -> Tensor:
        a = self.activations.dense()[:, :, 0]
        return (a * torch.linalg.vecdot(self.g @ B, self.g)[..., None]).mT @ a


def _joined(activations: Sequence[Activations]) -> Activations:
    if len(activations) == 1:
        return activations[0]
    dense = [several for several in activations if isinstance(several, Dense)]
    if len(dense) == len(activations):
        return replace(dense[0], values=torch.cat([several.values for several in dense], dim=1))
    return Dense(torch.cat([several.dense() for several in activations], dim=1))


class Gram(Weights):
    """T = 1, with n no larger than a few times the layer: the pair is found in the span of the samples.

    ``A = aᵀ diag(w) a`` and ``B = gᵀ diag(u) g`` with ``u = K_a w``, ``w = K_g u``, where ``K_a = (a aᵀ)∘²`` and
    ``K_g = (g gᵀ)∘²``: n² a half step, and one product for each side at the end.

    Attributes:
        inputs_gram: K_a ``[H, n, n]``, the largest entry one.
        outputs_gram: K_g ``[H, n, n]``, the largest entry one.
    """

    def __init__(self, samples: Sequence[Samples]) -> None:
        super().__init__(samples)
        self.inputs_gram, self._a_scale = _squared(self.activations.products())
        self.outputs_gram, self._g_scale = _squared(Dense(self.g.unsqueeze(2)).products())

    def weights(self, tolerance: float = 1e-3, iterations: int = 50) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The pair as weights of the samples: w and u ``[H, n]`` with A and B of norm one, σ, steps and change."""
        Ka, Kg = self.inputs_gram, self.outputs_gram
        w = old = mapped = torch.zeros_like(Ka[:, 0])
        v = Ka.diagonal(dim1=-2, dim2=-1).sqrt()  # ‖a_k‖²: A is the identity
        u, sigma = w, w.new_zeros(len(w))
        steps, change = w.new_zeros((), dtype=torch.int64), w.new_full((), torch.inf)
        for _ in range(max(iterations, 1)):
            u, v = v, _times(Kg, v)
            size = torch.linalg.vecdot(u, v).sqrt()
            inverse = _inverse(size)[:, None]
            u, w = u * inverse, v * inverse
            v = _times(Ka, w)
            sigma = torch.linalg.vecdot(w, v).sqrt()
            inverse = _inverse(sigma)[:, None]
            w, v = w * inverse, v * inverse
            step = torch.linalg.vecdot(w - old, v - mapped).clamp_min(0).sqrt().max()
            steps, change = steps + (change > tolerance), step
            old, mapped = w, v
            if w.device.type == "cpu" and bool(change <= tolerance):
                break
        scale = self._a_scale * self._g_scale
        return over(w, self._a_scale), over(u, self._g_scale), sigma * scale, steps, change

    def squared_products(self) -> tuple[Tensor, Tensor]:
        """``Σ_k ‖G_k‖⁴`` and ``Σ_{k≠l} ⟨G_k, G_l⟩²`` (over all groups together), in float64."""
        if len(self.g) == 1:  # ⟨G_k, G_l⟩² of one group
            products = self.inputs_gram[0] * self.outputs_gram[0]
            scale = (self._a_scale.double() * self._g_scale.double()).square()[0]
        else:
            sides = self.activations.products(), self.g @ self.g.mT
            largest = [side.abs().amax() for side in sides]
            inverse = [torch.where(size > 0, 1 / size, 0) for size in largest]
            products = ((sides[0] * inverse[0]) * (sides[1] * inverse[1])).sum(0).square()
            scale = (largest[0].double() * largest[1].double()).square()
        same = products.diagonal().sum(dtype=torch.float64)
        return same * scale, (products.sum(dtype=torch.float64) - same) * scale

    def leading(self, start: Tensor | None = None, tolerance: float = 1e-3, iterations: int = 50) -> Pair:
        w, u, sigma, steps, change = self.weights(tolerance, iterations)
        heads, outputs, width = self.shape
        A, B = self.g.new_zeros(heads, width, width), self.g.new_zeros(heads, outputs, outputs)
        self.add_inputs_(A, w)
        self.add_outputs_(B, u)
        return Pair(mirror(A), mirror(B), sigma, steps, change)

    def leading_terms(
        self, rank: int, before: Tensor | None = None, tolerance: float = 1e-3, iterations: int = 50
    ) -> tuple[Pair, Tensor, Tensor]:
        """The same in the span of the samples: n² numbers a step and a term."""
        w, _, sigma, steps, change = self.weights(tolerance, iterations)
        Ka, Kg = self.inputs_gram, self.outputs_gram
        noise = torch.randn((*w.shape, rank - 1), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        W = torch.cat([w[..., None], noise.to(w)], dim=2)
        U = W
        for _ in range(_SUBSPACE):
            W = W @ _mixture((W.mT @ (Ka @ W)).double()).to(W)
            U = Ka @ W
            U = U @ _mixture((U.mT @ (Kg @ U)).double()).to(U)
            W = Kg @ U  # the scales of both Gram matrices cancel
        a = self.activations.dense()[:, :, 0]
        (heads, outputs, width), new = self.shape, w.new_empty
        A, B = new(rank, heads, width, width), new(rank, heads, outputs, outputs)
        for r in range(rank):
            torch.matmul((a * W[..., r, None]).mT, a, out=A[r])
            torch.matmul((self.g * U[..., r, None]).mT, self.g, out=B[r])
        return Pair(A[0], B[0], sigma, steps, change), A, B

    def add_inputs_(self, total: Tensor, w: Tensor) -> None:
        """``total += Σ_k w_k a_k a_kᵀ``, the upper triangle, for weights of at least zero."""
        self.activations.add_weighted_(total, w)

    def add_outputs_(self, total: Tensor, u: Tensor) -> None:
        """``total += Σ_k u_k g_k g_kᵀ``, the upper triangle, for weights of at least zero."""
        add_symmetric_product_(total, self.g * u.sqrt()[..., None])


def _times(gram: Tensor, weights: Tensor) -> Tensor:
    return (gram @ weights.unsqueeze(-1)).squeeze(-1)


def _squared(products: Tensor) -> tuple[Tensor, Tensor]:
    """``[H, n, n]`` squared and divided by the largest entry, and the root of that ``[H]``: nothing underflows."""
    largest = products.diagonal(dim1=-2, dim2=-1).amax(1)
    return over(products, largest).square_(), largest


class Rows(Rearranged):
    """Any T, through ``W_k [T, T]``; the gradients of samples are never written out.

    Args:
        samples: some; their positions may differ.
    """

    def __init__(self, samples: Sequence[Samples]) -> None:
        self.samples = samples
        self.shape = samples[0].shape

    def like(self) -> Tensor:
        return self.samples[0].gradients

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        for several in self.samples:
            for piece in several.pieces():
                yield piece.activations.dense(), piece.gradients

    def outputs(self, A: Tensor) -> Tensor:
        total = self.like().new_zeros(())
        for a, g in self._pieces():
            W = applied(a, A) @ a.mT
            total = total + (W @ g).flatten(1, 2).mT @ g.flatten(1, 2)
        return total

    def inputs(self, B: Tensor) -> Tensor:
        total = self.like().new_zeros(())
        for a, g in self._pieces():
            W = applied(g, B) @ g.mT
            total = total + (W @ a).flatten(1, 2).mT @ a.flatten(1, 2)
        return total


class Explicit(Rearranged):
    """Any T, with the gradients of samples written out as ``[H, O, n, I]``, some at a time if they are many.

    Args:
        samples: some; their positions may differ.
        workspace: bytes that may be kept from one half step to the next.
    """

    def __init__(self, samples: Sequence[Samples], workspace: int = WORKSPACE) -> None:
        self.samples = samples
        self.shape = samples[0].shape
        heads, outputs, width = self.shape
        size = heads * outputs * width * sum(len(several) for several in samples) * self.like().element_size()
        self._kept = list(self._written_out()) if size <= workspace else None

    def like(self) -> Tensor:
        return self.samples[0].gradients

    def _written_out(self) -> Iterator[Tensor]:
        for several in self.samples:
            for gradients in several.per_sample():
                yield gradients.transpose(1, 2).contiguous()

    def pieces(self) -> Iterator[Tensor]:
        """``[H, O, n', I]``, some samples at a time."""
        yield from self._written_out() if self._kept is None else self._kept

    def outputs(self, A: Tensor) -> Tensor:
        total = self.like().new_zeros(())
        for G in self.pieces():
            total = total + applied(G, A).flatten(2) @ G.flatten(2).mT
        return total

    def inputs(self, B: Tensor) -> Tensor:
        total = self.like().new_zeros(())
        for G in self.pieces():
            total = total + G.flatten(1, 2).mT @ (B @ G.flatten(2)).view(G.shape).flatten(1, 2)
        return total


class Terms(Rearranged):
    """A sum of Kronecker products ``Σ_r c_r B_r ⊗ A_r``.

    Args:
        A: ``[R, H, I, I]``, or diagonals ``[R, H, I]``.
        B: ``[R, H, O, O]``, or diagonals.
        sign: of all of them: −1 to take them away from others.
    """

    def __init__(self, A: Tensor, B: Tensor, sign: float = 1.0) -> None:
        self.A, self.B, self.sign = A, B, sign
        self.shape = (A.shape[1], B.shape[-1], A.shape[-1])

    @property
    def sides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(self.A.shape[1:]), tuple(self.B.shape[1:])

    def like(self) -> Tensor:
        return self.A

    def outputs(self, A: Tensor) -> Tensor:
        return torch.einsum("rh,rh...->h...", (self.A * A).flatten(2).sum(-1), self.B) * self.sign

    def inputs(self, B: Tensor) -> Tensor:
        return torch.einsum("rh,rh...->h...", (self.B * B).flatten(2).sum(-1), self.A) * self.sign


class Joint(Rearranged):
    """The sum of several."""

    def __init__(self, *parts: Rearranged) -> None:
        self.parts = parts
        self.shape = parts[0].shape

    @property
    def sides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.parts[0].sides

    def like(self) -> Tensor:
        return self.parts[0].like()

    def outputs(self, A: Tensor) -> Tensor:
        return torch.stack([part.outputs(A) for part in self.parts]).sum(0)

    def inputs(self, B: Tensor) -> Tensor:
        return torch.stack([part.inputs(B) for part in self.parts]).sum(0)
