"""How a piece of the samples goes into the sum of Kronecker products that K-FOC carries."""

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kronfisher.errors import NumericalWarning
from kronfisher.fits.products import ProductSums
from kronfisher.fits.rearrangement import (
    Diagonals,
    Gram,
    Joint,
    Pair,
    Projected,
    Rearranged,
    Terms,
    cheapest,
    norm,
    over,
    rearrange,
    times,
    truncate,
)
from kronfisher.fits.running_sum import add_terms
from kronfisher.fits.shapes import Shapes, has_diagonal
from kronfisher.layers.samples import Samples
from kronfisher.linalg import mirror
from kronfisher.operators.factors import Factor

__all__ = ["BY_BATCH", "Aggregation", "Merging", "check_gradients"]

Aggregation = Literal["memory", "running", "approx", "exact"]
BY_BATCH = ("running", "approx")  # of these, batches are pieces, whatever their size

_PAIRS = 2**28  # multiplications of gradients written out that ‖F‖ of a piece may take


@dataclass(frozen=True)
class Merging:
    """Takes pieces of samples into the sums of a state, one after the other.

    Attributes:
        aggregation: as for `KFOC`.
        tolerance: likewise.
        iterations: likewise.
        warm_start: likewise.
        route: likewise.
        shapes: of A and B.
    """

    aggregation: Aggregation
    tolerance: float
    iterations: int
    warm_start: bool
    route: str | None
    shapes: Shapes

    def add_(self, state: ProductSums, piece: list[Samples]) -> None:
        """Take a piece into the sums of a state."""
        shape, n = piece[0].shape, sum(map(len, piece))
        positions = max(samples.positions for samples in piece)
        if has_diagonal(self.shapes):
            route, source = "rows", Diagonals(piece, self.shapes)
        else:
            route = self.route or cheapest(shape, n, positions, tolerance=self.tolerance)
            start = state.directions if self.warm_start and self.aggregation not in BY_BATCH else None
            if route == "projected" and positions > 1 and self.warm_start and not state.begun:
                state.narrow()  # half steps on running sums come closer than one term of each piece
            running = self.warm_start and self._one(state)
            source = rearrange(piece, route, self.tolerance, self.iterations, start, running)
        if self.aggregation == "running" and not isinstance(source, Projected) and state.begun:
            before = Terms(*state.terms())
            start = before.A[0] if self.warm_start else None
            pair = Joint(before, source).leading(start, self.tolerance, self.iterations)
            self._replace(state, pair)
        elif isinstance(source, Projected):
            pair = self._add_projected(state, source, n)
            state.directions = (source.right, source.left)
        elif isinstance(source, Gram) and len(state.inputs) == 1 and self.aggregation != "running":
            w, u, sigma, steps, change = source.weights(self.tolerance, self.iterations)
            root = self._share(sigma, n)
            source.add_inputs_(state.inputs[0], times(w, root))  # straight into the sum
            source.add_outputs_(state.outputs[0], times(u, root))
            state.weight += self._weight(sigma, n)
            pair = Pair(sigma, sigma, sigma, steps, change)
        else:
            warm = state.begun and self.warm_start and not isinstance(source, Gram)
            if (terms := len(state.inputs)) > 1:
                before = state.inputs if warm else None
                pair, A, B = source.leading_terms(terms, before, self.tolerance, self.iterations)
                self._recompress(state, A, B, orthogonal=isinstance(source, Gram))
            else:
                start = Factor.of(state.inputs[0]).mirror().tensor if warm else None
                pair = source.leading(start, self.tolerance, self.iterations)
                self._add(state, pair, n)
        self._certify(state, source, piece)
        state.route = route
        state.pieces += 1
        state.steps += pair.steps
        state.change = torch.maximum(state.change, pair.change.double())

    def _add_projected(self, state: ProductSums, source: Projected, n: int) -> Pair:
        """Half steps on both factors: straight into the sum where there is one term and pieces weigh as they are."""
        if self._one(state):
            sigma = source.add_(state.inputs[0], state.outputs[0])
            state.weight += sigma
            return Pair(sigma, sigma, sigma, source.steps, source.change)
        A, B = torch.zeros_like(state.inputs[0]), torch.zeros_like(state.outputs[0])
        weight = source.add_(A, B)
        A, B = mirror(A), mirror(B)
        sizes = norm(A), norm(B)
        sigma = over(sizes[0] * sizes[1], weight)
        pair = Pair(over(A, sizes[0]), over(B, sizes[1]), sigma, source.steps, source.change)
        self._add(state, pair, n)
        return pair

    def _one(self, state: ProductSums) -> bool:
        """Whether one product is carried, as the sums of its factors over everything so far."""
        return len(state.inputs) == 1 and self.aggregation not in BY_BATCH

    def _share(self, sigma: Tensor, n: int) -> Tensor:
        # The factors of a batch's mean are those of its sum over √n, and batches count by their size.
        return (sigma * n).sqrt() if self.aggregation == "approx" else sigma

    def _weight(self, sigma: Tensor, n: int) -> Tensor:
        return torch.full_like(sigma, n) if self.aggregation == "approx" else sigma

    def _add(self, state: ProductSums, pair: Pair, n: int) -> None:
        """One more pair into the sum that is carried."""
        if len(state.inputs) == 1 and self.aggregation != "running":
            root = self._share(pair.sigma, n)
            state.inputs[0] += times(pair.A, root)
            state.outputs[0] += times(pair.B, root)
            state.weight += self._weight(pair.sigma, n)
            return
        root = pair.sigma.sqrt()
        self._recompress(state, times(pair.A, root)[None], times(pair.B, root)[None])

    def _recompress(self, state: ProductSums, A: Tensor, B: Tensor, orthogonal: bool = False) -> None:
        """The best sum of as many terms as before for what is carried and some more."""
        terms = len(state.inputs)
        if not state.begun and len(A) <= terms:  # of zeros nothing comes
            if len(A) > 1 and not orthogonal:
                B, A, _ = truncate(B, A, len(A))
            state.outputs[: len(B)], state.inputs[: len(A)] = B, A
            return
        state.inputs, state.outputs, inner = add_terms((state.inputs, state.outputs), (A, B), terms)
        state.norm += 2 * inner  # of the pieces, this one and those before

    def _replace(self, state: ProductSums, pair: Pair) -> None:
        root = pair.sigma.sqrt()
        state.inputs = times(pair.A, root)[None]
        state.outputs = times(pair.B, root)[None]

    def _certify(self, state: ProductSums, source: Rearranged | Projected, piece: list[Samples]) -> None:
        """‖F‖² of a piece, where it costs no more than a few half steps; between pieces it comes from their terms.

        With one term a piece, too little is left of a piece to tell about the others; and what connects the groups of a
        convolution is in no term. Pieces are no fair sample of each other either: columns and classes come in turn.
        """
        groups = piece[0].shape[0]
        if state.begun and (len(state.inputs) == 1 or groups > 1):
            state.uncertain = True
        elif (squared := source.squared_norm(piece, _PAIRS)) is not None:
            state.norm += squared
        else:
            state.uncertain = True


def check_gradients(state: ProductSums) -> None:
    """Refuse gradients that are not finite, and say so where they are too small to be squared."""
    tiny = torch.finfo(state.waiting[0].gradients.dtype).tiny
    sizes = [torch.linalg.vector_norm(samples.gradients) for samples in state.waiting if len(samples)]
    if all(bool(torch.isfinite(size)) and float(size) > (1e9 * tiny) ** 0.5 for size in sizes):
        return  # the usual case, at a fraction of the time
    ends = [end for samples in state.waiting if len(samples) for end in samples.gradients.aminmax()]
    largest = float(torch.stack(ends).abs().max()) if ends else 0.0
    if not math.isfinite(largest):
        state.check()
    if 0 < largest < tiny**0.5:
        warnings.warn(
            f"{state.name}: its gradients are {largest:.0e} at most, and their squares vanish in "
            f"{state.waiting[0].gradients.dtype}: they count as zero. Scale the loss up, or use float64.",
            NumericalWarning,
            stacklevel=2,
        )
