"""Sums of Kronecker products: the leading singular triplets of the rearranged block, or a sum of positive terms."""

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
from kronfisher.fits.rearrangement import Terms, times
from kronfisher.fits.running_sum import balanced, inner, named, pieces
from kronfisher.fits.term_search import METHODS, Method, TermSearch, squared_norm, squares
from kronfisher.layers.samples import Samples
from kronfisher.operators import KroneckerSum as KroneckerSumOperator
from kronfisher.operators import Operator
from kronfisher.operators.factors import Factor

__all__ = ["KroneckerSum"]

PIECE = 512  # samples that are treated at once


@dataclass(frozen=True)
class KroneckerSum(Fit):
    """``F ≈ Σ_{r≤R} B_r ⊗ A_r`` (Koroko et al. 2022): the best sum of R products in Frobenius norm.

    The terms are the leading singular triplets of the rearranged block; the squared error is the sum of the other
    squared singular values. Only the first term is positive semidefinite by itself: the sum may be indefinite, and
    then says so when it is inverted (`operators.KroneckerSum`). For shared weights some of the best terms may be pairs
    of antisymmetric matrices; they are found apart and take their place by size (over all groups together).

    Up to 512 samples (data times draws or columns) are treated at once and exactly. Over more of them a sum of `memory`
    terms is carried from piece to piece and recompressed.

    Args:
        rank: R.
        method: ``"lanczos"`` (bidiagonalisation with full re-orthogonalisation) and ``"deflation"`` (power iteration
            on what earlier terms leave) find the same terms; ``"gram"`` the whole spectrum of a piece at once, for T =
            1. ``"nonnegative"`` finds terms that are all positive semidefinite, at nearly the optimal error, so that
            every operation of a single product is defined: by multiplicative updates of weights on the samples for
            T = 1, on the best products of clusters of samples otherwise.
        memory: terms that are carried between pieces; None: 2 R + 4. While a piece is treated, Lanczos keeps as many
            sides as it takes steps besides.
        tolerance: of the residuals of the triplets relative to the first singular value, or of an A of norm one.
        iterations: steps at most.
        max_dim: sides beyond this size are kept as their diagonals in every term, as those of lookups in a table are:
            then the sum is the best under that constraint.

    Raises:
        ValueError: an option makes no sense.
        UnsupportedError: while it is fitted, ``"gram"`` met a weight that several positions share, or a side that is
            kept as a diagonal.

    Example:
        >>> import torch, kronfisher as kf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> data = torch.randn(64, 4)
        >>> for fit in (kf.KFOC(), kf.KroneckerSum(rank=2, method="nonnegative"), kf.KroneckerSum(rank=2)):
        ...     fisher = kf.estimate(model, data, kf.Categorical(), fit=fit, labels="exact")
        >>> fisher["0.weight"].structure
        'sum of 2 kronecker 5x8'
    """

    rank: int = 2
    method: Method = "lanczos"
    memory: int | None = None
    tolerance: float = 1e-4
    iterations: int = 100
    max_dim: int = MAX_DIM

    def __post_init__(self) -> None:
        checked_max_dim(self)
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: use 'lanczos', 'deflation', 'gram' or 'nonnegative'.")
        if self.rank < 1 or self.iterations < 1 or not self.tolerance >= 0:
            raise ValueError(f"{self!r}: rank and iterations are at least 1, tolerance at least 0.")
        if self.memory is not None and self.memory < self.rank:
            raise ValueError(f"{self!r}: memory carries at least as many terms as rank keeps.")

    @property
    def linear(self) -> bool:
        return False

    @property
    def carried(self) -> int:
        """Terms that are carried between pieces."""
        return 2 * self.rank + 4 if self.memory is None else self.memory

    @property
    def search(self) -> TermSearch:
        """How terms are found."""
        return TermSearch(self.method, self.rank, self.tolerance, self.iterations)

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        terms = 2 * self.carried + self.rank
        return Plan(terms * element * sum(elements(*side) for side in self.sides(group)))

    def sides(self, group: tuple[Block, ...]) -> Shapes:
        """Shapes of A and B: ``[H, D, D]``, or ``[H, D]`` for a diagonal."""
        return side_shapes(group, self.max_dim)

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> State:
        sums = {name: like.new_zeros((), dtype=torch.float64) for name in _NUMBERS}
        for kind in ("even", "odd"):
            sums |= _stacks(kind, *(like.new_zeros(0, *side) for side in self.sides(group)))
        return State(group, plan, sums)

    def update(self, state: State, samples: tuple[Samples, ...]) -> State:
        (use,) = samples
        if use.first:
            state.rows = state.rows + use.rows
        state.waiting.append(use.copied())
        if sum(map(len, state.waiting)) > PIECE:
            self._flush(state)
        return state

    def combine(self, x: State, y: State, wx: float = 1.0, wy: float = 1.0) -> State:
        for state in (x, y):
            self._flush(state)
        both = super().combine(_numbers(x), _numbers(y), wx, wy)
        crossed = sum(float(inner(_sides(x, kind), _sides(y, kind))) for kind in _KINDS)
        both.sums["norm"] = wx**2 * x.sums["norm"] + wy**2 * y.sums["norm"] + 2 * wx * wy * crossed
        both.facts = {**x.facts, **y.facts}
        both.facts["accuracy"] = max(state.facts.get("accuracy", 0.0) for state in (x, y))
        for kind in ("even", "odd"):
            A, B = (torch.cat([x.sums[f"{kind}.{side}"], y.sums[f"{kind}.{side}"]]) for side in ("inputs", "outputs"))
            weights = torch.tensor([wx] * len(x.sums[f"{kind}.inputs"]) + [wy] * len(y.sums[f"{kind}.inputs"]))
            B = B * weights.to(B).view(-1, *[1] * (B.dim() - 1))
            both.sums |= _stacks(kind, *self.search.shortened(A, B, self.carried))
        return both

    def next_pass(self, state: State) -> State | None:
        self._flush(state, last=True)
        return None

    def finish(self, state: State) -> Operator:
        self._flush(state)  # in training this state goes on, and needs all the terms it can carry
        state.checked()
        A, B, odd = self._terms(state)
        scale = reciprocal(state.count)
        A, B = A.clone(), B.clone()
        A[0] = Factor.of(A[0]).nearest_semidefinite(state.name).tensor
        B[0] = Factor.of(B[0]).nearest_semidefinite(state.name).tensor
        if len(A) == 1:
            return balanced(A[0], B[0], scale, state.name)
        ratio = _evened(A[0], B[0])
        A, B = (torch.stack([times(side, by) for side in s]) for s, by in ((A, ratio), (B, scale / ratio)))
        positive = self.method == "nonnegative"
        return KroneckerSumOperator(A, B, state.name, nonnegative=positive, antisymmetric=odd)

    def error(self, state: State, operator: Operator) -> float | None:
        """Where the norm of the block is affordable; over several pieces from the terms carried, somewhat too small.

        That takes twice the terms that are kept. Positive terms that were shortened are too far from the block to tell.
        """
        squared, number = float(state.sums["norm"]), float(state.sums["pieces"])
        if "uncertain" in state.facts or not number:
            return None
        if number > 1 and not self._tells:
            return None
        found = (float(operator.frobenius_norm()) * float(state.count)) ** 2
        return max(1 - found / squared, 0.0) ** 0.5 if squared > 0 else 0.0

    @property
    def _tells(self) -> bool:
        """Whether the terms carried tell the error of several pieces."""
        return self.method != "nonnegative" and self.carried >= 2 * self.rank

    def notes(self, state: State) -> str:
        number = float(state.sums["pieces"])
        if not number:
            return "no samples"
        steps = float(state.sums["steps"]) / number
        worst = state.facts["accuracy"]
        done = "" if worst <= self.tolerance else " (NOT converged)"
        text = f"{self.method}, {steps:.0f} steps, accuracy {worst:.0e}{done}"
        if number == 1:
            return text
        return f"{text}; {number:.0f} pieces{', error from their terms' if self._tells else ''}"

    # Within -----------------------------------------------------------------------------------------------------------

    def _flush(self, state: State, last: bool = False) -> None:
        """Merge what has been waiting; a piece that is the only one needs no more terms than are kept."""
        if state.waiting:
            state.checked()
        waiting, state.waiting = state.waiting, []
        alone = last and not float(state.sums["pieces"]) and sum(map(len, waiting)) <= PIECE
        with named(state):
            if alone and waiting:
                self._merge_alone(state, waiting)
            else:
                for piece in pieces(waiting, PIECE) if waiting else ():
                    self._merge(state, piece, self.carried)

    def _merge_alone(self, state: State, piece: list[Samples]) -> None:
        self._merge(state, piece, self.rank)

    def _merge(self, state: State, piece: list[Samples], terms: int, less: Terms | None = None) -> None:
        sides, steps, accuracy = self.sides(state.blocks), 0.0, 0.0
        self.search.require(piece, sides, state.name)
        terms = min(terms, self._most(piece[0].shape))
        norm = squared_norm(piece)
        parted = piece[0].shape[0] > 1 or has_diagonal(sides)  # what pieces share beyond their terms is in no term
        if norm is None or (len(state.sums["even.inputs"]) and parted):
            state.facts["uncertain"] = True
        else:
            state.sums["norm"] += norm
        for kind, odd in (("even", False), ("odd", True)):
            found = self.search.found(piece, sides, terms, odd, less)
            if found is None:
                continue
            A, B, more, change = found
            steps, accuracy = steps + more, max(accuracy, change)
            before = _sides(state, kind)
            if len(before[0]):
                state.sums["norm"] += 2 * inner((A, B), before)
                A, B = torch.cat([before[0], A]), torch.cat([before[1], B])
                if self.method != "nonnegative" or len(A) > 2 * terms:  # shortening costs the most there
                    A, B = self.search.shortened(A, B, terms)
            state.sums |= _stacks(kind, A, B)
        state.sums["pieces"] += 1
        state.sums["steps"] += steps
        state.facts["accuracy"] = max(accuracy, state.facts.get("accuracy", 0.0))

    def _most(self, shape: tuple[int, ...]) -> int:
        """Terms worth carrying: of a weight with a single row or column there is only one."""
        return 1 if min(shape[1:]) == 1 else self.carried

    def _terms(self, state: State) -> tuple[Tensor, Tensor, tuple[bool, ...]]:
        """The R largest terms, A and B, and which of them are antisymmetric; the first is symmetric."""
        if not len(state.sums["even.inputs"]):  # no samples at all
            A, B = (side.new_zeros(self.rank, *side.shape[1:]) for side in _sides(state, "even"))
            return A, B, (False,) * self.rank
        stacks = {kind: _sides(state, kind) for kind in _KINDS}
        A, B = self.search.shortened(*stacks["even"], min(self.rank, self._most(state.blocks[0].shape)))
        if self.method == "nonnegative" and len(A) < len(stacks["even"][0]):
            A, B, change = self.search.polished(stacks["even"], A, B)
            state.facts["accuracy"] = max(change, state.facts["accuracy"])
        ranked = [(float(squares(A[r], B[r])), False, A[r], B[r]) for r in range(len(A))]
        ranked += [(float(squares(a, b)), True, a, b) for a, b in zip(*stacks["odd"], strict=True)]
        ranked[1:] = sorted(ranked[1:], key=lambda entry: -entry[0])
        ranked = ranked[: self.rank]
        return torch.stack([e[2] for e in ranked]), torch.stack([e[3] for e in ranked]), tuple(e[1] for e in ranked)


_NUMBERS = ("norm", "pieces", "steps")
_KINDS = ("even", "odd")


def _stacks(kind: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    return {f"{kind}.inputs": A, f"{kind}.outputs": B}


def _sides(state: State, kind: str) -> tuple[Tensor, Tensor]:
    return state.sums[f"{kind}.inputs"], state.sums[f"{kind}.outputs"]


def _numbers(state: State) -> State:
    """With the sums that simply add up."""
    return replace(state, sums={name: value for name, value in state.sums.items() if name.split(".")[0] not in _KINDS})


def _evened(A: Tensor, B: Tensor) -> Tensor:
    """``√((tr B / O) / (tr A / I))`` of every group, one where either is zero."""
    right, left = (Factor.of(side).diagonal().mean(-1).clamp_min(0) for side in (A, B))
    some = (left > 0) & (right > 0)
    return (torch.where(some, left, 1) / torch.where(some, right, 1)).sqrt()


register("kronecker-sum", KroneckerSum)
