"""Merging a piece of the samples into the sum of Kronecker products that K-FOC carries."""

import math
import warnings
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kronfisher.errors import NumericalWarning
from kronfisher.fits.columns import spread
from kronfisher.fits.products import ProductSums
from kronfisher.fits.rearrangement import (
    PAIR,
    SHARING,
    STEPS,
    Diagonals,
    Joint,
    Pair,
    Rearranged,
    Source,
    Terms,
    cheapest,
    make_source,
    times,
    truncate,
)
from kronfisher.fits.running_sum import add_terms
from kronfisher.fits.scaling import level
from kronfisher.fits.shapes import Shapes, has_diagonal
from kronfisher.fits.state import WaitingState
from kronfisher.fits.written_out import WrittenOut
from kronfisher.layers.samples import Samples
from kronfisher.operators.factors import Factor

__all__ = ["BY_BATCH", "Aggregation", "Merging", "check_gradients"]

Aggregation = Literal["memory", "running", "approx", "exact"]
BY_BATCH = ("running", "approx")  # of these, batches are pieces, whatever their size

_TERMS = (
    200  # in place of the half steps for terms: by a Gram matrix they take little more than a pair, and come closer
)

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
        route = self._route(state, piece)
        piece = piece if route in SHARING else spread(piece)
        source = self._source(state, piece, route)
        if len(state.inputs) == 1 and self.aggregation != "running":
            steps, change = self._add_pair(state, source, sum(len(samples) * samples.columns for samples in piece))
        else:
            pair = self._merge(state, source)
            steps, change = pair.steps, pair.change
        state.directions = source.directions or state.directions
        self._certify(state, source, piece)
        state.route = route
        state.pieces += 1
        state.steps += steps
        state.change = torch.maximum(state.change, change.double())

    def _route(self, state: ProductSums, piece: list[Samples]) -> str:
        if has_diagonal(self.shapes):
            return "rows"
        if any(isinstance(samples, WrittenOut) for samples in piece):
            return "explicit"
        n, positions = sum(map(len, piece)), max(samples.positions for samples in piece)
        columns = max(samples.columns for samples in piece)
        later = state.begun and len(state.inputs) == 1 and self.aggregation not in BY_BATCH  # one of several pairs
        single = PAIR if len(state.inputs) == 1 else _TERMS
        return self.route or cheapest(
            piece[0].shape,
            n,
            positions,
            columns=columns,
            steps=single if positions == 1 else STEPS,
            tolerance=self.tolerance,
            narrow=later,
        )

    def _source(self, state: ProductSums, piece: list[Samples], route: str) -> Source:
        if has_diagonal(self.shapes):
            return Diagonals(piece, self.shapes)
        start = state.directions if self.warm_start and self.aggregation not in BY_BATCH else None
        shared = max(samples.positions for samples in piece) > 1
        if route == "projected" and shared and self.warm_start and not state.begun:
            state.narrow()  # half steps on running sums come closer than one term of each piece
        running = self.warm_start and len(state.inputs) == 1 and self.aggregation not in BY_BATCH
        return make_source(piece, route, self.tolerance, self.iterations, start, running)

    def _add_pair(self, state: ProductSums, source: Source, n: int) -> tuple[Tensor, Tensor]:
        """Add the pair of n samples to the sums of its factors over everything so far; steps and change."""
        warm = state.begun and self.warm_start and source.starts
        start = Factor.of(state.inputs[0]).mirror().tensor if warm else None
        weight = float(n) if self.aggregation == "approx" else None
        sigma, steps, change = source.add_leading_(
            state.inputs[0], state.outputs[0], weight, start, self.tolerance, self.iterations
        )
        # A batch of zeros has no A of norm one.
        state.weight += sigma if weight is None else torch.where(sigma > 0, weight, 0).to(sigma)
        return steps, change

    def _merge(self, state: ProductSums, source: Source) -> Pair:
        """Recompress the terms carried together with those of a piece; its leading pair."""
        if self.aggregation == "running" and state.begun and isinstance(source, Rearranged):
            before = Terms(*state.terms())
            start = before.A[0] if self.warm_start else None
            pair = Joint(before, source).leading(start, self.tolerance, self.iterations)
            state.inputs, state.outputs = _as_term(pair)
        elif len(state.inputs) > 1:
            before = state.inputs if state.begun and self.warm_start and source.starts else None
            pair, A, B = source.leading_terms(len(state.inputs), before, self.tolerance, self.iterations)
            self._recompress(state, A, B, source.orthogonal)
        else:
            pair = source.leading(None, self.tolerance, self.iterations)
            self._recompress(state, *_as_term(pair))
        return pair

    def _recompress(self, state: ProductSums, A: Tensor, B: Tensor, orthogonal: bool = False) -> None:
        """The best sum of as many terms as before for what is carried and some more."""
        terms = len(state.inputs)
        if not state.begun and len(A) <= terms:  # a sum of zeros adds nothing
            if len(A) > 1 and not orthogonal:
                B, A, _ = truncate(B, A, len(A))
            state.outputs[: len(B)], state.inputs[: len(A)] = B, A
            return
        state.inputs, state.outputs, inner = add_terms((state.inputs, state.outputs), (A, B), terms)
        state.norm += 2 * inner  # of the pieces, this one and those before

    def _certify(self, state: ProductSums, source: Source, piece: list[Samples]) -> None:
        """‖F‖² of a piece, where it costs no more than a few half steps; between pieces it comes from their terms.

        With one term a piece, too little is left of a piece to tell about the others; and what connects the groups of a
        convolution is in no term. Nor does one piece stand for another, as data may be sorted by class or column.
        """
        groups = piece[0].shape[0]
        if state.begun and (len(state.inputs) == 1 or groups > 1):
            state.uncertain = True
        elif (squared := source.squared_norm(piece, _PAIRS)) is not None:
            state.norm += squared
        else:
            state.uncertain = True


def _as_term(pair: Pair) -> tuple[Tensor, Tensor]:
    """A ``[1, H, I, I]`` and B, which share the root of σ."""
    root = pair.sigma.sqrt()
    return times(pair.A, root)[None], times(pair.B, root)[None]


def check_gradients(state: WaitingState) -> bool:
    """Refuse infinite gradients, bring extreme ones to the size of inputs; whether it said that they vanish."""
    tiny = torch.finfo(state.waiting[0].gradients.dtype).tiny
    sizes = [torch.linalg.vector_norm(samples.gradients) for samples in state.waiting if len(samples)]
    small = (1e9 * tiny) ** 0.5
    if all(small < size < 1 / small for size in (torch.stack(sizes).tolist() if sizes else [])):  # read at once
        return False  # the usual case, at a fraction of the time
    if not math.isfinite(_largest(state)):
        state.check()
    state.waiting = level(state.waiting)
    if 0 < (largest := _largest(state)) < tiny**0.5:
        warnings.warn(
            f"{state.name}: its gradients and inputs are {largest:.0e} at most, and their squares vanish in "
            f"{state.waiting[0].gradients.dtype}: they count as zero. Scale the loss up, or use float64.",
            NumericalWarning,
            stacklevel=2,
        )
        # Some processors keep a few digits of such squares, whose inverses overflow: zero on all of them.
        state.waiting = [replace(use, gradients=torch.zeros_like(use.gradients)) for use in state.waiting]
        return True
    return False


def _largest(state: WaitingState) -> float:
    """Of the numbers in gradients that wait."""
    ends = [end for samples in state.waiting if len(samples) for end in samples.gradients.aminmax()]
    return float(torch.stack(ends).abs().max()) if ends else 0.0
