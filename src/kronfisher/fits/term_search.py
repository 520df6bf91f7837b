"""Search for the leading terms of the rearranged block in one piece of the samples, and shorter sums of them."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kronfisher.errors import UnsupportedError
from kronfisher.fits.columns import spread
from kronfisher.fits.rearrangement import (
    SHARING,
    Diagonals,
    Explicit,
    Gram,
    Joint,
    Rearranged,
    Span,
    Terms,
    Triplets,
    Weights,
    cheapest,
    clusters,
    deflate,
    lanczos,
    nonnegative_weights,
    norm,
    positive_terms,
    rearrange,
    spans,
    squared_products,
    times,
    truncate,
)
from kronfisher.fits.shapes import Shapes, elements, has_diagonal
from kronfisher.layers.samples import Samples
from kronfisher.operators.factors import Factor

__all__ = ["METHODS", "Method", "TermSearch", "sort_terms", "squared_norm", "squares"]

Method = Literal["lanczos", "deflation", "gram", "nonnegative"]
METHODS = ("lanczos", "deflation", "gram", "nonnegative")
_SWEEPS, _FEW = 30, 3  # of positive terms that stay, and of ones that are only carried
_PAIRS = 2**28  # multiplications of gradients written out that the norm of a piece may take
_WIDE = 2**18  # numbers in both factors of a term beyond which T = 1 stays with weights on the samples


@dataclass(frozen=True)
class TermSearch:
    """A way to find terms ``B_r ⊗ A_r``.

    Attributes:
        method: as for `KroneckerSum`.
        rank: R, terms that stay in the end; more of them are only carried, and need not be the best of their length.
        tolerance: as for `KroneckerSum`.
        iterations: as for `KroneckerSum`.
    """

    method: Method
    rank: int
    tolerance: float
    iterations: int

    @property
    def shares(self) -> bool:
        """Whether columns of one example are taken together."""
        return self.method in ("lanczos", "deflation")

    def require(self, piece: list[Samples], shapes: Shapes, name: str) -> None:
        """UnsupportedError where the method is not for such samples."""
        positions, diagonal = max(use.positions for use in piece), has_diagonal(shapes)
        if self.method == "gram" and (positions > 1 or diagonal):
            why = f"this one has {positions}" if positions > 1 else "a factor of this one is kept as its diagonal"
            raise UnsupportedError(
                f"{name}: method='gram' is for weights with one position per sample and factors that are matrices; "
                f"{why}. Use method='lanczos', for this parameter or for all."
            )

    def leading(
        self, piece: list[Samples], shapes: Shapes, terms: int, odd: bool, less: Terms | None = None
    ) -> tuple[Tensor, Tensor, float, float] | None:
        """The leading terms of a piece of one kind, after another sum was taken away; None if there are none.

        Args:
            piece: samples.
            shapes: of A and B.
            terms: how many.
            odd: antisymmetric ones, else symmetric ones.
            less: the sum that is taken away.

        Returns:
            A ``[R, H, I, I]`` and B ``[R, H, O, O]``, or diagonals; steps taken; how far they are from converged.
        """
        _, outputs, inputs = piece[0].shape
        positions = max(use.positions for use in piece)
        if odd and (
            positions == 1 or self.method == "nonnegative" or min(outputs, inputs) == 1 or has_diagonal(shapes)
        ):
            return None
        if self.method == "nonnegative":
            return self._positive_terms(piece, shapes, terms, positions)
        if self.method == "gram":
            span = Span(piece)
            triplets = span.expand(span.spectrum(terms))
        else:
            triplets = self._find_in_span(piece, shapes, terms, less) if positions == 1 else None
            if triplets is None:
                source = _source(piece, shapes)
                source = source if less is None else Joint(source, less)
                triplets = self._find(source, terms, odd)
        A, B = _share_sigma(triplets.A, triplets.B, triplets.sigma)
        return A, B, float(triplets.steps), float(triplets.change)

    def _find(self, source: Rearranged, terms: int, odd: bool) -> Triplets:
        find = lanczos if self.method == "lanczos" else deflate
        return find(source, terms, odd, self.tolerance, self.iterations)

    def _find_in_span(self, piece: list[Samples], shapes: Shapes, terms: int, less: Terms | None) -> Triplets | None:
        """The same triplets for T = 1 between the spans of the samples; None where that is no cheaper or impossible."""
        if has_diagonal(shapes) or not spans(piece[0].shape, sum(map(len, piece)), terms, self.method):
            return None
        span = Span(spread(piece))
        taken = None if less is None else span.project(less)
        if less is not None and taken is None:
            return None
        return span.expand(self._find(span if taken is None else Joint(span, taken), terms, odd=False))

    def _positive_terms(
        self, piece: list[Samples], shapes: Shapes, terms: int, positions: int
    ) -> tuple[Tensor, Tensor, float, float]:
        """Positive terms of a piece: a start from weights, then descent among all positive semidefinite factors."""
        groups, outputs, inputs = piece[0].shape
        if terms == 1:  # the best product is semidefinite by itself
            pair = _source(piece, shapes).leading(None, self.tolerance, self.iterations)
            A, B = _share_sigma(pair.A[None], pair.B[None], pair.sigma[None])
            return A, B, float(pair.steps), float(pair.change)
        if positions == 1 and not has_diagonal(shapes):
            source = Gram(piece)
            W, U, _, steps = nonnegative_weights(source.inputs_gram, source.outputs_gram, terms, self.tolerance)
            a = source.activations.dense()[:, :, 0]
            W, U = W.to(a), U.to(a)
            A = torch.stack([(a * W[..., r, None]).mT @ a for r in range(terms)])
            B = torch.stack([(source.g * U[..., r, None]).mT @ source.g for r in range(terms)])
            if terms > self.rank or groups * (inputs**2 + outputs**2) > _WIDE:
                A, B = sort_terms(A, B)
                return A, B, float(steps), 0.0
        else:
            pairs = [
                _source(cluster, shapes).leading(None, self.tolerance, self.iterations)
                for cluster in clusters(piece, 4 * terms)
            ]
            A, B = (torch.stack([getattr(pair, name) for pair in pairs]) for name in "AB")
            A, B = _share_sigma(A, B, torch.stack([pair.sigma for pair in pairs]))
            steps = sum(float(pair.steps) for pair in pairs)
            A, B = self.shorten(A, B, terms)
        # What is only carried need not be the best of its length: it is going to be shortened.
        most = _SWEEPS if terms == self.rank else _FEW
        A, B, sweeps, change = positive_terms(_source(piece, shapes), A, B, self.tolerance, most)
        A, B = sort_terms(A, B)
        return A, B, float(steps) + sweeps, change if terms == self.rank else 0.0

    def shorten(self, A: Tensor, B: Tensor, terms: int) -> tuple[Tensor, Tensor]:
        """The best shorter sum of the same kind for a longer one."""
        if len(A) <= terms:
            return A, B
        if self.method != "nonnegative" or terms == 1:
            B, A, _ = truncate(B, A, terms)
            return A, B
        KA, KB = (torch.einsum("rh...,sh...->hrs", factor.double(), factor.double()) for factor in (A, B))
        W, U, _, _ = nonnegative_weights(KA, KB, terms, self.tolerance)
        A = torch.einsum("hsr,sh...->rh...", W.to(A), A)
        return sort_terms(A, torch.einsum("hsr,sh...->rh...", U.to(B), B))

    def polish(self, whole: tuple[Tensor, Tensor], A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, float]:
        """The best positive sum for a longer one, from a good start A and B; and its last change."""
        A, B, _, change = positive_terms(Terms(*whole), A, B, self.tolerance, _SWEEPS)
        return *sort_terms(A, B), change


def _route(piece: list[Samples]) -> str:
    """The cheapest way to take many half steps on matrices that need not be positive."""
    n, positions, columns = sum(map(len, piece)), *(max(each) for each in zip(*map(_counts, piece), strict=True))
    route = cheapest(piece[0].shape, n, positions, columns=columns)
    return "weights" if route == "gram" else route


def _counts(use: Samples) -> tuple[int, int]:
    return use.positions, use.columns


def _source(piece: list[Samples], shapes: Shapes) -> Rearranged:
    if has_diagonal(shapes):
        return Diagonals(piece, shapes)
    route = _route(piece)
    return rearrange(piece if route in SHARING else spread(piece), route)


def _share_sigma(A: Tensor, B: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """σ shared between the factors; the trace of A at least zero."""
    terms = [(times(a, s), times(b, s)) for a, b, s in zip(A, B, _signed_roots(A, sigma), strict=True)]
    return torch.stack([a for a, _ in terms]), torch.stack([b for _, b in terms])


def _signed_roots(A: Tensor, sigma: Tensor) -> Tensor:
    """``[R, H]``."""
    trace = torch.stack([Factor.of(a).diagonal().sum(-1) for a in A])
    return sigma.clamp_min(0).sqrt() * torch.where(trace < 0, -1.0, 1.0).to(A)


def squared_norm(piece: list[Samples]) -> Tensor | None:
    """``‖Σ vec(G_k) vec(G_k)ᵀ‖²``; None where that costs more than the fit."""
    if all(use.positions == 1 for use in piece):
        same, pairs = Weights(piece).squared_products()
    elif sum(map(len, piece)) ** 2 * elements(*piece[0].shape) <= _PAIRS:
        same, pairs = squared_products(Explicit(piece))
    else:
        return None
    return same + pairs


def squares(A: Tensor, B: Tensor) -> Tensor:
    """``‖B ⊗ A‖²`` over all groups."""
    return (norm(A).double() * norm(B).double()).square().sum()


def sort_terms(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Largest term first."""
    order = torch.stack([squares(a, b) for a, b in zip(A, B, strict=True)]).argsort(descending=True)
    return A[order], B[order]
