"""K-FOC: the best Kronecker product of every layer in Frobenius norm."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kronfisher.fisher.blocks import Block
from kronfisher.fits.fit import (
    MAX_DIM,
    Fit,
    Plan,
    Shapes,
    State,
    checked_max_dim,
    elements,
    has_diagonal,
    reciprocal,
    register,
    side_shapes,
)
from kronfisher.fits.merging import BY_BATCH, Aggregation, Merging, look_over, split, widened
from kronfisher.fits.rearrangement import ROUTES, Diagonals, Projected, cheapest, norm, over, rearranged
from kronfisher.fits.running_sum import added, balanced, leading, named, pieces
from kronfisher.layers.samples import Samples
from kronfisher.linalg import WORKSPACE
from kronfisher.operators import Kronecker, Operator

__all__ = ["KFOC", "KPSVD"]

_PIECE = 512  # samples that are treated at once
_ROOM = 2**21  # bytes that may always wait for more
_WIDE = 2**20  # numbers in all terms at most, where several are carried
_ROUGH = 0.3  # of A by its directions, in a piece: half steps over everything follow
_SOME = 4  # where not even so many fit, of those wanted, one is carried


@dataclass(frozen=True)
class KFOC(Fit):
    """``F ≈ B ⊗ A`` with the smallest Frobenius error, both sides positive semidefinite (Schnaus, Lee & Triebel 2021).

    B ⊗ A is the leading singular pair of ``ℛ(F): M ↦ Σ_k G_k M G_kᵀ``, the exact block with all cross terms of shared
    weights; see `kronfisher.fits.rearrangement`. Up to 512 samples (data times draws or columns) are treated at once,
    to `tolerance`; over more of them the aggregation decides.

    Args:
        aggregation: ``"memory"`` carries a sum of `rank_memory` products from piece to piece and recompresses it:
            close to the optimum over all data in one pass, whatever the batch size. ``"exact"`` then repeats half steps
            over all data until they change nothing: the optimum, in several passes. ``"running"`` (the best product for
            the estimate so far and the new batch) and ``"approx"`` (the mean of the batches' factors) are the paper's;
            both depend on the size and order of the batches.
        rank_memory: products carried by ``"memory"``, at most: as many as take a million numbers; where not even four
            of them do, one is carried, as a mean of the pieces' factors weighted by their singular values. Only then
            does the order of the data matter: sorted ones (by class, say) had better be shuffled.
        tolerance: iterations stop when A, scaled to norm one, changes by no more. The error is off by half of its
            square. From 1e-4 up, wide weights, and those that many positions share, are iterated through their leading
            16 directions and A settles to about 0.03 only: that leaves about a thousandth of ‖F‖.
        iterations: double steps at most, in one piece and, for ``"exact"``, over the data.
        warm_start: start from what was found so far, where a start is free.
        max_dim: sides beyond this size are kept as their diagonals, as those of lookups in a table are: then B ⊗ A is
            the best product under that constraint.
        route: how half steps are taken (`kronfisher.fits.rearrangement.routes`); None: by static cost.

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
        return self.aggregation in BY_BATCH

    def _terms(self, block: Block) -> int:
        """Products that are carried."""
        sides = self.sides(block)
        room = _WIDE // sum(elements(*side) for side in sides)
        several = self.aggregation in ("memory", "exact") and not has_diagonal(sides)
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
            look_over(state)  # decompositions wait for the device anyway, and tell less of what is wrong
        waiting, state.waiting = state.waiting, []
        merging = Merging(
            aggregation=self.aggregation,
            tolerance=self.tolerance,
            iterations=self.iterations,
            warm_start=self.warm_start,
            route=self.route,
            sides=self.sides(state.blocks[0]),
        )
        whole = self.by_batch or any(samples.positions > 1 for samples in waiting)
        for piece in [waiting] if whole else pieces(waiting, self._size(state)):
            with named(state):
                merging.add_(state, piece)

    def _size(self, state: State) -> int:
        """Samples that are treated at once where positions do not share the weight: fewer in a small memory budget."""
        (_, outputs, width), element = state.blocks[0].shape, state.sums["inputs"].element_size()
        size = _PIECE
        while size > 1 and state.plan.workspace < WORKSPACE:  # Gram matrices, and both sides of the samples
            if element * size * (6 * size + 4 * (outputs + width)) <= state.plan.workspace:
                break
            size //= 2
        return size

    def _half_step(self, state: State, use: Samples) -> State:
        """Of the passes that polish: one side is fixed, the other is summed."""
        route, sides = (
            self.route if self.route in ("weights", "rows", "explicit") else None,
            self.sides(state.blocks[0]),
        )
        if has_diagonal(sides):
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
        terms = max(len(state.sums.get("inputs", ())) for state in (x, y))
        if not x.fixed:
            x, y = widened(x, terms), widened(y, terms)
        both = super().combine(x, y, wx, wy)
        both.facts = {**x.facts, **y.facts}
        if "route" in x.facts and "route" in y.facts:
            both.facts["joined"] = True
            if terms == 1 or len(x.sums["weight"]) > 1:
                both.facts["uncertain"] = True
        if x.fixed:
            return both
        both.sums["norm"] = wx**2 * x.sums["norm"] + wy**2 * y.sums["norm"]
        if terms == 1 and self.aggregation != "running":
            return both  # sums of pieces' factors
        x_terms, y_terms = (
            (state.sums["inputs"], weight * state.sums["outputs"]) for state, weight in ((x, wx), (y, wy))
        )
        both.sums["inputs"], both.sums["outputs"], inner = added(x_terms, y_terms, terms)
        both.sums["norm"] += 2 * inner
        return both

    def next_pass(self, state: State) -> State | None:
        if self.aggregation != "exact":
            return None
        self._flush(state)
        state.checked()
        sums, fixed = state.sums, state.fixed
        if not fixed:
            alone = float(sums["pieces"]) <= 1 and state.facts.get("route") != "projected"
            if alone and float(sums["change"]) <= self.tolerance:
                return None
            A, B = split(state)
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
        done = "" if change <= (_ROUGH if route == "projected" else self.tolerance) else " (not converged)"
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


register("kfoc", KFOC)
register("kfoc-exact", lambda: KFOC("exact"))
register("kfoc-running", lambda: KFOC("running"))
register("kfoc-approx", lambda: KFOC("approx"))
register("kpsvd", KPSVD)
