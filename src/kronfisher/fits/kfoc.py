"""K-FOC: the best Kronecker product of every layer in Frobenius norm."""

import math
import warnings
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kronfisher.blocks import Block
from kronfisher.errors import NumericalError, NumericalWarning
from kronfisher.fits.carried import balanced, inner, leading, pieces
from kronfisher.fits.fit import (
    MAX_DIM,
    Fit,
    Plan,
    Shapes,
    State,
    checked_max_dim,
    elements,
    reciprocal,
    register,
    side_shapes,
)
from kronfisher.linalg import mirror
from kronfisher.operators import Kronecker, Operator
from kronfisher.rearrangement import (
    ROUTES,
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
    whole,
)
from kronfisher.samples import WORKSPACE, Samples

__all__ = ["KFOC", "KPSVD"]

Aggregation = Literal["memory", "running", "approx", "exact"]

_PIECE = 512  # samples that are treated at once
_ROOM = 2**21  # bytes that may always wait for more
_WIDE = 2**20  # numbers in all terms at most, where several are carried
_SMALL = 2**12  # numbers in both sides of a term up to which other terms than the first take whole steps
_SOME = 4  # where not even so many fit, of those wanted, one is carried
_PAIRS = 2**28  # multiplications of gradients written out that ‖F‖ of a piece may take


@dataclass(frozen=True)
class KFOC(Fit):
    """``F ≈ B ⊗ A`` with the smallest Frobenius error, both sides positive semidefinite (Schnaus, Lee & Triebel 2021).

    B ⊗ A is the leading singular pair of ``ℛ(F): M ↦ Σ_k G_k M G_kᵀ``, the exact block with all cross terms of shared
    weights; see `kronfisher.rearrangement`. Up to 512 samples (data times draws or columns) are treated at once and
    exactly; over more of them the aggregation decides.

    Args:
        aggregation: ``"memory"`` carries a sum of `rank_memory` products from piece to piece and recompresses it:
            close to the optimum over all data in one pass, whatever the batch size. ``"exact"`` then repeats half steps
            over all data until they change nothing: the optimum, in several passes. ``"running"`` (the best product for
            the estimate so far and the new batch) and ``"approx"`` (the mean of the batches' factors) are the paper's;
            both depend on the size and order of the batches.
        rank_memory: products carried by ``"memory"``, at most: as many as take a million numbers; where not even four
            of them do, one is carried, as a mean of the pieces' factors weighted by their singular values.
        tolerance: iterations stop when A, scaled to norm one, changes by no more. The error is off by half of its
            square. From 1e-4 up, wide weights that many positions share are iterated through their leading 32
            directions.
        iterations: double steps at most, in one piece and, for ``"exact"``, over the data.
        warm_start: start from what was found so far, where a start is free.
        max_dim: sides beyond this size are kept as their diagonals, as those of lookups in a table are: then B ⊗ A is
            the best product under that constraint.
        route: how half steps are taken (`kronfisher.rearrangement.routes`); None: by static cost.

    Raises:
        ValueError: an option makes no sense.

    Example:
        >>> import torch, kronfisher as kf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> data = torch.randn(64, 4)
        >>> best = kf.estimate(model, data, kf.Categorical(), fit=kf.KFOC(), labels="exact")
        >>> other = kf.estimate(model, data, kf.Categorical(), fit=kf.KFAC(), labels="exact")
        >>> best.error(data).relative < other.error(data).relative
        True
    """

    aggregation: Aggregation = "memory"
    rank_memory: int = 4
    tolerance: float = 1e-3
    iterations: int = 50
    warm_start: bool = True
    max_dim: int = MAX_DIM
    route: str | None = None

    def __post_init__(self) -> None:
        checked_max_dim(self)
        if self.aggregation not in ("memory", "running", "approx", "exact"):
            raise ValueError(f"aggregation={self.aggregation!r}: use 'memory', 'exact', 'running' or 'approx'.")
        if self.rank_memory < 1 or self.iterations < 1 or not self.tolerance >= 0:
            raise ValueError(f"{self!r}: rank_memory and iterations are at least 1, tolerance at least 0.")
        if self.route is not None and self.route not in ROUTES:
            raise ValueError(f"route={self.route!r}: use one of {', '.join(ROUTES)}, or None for the cheapest.")

    @property
    def linear(self) -> bool:
        return False

    @property
    def by_batch(self) -> bool:
        return self.aggregation in ("running", "approx")

    def _terms(self, block: Block) -> int:
        """Products that are carried."""
        sides = self.sides(block)
        room = _WIDE // sum(elements(*side) for side in sides)
        several = self.aggregation in ("memory", "exact") and all(len(side) == 3 for side in sides)
        return min(self.rank_memory, room) if several and room >= min(self.rank_memory, _SOME) else 1

    def sides(self, block: Block) -> Shapes:
        """Shapes of A and B: ``[H, D, D]``, or ``[H, D]`` for a diagonal."""
        return side_shapes((block,), self.max_dim)

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        sides, terms = [elements(*side) for side in self.sides(group[0])], self._terms(group[0])
        # Several terms are merged with new ones, and a leading pair is iterated on a few matrices of the larger side.
        temporary = 4 * terms * sum(sides) if terms > 1 else 2 * max(sides)
        passes = 1 if self.aggregation != "exact" else 1 + 2 * self.iterations
        room = max(_ROOM, element * max(sides))
        bytes = (terms + 1) * element * sum(sides)
        return Plan(bytes, passes, temporary=temporary * element, waits=_PIECE, waiting=room)

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> State:
        (inputs, outputs), terms = self.sides(group[0]), self._terms(group[0])
        scalar = like.new_zeros((), dtype=torch.float64)
        sums = {
            "inputs": like.new_zeros(terms, *inputs),
            "outputs": like.new_zeros(terms, *outputs),
            "weight": like.new_zeros(inputs[0]),
            **{name: scalar.clone() for name in ("norm", "pieces", "steps")},
            "change": like.new_zeros((), dtype=torch.float64),
        }
        return State(group, plan, sums)

    def update(self, state: State, samples: tuple[Samples, ...]) -> State:
        (use,) = samples
        if use.first:
            state.rows = state.rows + use.rows
        if not len(use):
            return state
        if state.fixed:
            return self._half_step(state, use)
        if self.by_batch and use.first:  # draws and columns of one batch come one by one
            self._flush(state)
        state.waiting.append(use)
        if self.by_batch or not self._enough(state):
            state.waiting[-1] = use.copied()
        else:
            self._flush(state)
        return state

    def _enough(self, state: State) -> bool:
        """Whether what is waiting is worth a piece, or more than may wait."""
        several = sum(map(len, state.waiting)) >= _PIECE
        return several or sum(samples.bytes for samples in state.waiting) > state.plan.waiting

    def _flush(self, state: State) -> None:
        """Merge what has been waiting."""
        if not state.waiting:
            return
        state.facts.pop("alone", None)
        if len(state.sums["inputs"]) > 1 or state.waiting[0].gradients.device.type == "cpu":
            _look_over(state)  # decompositions wait for the device anyway, and tell less of what is wrong
        waiting, state.waiting = state.waiting, []
        whole = self.by_batch or any(samples.positions > 1 for samples in waiting)
        for piece in [waiting] if whole else pieces(waiting, self._size(state)):
            try:
                self._merge(state, piece)
            except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
                state.checked()
                raise NumericalError(
                    f"{state.name}: products of its inputs and gradients are not finite though they are themselves; "
                    "scale the loss down, look at the weights, or use float64."
                ) from error

    def _size(self, state: State) -> int:
        """Samples that are treated at once where positions do not share the weight: fewer in a small memory budget."""
        (_, outputs, width), element = state.blocks[0].shape, state.sums["inputs"].element_size()
        size = _PIECE
        while size > 1 and state.plan.workspace < WORKSPACE:  # Gram matrices, and both sides of the samples
            if element * size * (6 * size + 4 * (outputs + width)) <= state.plan.workspace:
                break
            size //= 2
        return size

    def _merge(self, state: State, piece: list[Samples]) -> None:
        shape, n = piece[0].shape, sum(map(len, piece))
        positions = max(several.positions for several in piece)
        sides = self.sides(state.blocks[0])
        if any(len(side) == 2 for side in sides):
            route, source = "rows", Diagonals(piece, sides)
        else:
            route = self.route or cheapest(shape, n, positions, tolerance=self.tolerance)
            start = state.facts.get("directions") if self.warm_start and not self.by_batch else None
            source = rearranged(piece, route, self.tolerance, self.iterations, start)
        sums, begun = state.sums, "route" in state.facts
        if self.aggregation == "running" and not isinstance(source, Projected) and begun:
            before = Terms(*_split(state))
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
                before = (sums["inputs"], sums["outputs"]) if warm else None
                half = None
                if before is not None and sum(elements(*side) for side in sides) > _SMALL:
                    half = "forwards" if state.facts.get("half") == "backwards" else "backwards"
                    state.facts["half"] = half  # in turns they are whole steps, from piece to piece
                pair, A, B = source.leading_terms(terms, before, self.tolerance, self.iterations, half)
                if begun:
                    sums["norm"] += 2 * inner((A, B), (sums["inputs"], sums["outputs"]))
                self._recompress(state, A, B)
            else:
                start = whole(sums["inputs"][0]) if warm else None
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
        if len(sums["inputs"]) == 1 and not self.by_batch:
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

    def _recompress(self, state: State, A: Tensor, B: Tensor) -> None:
        """The best sum of as many terms as before for what is carried and some more."""
        sums, terms = state.sums, len(state.sums["inputs"])
        if "route" not in state.facts and len(A) <= terms:  # of zeros nothing comes
            if len(A) > 1:
                B, A, _ = truncated(B, A, len(A))
            sums["outputs"][: len(B)], sums["inputs"][: len(A)] = B, A
            return
        sums["outputs"], sums["inputs"], _ = truncated(sums["outputs"], sums["inputs"], terms, (B, A))

    def _replace(self, state: State, pair: Pair) -> None:
        root = pair.sigma.sqrt()
        state.sums["inputs"] = times(pair.A, root)[None]
        state.sums["outputs"] = times(pair.B, root)[None]

    def _certify(self, state: State, source: object, piece: list[Samples], n: int) -> None:
        """‖F‖² of a piece, where it costs no more than a few half steps; between pieces it comes from their terms.

        With one term a piece, too little is left of a piece to tell about the others; and what connects the groups of a
        convolution is in no term. Pieces are no fair sample of each other either: columns and classes come in turn.
        """
        heads, outputs, inputs = piece[0].shape
        if "route" in state.facts and (len(state.sums["inputs"]) == 1 or heads > 1):
            state.facts["uncertain"] = True
        elif isinstance(source, Gram):
            state.sums["norm"] += sum(source.squared_products())
        elif not isinstance(source, Projected | Diagonals) and n * heads * outputs * inputs * n <= _PAIRS:
            state.sums["norm"] += sum(squared_products(source if isinstance(source, Explicit) else Explicit(piece)))
        else:
            state.facts["uncertain"] = True

    def _half_step(self, state: State, use: Samples) -> State:
        """Of the passes that polish: one side is fixed, the other is summed."""
        route, sides = (
            self.route if self.route in ("weights", "rows", "explicit") else None,
            self.sides(state.blocks[0]),
        )
        if any(len(side) == 2 for side in sides):
            source = Diagonals([use], sides)
        else:
            if route is None:
                found = cheapest(use.shape, len(use), use.positions, steps=1)
                route = "weights" if found == "gram" else found
            source = rearranged([use], route)
        assert not isinstance(source, Projected)
        if "outputs" in state.sums:
            state.sums["outputs"] += source.outputs(state.fixed["inputs"])
        else:
            state.sums["inputs"] += source.inputs(state.fixed["outputs"])
        return state

    def combine(self, x: State, y: State, wx: float = 1.0, wy: float = 1.0) -> State:
        for state in (x, y):
            self._flush(state)
        terms = len(x.sums.get("inputs", ()))
        both = super().combine(x, y, wx, wy)
        both.facts = {**x.facts, **y.facts}
        if terms > 1 and not x.fixed:
            x_terms, y_terms = ((state.sums["inputs"], state.sums["outputs"]) for state in (x, y))
            norms = wx**2 * x.sums["norm"] + wy**2 * y.sums["norm"]
            both.sums["norm"] = norms + 2 * wx * wy * inner(x_terms, y_terms)
        if "route" in x.facts and "route" in y.facts:
            both.facts["joined"] = True
            if terms == 1 or len(x.sums["weight"]) > 1:
                both.facts["uncertain"] = True
        if x.fixed or (terms == 1 and self.aggregation != "running"):
            return both  # sums of pieces' factors
        more = wy * y.sums["outputs"], y.sums["inputs"]
        both.sums["outputs"], both.sums["inputs"], _ = truncated(wx * x.sums["outputs"], x.sums["inputs"], terms, more)
        return both

    def next_pass(self, state: State) -> State | None:
        if self.aggregation != "exact":
            state.checked()
            return None
        self._flush(state)
        state.checked()
        sums, fixed = state.sums, state.fixed
        if not fixed:
            alone = float(sums["pieces"]) <= 1 and state.facts.get("route") != "projected"
            if alone and float(sums["change"]) <= self.tolerance:
                return None
            A, B = _split(state)
            first = leading(A, B, state.name)[0] if len(A) > 1 else A[0]
            return self._turn(state, {"inputs": over(first, norm(first))}, state.phase + 1)
        if "outputs" in sums:
            B = over(sums["outputs"], norm(sums["outputs"]))
            return self._turn(state, {"outputs": B, "before": fixed["inputs"]}, state.phase + 1)
        A = over(sums["inputs"], norm(sums["inputs"]))
        change = norm(A - fixed["before"]).max()
        state.facts["change"] = f"{float(change):.0e}"
        if float(change) <= self.tolerance or state.phase >= 2 * self.iterations:
            return None
        return self._turn(state, {"inputs": A}, state.phase + 1)

    def _turn(self, state: State, fixed: dict[str, Tensor], phase: int) -> State:
        (inputs, outputs), like = self.sides(state.blocks[0]), next(iter(fixed.values()))
        sums = {"outputs": like.new_zeros(outputs)} if "inputs" in fixed else {"inputs": like.new_zeros(inputs)}
        return State(state.blocks, state.plan, sums, fixed, phase=phase, facts=state.facts)

    def _alone(self, state: State) -> State | None:
        """What waits, as the one piece that it is where nothing came before: its leading pair is all that is needed."""
        if not state.waiting or self.by_batch or "route" in state.facts or len(state.sums["inputs"]) == 1:
            return None
        fit = replace(self, rank_memory=1)
        single = fit.init(state.blocks, state.plan, state.sums["inputs"])
        single.count, single.rows, single.waiting = state.count, state.rows, list(state.waiting)
        fit._flush(single)
        return single if float(single.sums["pieces"]) == 1 else None

    def finish(self, state: State) -> Kronecker:
        if alone := self._alone(state):
            state.facts["alone"] = alone  # the report's; the samples go on waiting, and with more to come so do terms
            state = alone
        self._flush(state)
        state.checked()
        sums = state.sums
        if state.fixed:
            return balanced(sums["inputs"], state.fixed["outputs"], reciprocal(state.count), state.name)
        A, B, scale = sums["inputs"][0], sums["outputs"][0], reciprocal(state.count)
        if len(sums["inputs"]) > 1 and not (state.facts.get("route") == "projected" and float(sums["pieces"]) == 1):
            A, B = leading(sums["inputs"], sums["outputs"], state.name)  # else one term, semidefinite as it was made
        if len(sums["inputs"]) == 1 and self.aggregation != "running":
            scale = scale * torch.where(sums["weight"] > 0, 1 / sums["weight"], 0)
        return balanced(A, B, scale, state.name)

    def error(self, state: State, operator: Operator) -> float | None:
        """Over several pieces from the terms carried: what these miss is missing, and the error slightly too small."""
        state = state.facts.get("alone", state)
        if state.fixed or "uncertain" in state.facts or not float(state.sums["pieces"]):
            return None
        squared = float(state.sums["norm"])
        found = (float(operator.frobenius_norm()) * float(state.count)) ** 2
        return max(1 - found / squared, 0.0) ** 0.5 if squared > 0 else 0.0

    def notes(self, state: State) -> str:
        state = state.facts.get("alone", state)
        route = state.facts.get("route", "nothing")
        if state.fixed:
            steps, change = state.phase, state.facts["change"]
            return f"by {route}, then {steps} half steps over all data; the last changed A by {change}"
        pieces, change = float(state.sums["pieces"]), float(state.sums["change"])
        if not pieces:
            return "no samples"
        done = "" if change <= self.tolerance or route == "projected" else " (not converged)"
        text = f"{state.sums['steps'] / pieces:.1f} double steps by {route}, the last changed A by {change:.0e}{done}"
        if pieces > 1:
            text += f"; {pieces:.0f} pieces" + (", error from their terms" if "uncertain" not in state.facts else "")
        return text


@dataclass(frozen=True)
class KPSVD(KFOC):
    """The best product by power iteration on the rearranged block (Koroko et al. 2022), under their name for it.

    Their iteration and K-FOC's half steps are the same thing, and so is the answer.

    Example:
        >>> import torch, kronfisher as kf
        >>> data, layer = torch.randn(50, 2), torch.nn.Linear(2, 3)
        >>> fisher = kf.estimate(layer, data, kf.Gaussian(), fit=kf.KPSVD(), labels="exact")
        >>> fisher["weight"].structure
        'kronecker 3x3'
    """


def _look_over(state: State) -> None:
    """Refuse gradients that are not finite, and say so where they are too small to be squared."""
    tiny = torch.finfo(state.waiting[0].gradients.dtype).tiny
    sizes = [torch.linalg.vector_norm(several.gradients) for several in state.waiting if len(several)]
    if all(bool(torch.isfinite(size)) and float(size) ** 2 > 1e9 * tiny for size in sizes):
        return  # the usual case, at a fraction of the time
    ends = [end for several in state.waiting if len(several) for end in several.gradients.aminmax()]
    largest = float(torch.stack(ends).abs().max()) if ends else 0.0
    if not math.isfinite(largest):
        state.checked()
    if 0 < largest**2 < tiny:
        warnings.warn(
            f"{state.name}: its gradients are {largest:.0e} at most, and their squares vanish in "
            f"{state.waiting[0].gradients.dtype}: they count as zero. Scale the loss up, or use float64.",
            NumericalWarning,
            stacklevel=2,
        )


def _split(state: State) -> tuple[Tensor, Tensor]:
    """The terms carried, A ``[R, H, I, I]`` and B ``[R, H, O, O]``, of the sum over samples."""
    A, B, weight = state.sums["inputs"], state.sums["outputs"], state.sums["weight"]
    if len(A) > 1 or not bool((weight > 0).any()):
        return A, B
    return whole(A[0])[None], whole(over(B[0], weight))[None]


register("kfoc", KFOC)
register("kfoc-exact", lambda: KFOC("exact"))
register("kfoc-running", lambda: KFOC("running"))
register("kfoc-approx", lambda: KFOC("approx"))
register("kpsvd", KPSVD)
