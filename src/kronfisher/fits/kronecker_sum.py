"""Sums of Kronecker products: the leading singular triplets of the rearranged block, or a sum of positive terms."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kronfisher.blocks import Block
from kronfisher.errors import UnsupportedError
from kronfisher.fits.carried import balanced, inner, pieces
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
from kronfisher.operators import KroneckerSum as KroneckerSumOperator
from kronfisher.operators import Operator
from kronfisher.operators.sides import diagonal
from kronfisher.rearrangement import (
    Diagonals,
    Explicit,
    Gram,
    Joint,
    Rearranged,
    Terms,
    cheapest,
    clusters,
    deflated,
    gram_spectrum,
    lanczos,
    nonnegative_weights,
    norm,
    positive_terms,
    rearranged,
    semidefinite,
    squared_products,
    times,
    truncated,
    whole,
)
from kronfisher.samples import Samples

__all__ = ["KFACCorrected", "KroneckerSum"]

Method = Literal["lanczos", "deflation", "gram", "nonnegative"]
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
        if self.method not in ("lanczos", "deflation", "gram", "nonnegative"):
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
            both.sums |= _stacks(kind, *self._shortened(A, B, self.carried))
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
        A[0], B[0] = semidefinite(A[0], state.name), semidefinite(B[0], state.name)
        if len(A) == 1:
            return balanced(A[0], B[0], scale, state.name)
        ratio = _evened(A[0], B[0])
        A, B = (torch.stack([times(side, by) for side in s]) for s, by in ((A, ratio), (B, scale / ratio)))
        positive = self.method == "nonnegative"
        return KroneckerSumOperator(A, B, state.name, nonnegative=positive, antisymmetric=odd)

    def error(self, state: State, operator: Operator) -> float | None:
        """Where the norm of the block is affordable; over several pieces from the terms carried, slightly too small.

        Positive terms that were shortened more than once are too far from the block to tell.
        """
        squared, number = float(state.sums["norm"]), float(state.sums["pieces"])
        if "uncertain" in state.facts or not number or (number > 1 and self.method == "nonnegative"):
            return None
        found = (float(operator.frobenius_norm()) * float(state.count)) ** 2
        return max(1 - found / squared, 0.0) ** 0.5 if squared > 0 else 0.0

    def notes(self, state: State) -> str:
        number = float(state.sums["pieces"])
        if not number:
            return "no samples"
        steps = float(state.sums["steps"]) / number
        worst = state.facts["accuracy"]
        done = "" if worst <= self.tolerance else " (NOT converged)"
        text = f"{self.method}, {steps:.0f} steps, accuracy {worst:.0e}{done}"
        return text if number == 1 else f"{text}; {number:.0f} pieces"

    # Within -----------------------------------------------------------------------------------------------------------

    def _flush(self, state: State, last: bool = False) -> None:
        """Merge what has been waiting; a piece that is the only one needs no more terms than are kept."""
        if state.waiting:
            state.checked()
        waiting, state.waiting = state.waiting, []
        alone = last and not float(state.sums["pieces"]) and sum(map(len, waiting)) <= PIECE
        if alone and waiting:
            self._merge_alone(state, waiting)
        else:
            for piece in pieces(waiting, PIECE) if waiting else ():
                self._merge(state, piece, self.carried)

    def _merge_alone(self, state: State, piece: list[Samples]) -> None:
        self._merge(state, piece, self.rank)

    def _merge(self, state: State, piece: list[Samples], terms: int, less: Terms | None = None) -> None:
        self._require_gram(state, piece)
        terms = min(terms, self._most(piece[0].shape))
        steps, accuracy = 0.0, 0.0
        norm, sides = _squared_norm(piece), self.sides(state.blocks)
        parted = piece[0].shape[0] > 1 or _diagonal(sides)  # what pieces share beyond their terms is in no term
        if norm is None or (len(state.sums["even.inputs"]) and parted):
            state.facts["uncertain"] = True
        else:
            state.sums["norm"] += norm
        for kind, odd in (("even", False), ("odd", True)):
            found = self._found(piece, sides, terms, odd, less)
            if found is None:
                continue
            A, B, more, change = found
            steps, accuracy = steps + more, max(accuracy, change)
            before = _sides(state, kind)
            if len(before[0]):
                state.sums["norm"] += 2 * inner((A, B), before)
                A, B = torch.cat([before[0], A]), torch.cat([before[1], B])
                if self.method != "nonnegative" or len(A) > 2 * terms:  # shortening costs the most there
                    A, B = self._shortened(A, B, terms)
            state.sums |= _stacks(kind, A, B)
        state.sums["pieces"] += 1
        state.sums["steps"] += steps
        state.facts["accuracy"] = max(accuracy, state.facts.get("accuracy", 0.0))

    def _most(self, shape: tuple[int, ...]) -> int:
        """Terms that a block can have at most, where that is one: a weight with a single row or column."""
        return 1 if self.method == "nonnegative" and min(shape[1:]) == 1 else self.carried

    def _require_gram(self, state: State, piece: list[Samples]) -> None:
        positions, diagonal = max(several.positions for several in piece), _diagonal(self.sides(state.blocks))
        if self.method == "gram" and (positions > 1 or diagonal):
            why = f"this one has {positions}" if positions > 1 else "a side of this one is kept as its diagonal"
            raise UnsupportedError(
                f"{state.name}: method='gram' is for weights with one position per sample and sides that are matrices; "
                f"{why}. Use method='lanczos', for this parameter or for all."
            )

    def _found(
        self, piece: list[Samples], sides: Shapes, terms: int, odd: bool, less: Terms | None
    ) -> tuple[Tensor, Tensor, float, float] | None:
        """The leading terms of a piece of one kind, after another sum was taken away; None if there are none."""
        _, outputs, inputs = piece[0].shape
        positions = max(several.positions for several in piece)
        if odd and (positions == 1 or self.method == "nonnegative" or min(outputs, inputs) == 1 or _diagonal(sides)):
            return None
        if self.method == "nonnegative":
            return self._positive(piece, sides, terms, positions)
        if self.method == "gram":
            source = rearranged(piece, "gram")
            assert isinstance(source, Gram)
            found = gram_spectrum(source, terms)
        else:
            find = lanczos if self.method == "lanczos" else deflated
            source = _source(piece, sides)
            source = source if less is None else Joint(source, less)
            found = find(source, terms, odd, self.tolerance, self.iterations)
        A, B = _rooted(found.A, found.B, found.sigma)
        return A, B, float(found.steps), float(found.change)

    def _positive(
        self, piece: list[Samples], sides: Shapes, terms: int, positions: int
    ) -> tuple[Tensor, Tensor, float, float]:
        """Positive terms of a piece: a start from weights, then descent among all positive semidefinite sides."""
        heads, outputs, inputs = piece[0].shape
        if terms == 1:  # the best product is semidefinite by itself
            pair = _source(piece, sides).leading(None, self.tolerance, self.iterations)
            A, B = _rooted(pair.A[None], pair.B[None], pair.sigma[None])
            return A, B, float(pair.steps), float(pair.change)
        if positions == 1 and not _diagonal(sides):
            source = rearranged(piece, "gram")
            assert isinstance(source, Gram)
            W, U, _, steps = nonnegative_weights(source.inputs_gram, source.outputs_gram, terms, self.tolerance)
            a = source.activations.dense()[:, :, 0]
            W, U = W.to(a), U.to(a)
            A = torch.stack([(a * W[..., r, None]).mT @ a for r in range(terms)])
            B = torch.stack([(source.g * U[..., r, None]).mT @ source.g for r in range(terms)])
            if terms > self.rank or heads * (inputs**2 + outputs**2) > _WIDE:
                A, B = _ordered(A, B)
                return A, B, float(steps), 0.0
        else:
            found = [
                _source(cluster, sides).leading(None, self.tolerance, self.iterations)
                for cluster in clusters(piece, 4 * terms)
            ]
            A, B = (torch.stack([getattr(pair, name) for pair in found]) for name in "AB")
            A, B = _rooted(A, B, torch.stack([pair.sigma for pair in found]))
            steps = sum(float(pair.steps) for pair in found)
            A, B = self._shortened(A, B, terms)
        # What is only carried need not be the best of its length: it is going to be shortened.
        most = _SWEEPS if terms == self.rank else _FEW
        A, B, sweeps, change = positive_terms(_source(piece, sides), A, B, self.tolerance, most)
        A, B = _ordered(A, B)
        return A, B, float(steps) + sweeps, change if terms == self.rank else 0.0

    def _shortened(self, A: Tensor, B: Tensor, terms: int) -> tuple[Tensor, Tensor]:
        """The best shorter sum of the same kind for a longer one."""
        if len(A) <= terms:
            return A, B
        if self.method != "nonnegative" or terms == 1:
            B, A, _ = truncated(B, A, terms)
            return A, B
        KA, KB = (torch.einsum("rh...,sh...->hrs", side.double(), side.double()) for side in (A, B))
        W, U, _, _ = nonnegative_weights(KA, KB, terms, self.tolerance)
        A = torch.einsum("hsr,sh...->rh...", W.to(A), A)
        return _ordered(A, torch.einsum("hsr,sh...->rh...", U.to(B), B))

    def _terms(self, state: State) -> tuple[Tensor, Tensor, tuple[bool, ...]]:
        """The R largest terms, A and B, and which of them are antisymmetric; the first is symmetric."""
        if not len(state.sums["even.inputs"]):  # no samples at all
            A, B = (side.new_zeros(self.rank, *side.shape[1:]) for side in _sides(state, "even"))
            return A, B, (False,) * self.rank
        stacks = {kind: _sides(state, kind) for kind in _KINDS}
        A, B = self._shortened(*stacks["even"], min(self.rank, self._most(state.blocks[0].shape)))
        if self.method == "nonnegative" and len(A) < len(stacks["even"][0]):
            A, B, _, change = positive_terms(Terms(*stacks["even"]), A, B, self.tolerance, _SWEEPS)
            A, B = _ordered(A, B)
            state.facts["accuracy"] = max(change, state.facts["accuracy"])
        ranked = [(float(_squares(A[r], B[r])), False, A[r], B[r]) for r in range(len(A))]
        ranked += [(float(_squares(a, b)), True, a, b) for a, b in zip(*stacks["odd"], strict=True)]
        ranked[1:] = sorted(ranked[1:], key=lambda entry: -entry[0])
        ranked = ranked[: self.rank]
        return torch.stack([e[2] for e in ranked]), torch.stack([e[3] for e in ranked]), tuple(e[1] for e in ranked)


_NUMBERS = ("norm", "pieces", "steps")
_SWEEPS, _FEW = 30, 3  # of positive terms that stay, and of ones that are only carried
_PAIRS = 2**28  # multiplications of gradients written out that the norm of a piece may take
_WIDE = 2**18  # numbers in both sides of a term beyond which T = 1 stays with weights on the samples
_KINDS = ("even", "odd")


@dataclass(frozen=True)
class KFACCorrected(KroneckerSum):
    """K-FAC plus the best product for what it misses, ``F − B ⊗ A`` (Koroko et al. 2022, KFAC-corrected).

    Over more than 512 samples the block itself is represented by the `memory` leading terms that are carried.

    Example:
        >>> import torch, kronfisher as kf
        >>> data, layer = torch.randn(50, 2), torch.nn.Linear(2, 3)
        >>> fisher = kf.estimate(layer, data, kf.Gaussian(), fit=kf.KFACCorrected(), labels="exact")
        >>> fisher["weight"].structure
        'sum of 2 kronecker 3x3'
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank != 2 or self.method not in ("lanczos", "deflation"):
            raise ValueError(f"{self!r}: K-FAC and one correction are two terms, by 'lanczos' or 'deflation'.")

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> State:
        state = super().init(group, plan, like)
        inputs, outputs = self.sides(group)
        state.sums |= {"kfac.inputs": like.new_zeros(inputs), "kfac.outputs": like.new_zeros(outputs)}
        return state

    def update(self, state: State, samples: tuple[Samples, ...]) -> State:
        (use,) = samples
        if use.first:
            use.add_input_covariance_(state.sums["kfac.inputs"])
        use.add_output_covariance_(state.sums["kfac.outputs"])
        return super().update(state, samples)

    def _product(self, state: State) -> tuple[Tensor, Tensor]:
        """K-FAC's factors ``[1, H, ...]``, in the scale of the sum over samples."""
        A, B = whole(state.sums["kfac.inputs"]), whole(state.sums["kfac.outputs"])
        return A[None], B[None] * reciprocal(state.rows)

    def _merge_alone(self, state: State, piece: list[Samples]) -> None:
        state.facts["alone"] = "yes"  # all data are here: what is found is the exact correction
        self._merge(state, piece, 1, Terms(*self._product(state), sign=-1.0))

    def _terms(self, state: State) -> tuple[Tensor, Tensor, tuple[bool, ...]]:
        A, B = state.sums["even.inputs"], state.sums["even.outputs"]
        first = self._product(state)
        if "alone" not in state.facts:
            A, B = self._shortened(torch.cat([A, first[0]]), torch.cat([B, -first[1]]), 1)
        odd, other = False, (state.sums["odd.inputs"][:1], state.sums["odd.outputs"][:1])
        if len(other[0]) and _squares(other[0][0], other[1][0]) > _squares(A[0], B[0]):
            A, B, odd = *other, True
        return torch.cat([first[0], A[:1]]), torch.cat([first[1], B[:1]]), (False, odd)

    def error(self, state: State, operator: Operator) -> float | None:
        """Not from these sums: K-FAC and its correction are not orthogonal."""
        return None


def _stacks(kind: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    return {f"{kind}.inputs": A, f"{kind}.outputs": B}


def _sides(state: State, kind: str) -> tuple[Tensor, Tensor]:
    return state.sums[f"{kind}.inputs"], state.sums[f"{kind}.outputs"]


def _numbers(state: State) -> State:
    """With the sums that simply add up."""
    return replace(state, sums={name: value for name, value in state.sums.items() if name.split(".")[0] not in _KINDS})


def _route(piece: list[Samples]) -> str:
    """The cheapest way to take many half steps on matrices that need not be positive."""
    n, positions = sum(map(len, piece)), max(several.positions for several in piece)
    found = cheapest(piece[0].shape, n, positions)
    return "weights" if found == "gram" else found


def _diagonal(sides: Shapes) -> bool:
    return any(len(side) == 2 for side in sides)


def _source(piece: list[Samples], sides: Shapes) -> Rearranged:
    if _diagonal(sides):
        return Diagonals(piece, sides)
    source = rearranged(piece, _route(piece))
    assert isinstance(source, Rearranged)
    return source


def _rooted(A: Tensor, B: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """σ shared between the sides; the trace of A at least zero."""
    terms = [(times(a, s), times(b, s)) for a, b, s in zip(A, B, _signed_roots(A, sigma), strict=True)]
    return torch.stack([a for a, _ in terms]), torch.stack([b for _, b in terms])


def _signed_roots(A: Tensor, sigma: Tensor) -> Tensor:
    """``[R, H]``."""
    trace = torch.stack([diagonal(a).sum(-1) for a in A])
    return sigma.clamp_min(0).sqrt() * torch.where(trace < 0, -1.0, 1.0).to(A)


def _squared_norm(piece: list[Samples]) -> Tensor | None:
    """``‖Σ vec(G_k) vec(G_k)ᵀ‖²``; None where that costs more than the fit."""
    if all(several.positions == 1 for several in piece):
        same, pairs = Gram(piece).squared_products()
    elif sum(map(len, piece)) ** 2 * elements(*piece[0].shape) <= _PAIRS:
        same, pairs = squared_products(Explicit(piece))
    else:
        return None
    return same + pairs


def _squares(A: Tensor, B: Tensor) -> Tensor:
    """``‖B ⊗ A‖²`` over all groups."""
    return (norm(A).double() * norm(B).double()).square().sum()


def _ordered(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Largest term first."""
    order = torch.stack([_squares(a, b) for a, b in zip(A, B, strict=True)]).argsort(descending=True)
    return A[order], B[order]


def _evened(A: Tensor, B: Tensor) -> Tensor:
    """``√((tr B / O) / (tr A / I))`` of every group, one where either is zero."""
    right, left = (diagonal(side).mean(-1).clamp_min(0) for side in (A, B))
    some = (left > 0) & (right > 0)
    return (torch.where(some, left, 1) / torch.where(some, right, 1)).sqrt()


register("kronecker-sum", KroneckerSum)
register("kfac-corrected", KFACCorrected)
