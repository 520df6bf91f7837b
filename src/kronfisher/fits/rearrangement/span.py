"""T = 1: the rearranged Fisher matrix between the spans of the samples, a matrix of their number squared.

All singular pairs but those of zero are ``A = Σ_k w_k a_k a_kᵀ`` and ``B = Σ_k u_k g_k g_kᵀ``. In orthonormal bases of
the two spans, which the roots of ``(a aᵀ)∘²`` and ``(g gᵀ)∘²`` give, ℛ(F) is one matrix ``[n, n]``: its whole spectrum,
or many half steps, cost less than a few half steps on wide factors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kronfisher.fits.rearrangement.joint import Terms
from kronfisher.fits.rearrangement.rearranged import Rearranged
from kronfisher.fits.rearrangement.scales import norm, over
from kronfisher.fits.rearrangement.spectrum import Triplets
from kronfisher.fits.rearrangement.weights import Weights
from kronfisher.layers.samples import Samples
from kronfisher.linalg import eigh

__all__ = ["Span", "spans"]

_ROOTS = 100  # multiplications, over n³, as costly as both roots in float64
_LOST = 1e-4  # of a matrix, by its norm, outside of a span that it was taken for within
_STEPS = {"lanczos": 4, "deflation": 25}  # double steps a term, about


def spans(shape: tuple[int, int, int], n: int, terms: int, method: str) -> bool:
    """Whether so many terms of n samples cost less in their span than on matrices of the layer's size.

    Example:
        >>> [spans((1, width, width), n=512, terms=8, method="lanczos") for width in (1000, 50)]
        [True, False]
    """
    _, outputs, width = shape
    return (2 * _STEPS[method] - 1) * terms * (outputs**2 + width**2) > _ROOTS * n**2


class Span(Rearranged):
    """ℛ(F) between coordinates ``[H, n]`` of A and of B, in float64.

    Args:
        samples: with one position each.
    """

    def __init__(self, samples: Sequence[Samples]) -> None:
        self.samples = Weights(samples)
        self.shape = self.samples.shape
        self.a, self.g = self.samples.activations.dense()[:, :, 0], self.samples.g
        root, self._inputs = _root(self.a)
        self._outputs_root, self._outputs = _root(self.g)
        self.matrix = self._outputs_root.mT @ root
        self._first = root.sum(1)  # of Σ_k a_k a_kᵀ

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        groups, rows, columns = self.matrix.shape
        return (groups, columns), (groups, rows)

    def like(self) -> Tensor:
        return self.matrix

    def first(self) -> Tensor:
        return self._first

    def outputs(self, A: Tensor, odd: bool = False) -> Tensor:
        return torch.einsum("hij,hj->hi", self.matrix, A)

    def inputs(self, B: Tensor, odd: bool = False) -> Tensor:
        return torch.einsum("hij,hi->hj", self.matrix, B)

    def spectrum(self, rank: int) -> Triplets:
        """The leading triplets, in coordinates: from all of them at once."""
        P, sigma, Q = torch.linalg.svd(self.matrix)
        keep = min(rank, sigma.shape[-1])
        A, B, sigma = Q.mT[..., :keep].permute(2, 0, 1), P[..., :keep].permute(2, 0, 1), sigma[:, :keep].mT
        if keep < rank:
            A, B, sigma = (torch.cat([t, t.new_zeros(rank - keep, *t.shape[1:])]) for t in (A, B, sigma))
        zero = self.matrix.new_zeros(())
        return Triplets(A, B, sigma, zero, zero)

    def project(self, terms: Terms) -> Terms | None:
        """A sum of products of matrices ``Σ_k w_k a_k a_kᵀ`` and ``Σ_k u_k g_k g_kᵀ``, in coordinates; else None."""
        coordinates = []
        for rows, back, factors in ((self.a, self._inputs, terms.A), (self.g, self._outputs, terms.B)):
            products = torch.stack([torch.linalg.vecdot(rows @ term, rows) for term in factors])  # ⟨X, x_k x_kᵀ⟩
            coordinates.append(torch.einsum("hij,rhi->rhj", back, products.double()))
            inside = torch.linalg.vector_norm(coordinates[-1], dim=-1)
            whole = torch.stack([norm(term) for term in factors])
            if bool((inside < (1 - _LOST) * whole).any()):
                return None
        return Terms(coordinates[0], coordinates[1], terms.sign)

    def expand(self, triplets: Triplets) -> Triplets:
        """Triplets in coordinates as matrices ``[R, H, I, I]`` and ``[R, H, O, O]``."""
        like = self.g
        factors = []
        for rows, back, coordinates in ((self.a, self._inputs, triplets.A), (self.g, self._outputs, triplets.B)):
            weights = torch.einsum("hij,rhj->rhi", back, coordinates)
            terms = torch.stack([(rows * w[..., None].to(like)).mT @ rows for w in weights])
            factors.append(torch.stack([over(term, norm(term)) for term in terms]))
        return Triplets(
            factors[0], factors[1], triplets.sigma.to(like), triplets.steps.to(like), triplets.change.to(like)
        )


def _root(rows: Tensor) -> tuple[Tensor, Tensor]:
    """X ``[H, n, n]`` with ``X Xᵀ = (x xᵀ)∘²`` and Y with Yᵀ times that times Y the identity, for x ``[H, n, D]``."""
    rows = rows.double()
    scale = rows.abs().amax((1, 2))
    scale = torch.where(scale > 0, scale, 1)  # of zeros everything is zero
    rows = over(rows, scale)
    gram = (rows @ rows.mT).square()
    values, vectors = eigh(gram, "products of samples")  # many are zero where units are dead
    values = torch.where(values > values[:, -1:] * gram.shape[-1] * torch.finfo(gram.dtype).eps, values, 0)
    root = values.sqrt()
    scale = (scale**2)[:, None, None]
    inverse = torch.where(root > 0, 1 / root, 0)
    return vectors * root.unsqueeze(1) * scale, vectors * inverse.unsqueeze(1) / scale
