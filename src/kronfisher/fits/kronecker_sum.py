"""Sums of Kronecker products: the leading singular triplets of the rearranged block, or a sum of positive terms."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kronfisher.errors import keep_integer
from kronfisher.fisher.blocks import Block
from kronfisher.fits.columns import alike, shares_columns
from kronfisher.fits.fit import Fit
from kronfisher.fits.merging import check_gradients
from kronfisher.fits.plan import Plan
from kronfisher.fits.rearrangement import Terms, times
from kronfisher.fits.registry import register
from kronfisher.fits.running_sum import balance, inner, naming_errors, pieces
from kronfisher.fits.scaling import tell_vanished
from kronfisher.fits.shapes import MAX_DIM, Shapes, check_max_dim, elements, factor_shapes, has_diagonal
from kronfisher.fits.state import reciprocal
from kronfisher.fits.term_search import METHODS, Method, TermSearch, squared_norm, squares
from kronfisher.fits.term_sums import Factors, TermSums
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
    of antisymmetric matrices; these are searched for separately and take their place by size (over all groups
    together).

    Up to 512 samples (examples times draws or columns; where one position and few outputs let columns share their
    example's input: examples) are treated at once and exactly. Over more of them a sum of
    `memory` terms is carried from piece to piece and recompressed.

    Args:
        rank: R.
        method: ``"lanczos"`` (bidiagonalisation with full re-orthogonalisation) and ``"deflation"`` (power iteration
            on what earlier terms leave) find the same terms; ``"gram"`` the whole spectrum of a piece at once, for T =
            1. ``"nonnegative"`` finds terms that are all positive semidefinite, at nearly the optimal error, so that
            every operation of a single product is defined: by multiplicative updates of weights on the samples for
            T = 1, on the best products of clusters of samples otherwise.
        memory: terms that are carried between pieces; None: 2 R + 4. While a piece is treated, Lanczos keeps as many
            factors as it takes steps besides.
        tolerance: of the residuals of the triplets relative to the first singular value, or of an A of norm one.
        iterations: steps at most.
        max_dim: factors beyond this size are kept as their diagonals in every term, as those of lookups in a table are:
            then the sum is the best under that constraint.

    Raises:
        ValueError: an option makes no sense.
        UnsupportedError: while it is fitted, ``"gram"`` met a weight that several positions share, or a factor that is
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
        check_max_dim(self)
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: use 'lanczos', 'deflation', 'gram' or 'nonnegative'.")
        keep_integer(self, "rank", 1)
        keep_integer(self, "iterations", 1)
        if not self.tolerance >= 0:
            raise ValueError(f"{self!r}: the tolerance is at least 0.")
        if self.memory is not None:
            keep_integer(self, "memory", self.rank, f"an integer, as many terms as rank={self.rank} keeps or more")

    @property
    def of_gradients(self) -> bool:
        return True

    @property
    def linear(self) -> bool:
        return False

    @property
    def carried(self) -> int:
        """Terms that are carried between pieces."""
        return 2 * self.rank + 4 if self.memory is None else self.memory

    @property
    def search(self) -> TermSearch:
        """The way to find terms."""
        return TermSearch(self.method, self.rank, self.tolerance, self.iterations)

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        terms = 2 * self.carried + self.rank
        return Plan(terms * element * sum(elements(*shape) for shape in self.sides(group)))

    def sides(self, group: tuple[Block, ...]) -> Shapes:
        """Shapes of A and B: ``[H, D, D]``, or ``[H, D]`` for a diagonal."""
        return factor_shapes(group, self.max_dim)

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> TermSums:
        return TermSums(group, plan, **self._nothing(group, like))

    def _nothing(self, group: tuple[Block, ...], like: Tensor) -> dict[str, Any]:
        """Fields of a state that has seen no samples."""
        inputs, outputs = self.sides(group)
        numbers = {name: like.new_zeros((), dtype=torch.float64) for name in ("norm", "pieces", "steps")}
        stacks = {kind: like.new_zeros(0, *inputs) for kind in ("inputs", "odd_inputs")}
        return numbers | stacks | {kind: like.new_zeros(0, *outputs) for kind in ("outputs", "odd_outputs")}

    def takes_columns(self, block: Block) -> bool:
        return self.search.shares and shares_columns(block.shape) and not has_diagonal(self.sides((block,)))

    def update(self, state: Any, samples: tuple[Samples, ...]) -> TermSums:
        (use,) = samples
        if use.first:
            state.rows = state.rows + use.rows
        shares = use.positions == 1 and self.takes_columns(state.blocks[0])
        if shares and state.waiting and sum(map(len, state.waiting)) + len(use) > PIECE:  # with all of their columns
            self._flush(state)
        state.waiting.append(use)
        state.keep()
        if not shares and sum(map(len, state.waiting)) > PIECE:
            self._flush(state)
        return state

    def combine(self, x: Any, y: Any, wx: float = 1.0, wy: float = 1.0) -> TermSums:
        if wx == wy == 1 and not float(y.pieces):  # y came after x: as if one state had taken in both
            both = replace(x.copy().plus(y), waiting=[*x.waiting, *y.waiting])
            if sum(map(len, both.waiting)) > PIECE:
                self._flush(both)
            return both
        for state in (x, y):
            self._flush(state)
        both = x.plus(y, wx, wy)
        crossed = sum(float(inner(one, other)) for one, other in ((x.even, y.even), (x.odd, y.odd)))
        both.norm = wx**2 * x.norm + wy**2 * y.norm + 2 * wx * wy * crossed
        both.accuracy, both.uncertain = max(x.accuracy, y.accuracy), x.uncertain or y.uncertain
        both.even = self._join(x.even, y.even, wx, wy)
        both.odd = self._join(x.odd, y.odd, wx, wy)
        return both

    def _join(self, x: Factors, y: Factors, wx: float, wy: float) -> Factors:
        """The terms of a weighted sum of two sums, no more than are carried."""
        A, B = (torch.cat(factors) for factors in zip(x, y, strict=True))
        weights = torch.tensor([wx] * len(x[0]) + [wy] * len(y[0]))
        B = B * weights.to(B).view(-1, *[1] * (B.dim() - 1))
        return self.search.shorten(A, B, self.carried)

    def next_pass(self, state: TermSums) -> None:
        self._flush(state, last=True)

    def finish(self, state: TermSums) -> Operator:
        self._flush(state)  # in training this state goes on, and needs all the terms it can carry
        state.check()
        A, B, odd = self._terms(state)
        scale = reciprocal(state.count)
        A, B = A.clone(), B.clone()
        A[0] = Factor.of(A[0]).nearest_semidefinite(state.name).tensor
        B[0] = Factor.of(B[0]).nearest_semidefinite(state.name).tensor
        if len(A) == 1:
            return balance(A[0], B[0], scale, state.name)
        ratio = _balance(A[0], B[0])
        A, B = (torch.stack([times(factor, by) for factor in s]) for s, by in ((A, ratio), (B, scale / ratio)))
        positive = self.method == "nonnegative"
        return KroneckerSumOperator(A, B, state.name, nonnegative=positive, antisymmetric=odd)

    def error(self, state: Any, operator: Operator) -> float | None:
        """Where the norm of the block is affordable; over several pieces from the terms carried, somewhat too small.

        That takes twice the terms that are kept. Positive terms that were shortened are too far from the block to tell.
        """
        squared, number = float(state.norm), float(state.pieces)
        vanished = squared < torch.finfo(state.norm.dtype).tiny and bool(operator.frobenius_norm() > 0)
        if state.uncertain or not number or vanished:
            return None
        if number > 1 and not self._terms_tell_error:
            return None
        held = (float(operator.frobenius_norm()) * float(state.count)) ** 2
        return max(1 - held / squared, 0.0) ** 0.5 if squared > 0 else 0.0

    @property
    def _terms_tell_error(self) -> bool:
        """Whether the terms carried tell the error of several pieces."""
        return self.method != "nonnegative" and self.carried >= 2 * self.rank

    def notes(self, state: TermSums) -> str:
        number = float(state.pieces)
        if not number:
            return "no samples"
        steps = float(state.steps) / number
        worst = state.accuracy
        done = "" if worst <= self.tolerance else " (NOT converged)"
        text = f"{self.method}, {steps:.0f} steps, accuracy {worst:.0e}{done}"
        if number == 1:
            return text
        return f"{text}; {number:.0f} pieces{', error from their terms' if self._terms_tell_error else ''}"

    # Within -----------------------------------------------------------------------------------------------------------

    def _flush(self, state: TermSums, last: bool = False) -> None:
        """Merge what has been waiting; a piece that is the only one needs no more terms than are kept."""
        told = bool(state.waiting) and check_gradients(state.check())
        waiting, state.waiting = alike(state.waiting), []
        alone = last and not float(state.pieces) and sum(map(len, waiting)) <= PIECE
        with naming_errors(state):
            if alone and waiting:
                self._merge_alone(state, waiting)
            else:
                for piece in pieces(waiting, PIECE) if waiting else ():
                    self._merge(state, piece, self.carried)
        if waiting and not told and self._vanished(state):
            tell_vanished(waiting, state.name)

    def _vanished(self, state: Any) -> bool:
        """Whether the matrix of the samples came out as zero."""
        return not bool(state.inputs.any() & state.outputs.any())

    def _merge_alone(self, state: Any, piece: list[Samples]) -> None:
        self._merge(state, piece, self.rank)

    def _merge(self, state: TermSums, piece: list[Samples], terms: int, less: Terms | None = None) -> None:
        shapes, steps, accuracy = self.sides(state.blocks), 0.0, 0.0
        self.search.require(piece, shapes, state.name)
        terms = min(terms, self._most(piece[0].shape))
        norm = squared_norm(piece)
        parted = piece[0].shape[0] > 1 or has_diagonal(shapes)  # what pieces share beyond their terms is in no term
        if norm is None or (len(state.inputs) and parted):
            state.uncertain = True
        else:
            state.norm += norm
        if leading := self.search.leading(piece, shapes, terms, False, less):
            state.even = self._add(state, state.even, leading[:2], terms)
            steps, accuracy = leading[2], max(accuracy, leading[3])
        if leading := self.search.leading(piece, shapes, terms, True, less):
            state.odd = self._add(state, state.odd, leading[:2], terms)
            steps, accuracy = steps + leading[2], max(accuracy, leading[3])
        state.pieces += 1
        state.steps += steps
        state.accuracy = max(accuracy, state.accuracy)

    def _add(self, state: TermSums, before: Factors, new: Factors, terms: int) -> Factors:
        """Terms of a new piece and those before it, with their inner product in the norm."""
        if not len(before[0]):
            return new
        state.norm += 2 * inner(new, before)
        A, B = torch.cat([before[0], new[0]]), torch.cat([before[1], new[1]])
        if self.method != "nonnegative" or len(A) > 2 * terms:  # shortening costs the most there
            return self.search.shorten(A, B, terms)
        return A, B

    def _most(self, shape: tuple[int, ...]) -> int:
        """Terms worth carrying: of a weight with a single row or column there is only one."""
        return 1 if min(shape[1:]) == 1 else self.carried

    def _terms(self, state: Any) -> tuple[Tensor, Tensor, tuple[bool, ...]]:
        """The R largest terms, A and B, and which of them are antisymmetric; the first is symmetric."""
        if not len(state.inputs):  # no samples at all
            A, B = (factor.new_zeros(self.rank, *factor.shape[1:]) for factor in state.even)
            return A, B, (False,) * self.rank
        most = min(self.rank, self._most(state.blocks[0].shape))
        A, B = self.search.shorten(state.inputs, state.outputs, most)
        if self.method == "nonnegative" and len(A) < len(state.inputs):
            A, B, change = self.search.polish(state.even, A, B)
            state.accuracy = max(change, state.accuracy)
        ranked = [(float(squares(A[r], B[r])), False, A[r], B[r]) for r in range(len(A))]
        ranked += [(float(squares(a, b)), True, a, b) for a, b in zip(*state.odd, strict=True)]
        ranked[1:] = sorted(ranked[1:], key=lambda entry: -entry[0])
        ranked = ranked[: self.rank]
        return torch.stack([e[2] for e in ranked]), torch.stack([e[3] for e in ranked]), tuple(e[1] for e in ranked)


def _balance(A: Tensor, B: Tensor) -> Tensor:
    """``√((tr B / O) / (tr A / I))`` of every group, one where either is zero."""
    right, left = (Factor.of(factor).diagonal().mean(-1).clamp_min(0) for factor in (A, B))
    some = (left > 0) & (right > 0)
    return torch.where(some, left, 1).sqrt() / torch.where(some, right, 1).sqrt()  # whose ratio may leave the range


register("kronecker-sum", KroneckerSum, "the best sum of two products", "Kronecker sum")
