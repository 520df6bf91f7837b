"""How a piece of the samples goes into the sum of Kronecker products that K-FOC carries."""

import math
import warnings
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kronfisher.errors import NumericalWarning
from kronfisher.fits.fit import Shapes, State, has_diagonal
from kronfisher.fits.rearrangement import (
    Diagonals,
    Explicit,
    Gram,
    Joint,
    Pair,
    Projected,
    Terms,
    cheapest,
    norm,
    over,
    rearranged,
    squared_products,
    times,
    truncated,
)
from kronfisher.fits.running_sum import added
from kronfisher.layers.samples import Samples
from kronfisher.linalg import mirror
from kronfisher.operators.factors import Factor

__all__ = ["BY_BATCH", "Aggregation", "Merging", "look_over", "split", "widened"]

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
        sides: shapes of A and B.
    """

    aggregation: Aggregation
    tolerance: float
    iterations: int
    warm_start: bool
    route: str | None
    sides: Shapes

    def add_(self, state: State, piece: list[Samples]) -> None:
        """Take a piece into the sums of a state."""
        shape, n = piece[0].shape, sum(map(len, piece))
        positions = max(several.positions for several in piece)
        sides = self.sides
        if has_diagonal(sides):
            route, source = "rows", Diagonals(piece, sides)
        else:
            route = self.route or cheapest(shape, n, positions, tolerance=self.tolerance)
            start = state.facts.get("directions") if self.warm_start and self.aggregation not in BY_BATCH else None
            if route == "projected" and positions > 1 and self.warm_start and "route" not in state.facts:
                narrow(state)  # half steps on running sums come closer than one term of each piece
            running = self.warm_start and self._one(state)
            source = rearranged(piece, route, self.tolerance, self.iterations, start, running)
        sums, begun = state.sums, "route" in state.facts
        if self.aggregation == "running" and not isinstance(source, Projected) and begun:
            before = Terms(*split(state))
            start = before.A[0] if self.warm_start else None
            pair = Joint(before, source).leading(start, self.tolerance, self.iterations)
            self._replace(state, pair)
        elif isinstance(source, Projected):
            pair = self._add_projected(state, source, n)
            state.facts["directions"] = (source.right, source.left)
        elif isinstance(source, Gram) and len(sums["inputs"]) == 1 and self.aggregation != "running":
            w, u, sigma, steps, change = source.weights(self.tolerance, self.iterations)
            root = self._share(sigma, n)
            source.add_inputs_(sums["inputs"][0], times(w, root))  # straight into the sum
            source.add_outputs_(sums["outputs"][0], times(u, root))
            sums["weight"] += self._weight(sigma, n)
            pair = Pair(sigma, sigma, sigma, steps, change)
        else:
            warm = begun and self.warm_start and not isinstance(source, Gram)
            if (terms := len(sums["inputs"])) > 1:
                before = sums["inputs"] if warm else None
                pair, A, B = source.leading_terms(terms, before, self.tolerance, self.iterations)
                self._recompress(state, A, B, orthogonal=isinstance(source, Gram))
            else:
                start = Factor.of(sums["inputs"][0]).mirror().tensor if warm else None
                pair = source.leading(start, self.tolerance, self.iterations)
                self._add(state, pair, n)
        self._certify(state, source, piece, n)
        state.facts["route"] = route
        sums["pieces"] += 1
        sums["steps"] += pair.steps
        sums["change"] = torch.maximum(sums["change"], pair.change.double())

    def _add_projected(self, state: State, source: Projected, n: int) -> Pair:
        """Half steps on both sides: straight into the sum where one product is carried and pieces weigh as they are."""
        sums = state.sums
        if self._one(state):
            sigma = source.add_(sums["inputs"][0], sums["outputs"][0])
            sums["weight"] += sigma
            return Pair(sigma, sigma, sigma, source.steps, source.change)
        A, B = torch.zeros_like(sums["inputs"][0]), torch.zeros_like(sums["outputs"][0])
        weight = source.add_(A, B)
        A, B = mirror(A), mirror(B)
        sizes = norm(A), norm(B)
        sigma = over(sizes[0] * sizes[1], weight)
        pair = Pair(over(A, sizes[0]), over(B, sizes[1]), sigma, source.steps, source.change)
        self._add(state, pair, n)
        return pair

    def _one(self, state: State) -> bool:
        """Whether one product is carried, as the sums of its sides over everything so far."""
        return len(state.sums["inputs"]) == 1 and self.aggregation not in BY_BATCH

    def _share(self, sigma: Tensor, n: int) -> Tensor:
        # The factors of a batch's mean are those of its sum over √n, and batches count by their size.
        return (sigma * n).sqrt() if self.aggregation == "approx" else sigma

    def _weight(self, sigma: Tensor, n: int) -> Tensor:
        return torch.full_like(sigma, n) if self.aggregation == "approx" else sigma

    def _add(self, state: State, pair: Pair, n: int) -> None:
        """One more pair into the sum that is carried."""
        sums = state.sums
        if len(sums["inputs"]) == 1 and self.aggregation != "running":
            root = self._share(pair.sigma, n)
            sums["inputs"][0] += times(pair.A, root)
            sums["outputs"][0] += times(pair.B, root)
            sums["weight"] += self._weight(pair.sigma, n)
            return
        root = pair.sigma.sqrt()
        self._recompress(state, times(pair.A, root)[None], times(pair.B, root)[None])

    def _recompress(self, state: State, A: Tensor, B: Tensor, orthogonal: bool = False) -> None:
        """The best sum of as many terms as before for what is carried and some more."""
        sums, terms = state.sums, len(state.sums["inputs"])
        if "route" not in state.facts and len(A) <= terms:  # of zeros nothing comes
            if len(A) > 1 and not orthogonal:
                B, A, _ = truncated(B, A, len(A))
            sums["outputs"][: len(B)], sums["inputs"][: len(A)] = B, A
            return
        sums["inputs"], sums["outputs"], inner = added((sums["inputs"], sums["outputs"]), (A, B), terms)
        sums["norm"] += 2 * inner  # of the pieces, this one and those before

    def _replace(self, state: State, pair: Pair) -> None:
        root = pair.sigma.sqrt()
        state.sums["inputs"] = times(pair.A, root)[None]
        state.sums["outputs"] = times(pair.B, root)[None]

    def _certify(self, state: State, source: object, piece: list[Samples], n: int) -> None:
        """‖F‖² of a piece, where it costs no more than a few half steps; between pieces it comes from their terms.

        With one term a piece, too little is left of a piece to tell about the others; and what connects the groups of a
        convolution is in no term. Pieces are no fair sample of each other either: columns and classes come in turn.
        """
        groups, outputs, inputs = piece[0].shape
        if "route" in state.facts and (len(state.sums["inputs"]) == 1 or groups > 1):
            state.facts["uncertain"] = True
        elif isinstance(source, Gram):
            state.sums["norm"] += sum(source.squared_products())
        elif not isinstance(source, Projected | Diagonals) and n * groups * outputs * inputs * n <= _PAIRS:
            state.sums["norm"] += sum(squared_products(source if isinstance(source, Explicit) else Explicit(piece)))
        else:
            state.facts["uncertain"] = True


def narrow(state: State) -> None:
    """Room for one product, in a state that holds nothing yet."""
    for side in ("inputs", "outputs"):
        state.sums[side] = state.sums[side][:1]


def widened(state: State, terms: int) -> State:
    """One product, as the first of several terms."""
    if len(state.sums["inputs"]) >= terms:
        return state
    sides = dict(zip(("inputs", "outputs"), split(state), strict=True))
    room = {name: side.new_zeros(terms - len(side), *side.shape[1:]) for name, side in sides.items()}
    sums = {name: torch.cat([side, room[name]]) for name, side in sides.items()}
    weight = torch.zeros_like(state.sums["weight"])
    return replace(state, sums={**state.sums, **sums, "weight": weight}, facts={**state.facts, "uncertain": True})


def look_over(state: State) -> None:
    """Refuse gradients that are not finite, and say so where they are too small to be squared."""
    tiny = torch.finfo(state.waiting[0].gradients.dtype).tiny
    sizes = [torch.linalg.vector_norm(several.gradients) for several in state.waiting if len(several)]
    if all(bool(torch.isfinite(size)) and float(size) > (1e9 * tiny) ** 0.5 for size in sizes):
        return  # the usual case, at a fraction of the time
    ends = [end for several in state.waiting if len(several) for end in several.gradients.aminmax()]
    largest = float(torch.stack(ends).abs().max()) if ends else 0.0
    if not math.isfinite(largest):
        state.checked()
    if 0 < largest < tiny**0.5:
        warnings.warn(
            f"{state.name}: its gradients are {largest:.0e} at most, and their squares vanish in "
            f"{state.waiting[0].gradients.dtype}: they count as zero. Scale the loss up, or use float64.",
            NumericalWarning,
            stacklevel=2,
        )


def split(state: State) -> tuple[Tensor, Tensor]:
    """The terms carried, A ``[R, H, I, I]`` and B ``[R, H, O, O]``, of the sum over samples."""
    A, B, weight = state.sums["inputs"], state.sums["outputs"], state.sums["weight"]
    if len(A) > 1 or not bool((weight > 0).any()):
        return A, B
    return Factor.of(A[0]).mirror().tensor[None], Factor.of(over(B[0], weight)).mirror().tensor[None]
