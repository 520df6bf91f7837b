"""K-FOC: the best Kronecker product of every layer in Frobenius norm."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kronfisher.errors import keep_integer
from kronfisher.fisher.blocks import Block
from kronfisher.fits.columns import alike, shares_columns
from kronfisher.fits.fit import Fit
from kronfisher.fits.half_steps import HalfStep, OutputsStep
from kronfisher.fits.merging import BY_BATCH, Aggregation, Merging, check_gradients
from kronfisher.fits.plan import Plan
from kronfisher.fits.products import ProductSums
from kronfisher.fits.rearrangement import ROUTES, SHARING, Diagonals, Rearranged, cheapest, norm, over, rearrange, times
from kronfisher.fits.rearrangement.scales import power_of_two
from kronfisher.fits.registry import register
from kronfisher.fits.running_sum import add_terms, balance, leading, naming_errors, pieces
from kronfisher.fits.scaling import tell_vanished
from kronfisher.fits.shapes import MAX_DIM, Shapes, check_max_dim, elements, factor_shapes, has_diagonal
from kronfisher.fits.state import reciprocal
from kronfisher.fits.written_out import WrittenOut, write_out
from kronfisher.layers.samples import Samples
from kronfisher.linalg import WORKSPACE, unwritten_zeros
from kronfisher.operators import Factor, Kronecker, Operator

__all__ = ["KFOC", "KPSVD"]

_PIECE = 512  # samples that are treated at once
_PIECES = 4  # that may wait: where no more samples come they are one piece, which has no need of other terms
_PIECES_SHARED = 2  # and where positions share the weight
_PROJECTED = 1024  # and of a wide weight with a single term: its sums are made the faster the more rows there are
_ROOM = 2**22  # bytes that may always wait for more
_SHARED, _SHARED_ROOM = 128, 2**21  # the same of a single term where positions share the weight, and are not summed
_SMALL = 2**12  # numbers of a weight of which gradients written out may always wait
_WIDE = 2**20  # numbers in all terms at most, where several are carried
_ROUGH = 0.3  # of A by its directions, in a piece: half steps over everything follow
_SOME = 4  # with room for fewer terms than these, and than are wanted, a single one is carried


@dataclass(frozen=True)
class KFOC(Fit):
    """``F ≈ B ⊗ A`` with the smallest Frobenius error, both semidefinite (Schnaus, Lee & Triebel 2021).

    B ⊗ A is the leading singular pair of ``ℛ(F): M ↦ Σ_k G_k M G_kᵀ``, the exact block with all cross terms of shared
    weights; see `kronfisher.fits.rearrangement`. Up to 512 samples (examples times draws or columns; where one
    position and few outputs let columns share their example's input: examples) are treated at once, to `tolerance`;
    over more of them the aggregation decides. Of wide weights with a single term it is 1,024. Of others it is 2,048, or
    1,024 where positions share the weight, if there are no more of them and what waits takes no more than some
    megabytes (per-example gradients of small convolutions).

    Args:
        aggregation: ``"memory"`` carries a sum of `rank_memory` products from piece to piece and recompresses it:
            close to the optimum over all data in one pass, whatever the batch size. ``"exact"`` then repeats half steps
            over all data until they change nothing: the optimum, in several passes. ``"running"`` (the best product for
            the estimate so far and the new batch) and ``"approx"`` (means of the batches' factors, with A of norm one
            and the scale in B; a smaller batch counts by its size, and one of zeros has no A) are the paper's; both
            depend on the size and order of the batches. Its ``"running"`` merges the estimate with a batch's best
            product, this one with the batch's samples. With ranks of a process group, each merges its own batches and
            then the ranks' products are merged: another iteration, as valid, with another answer.
        rank_memory: products carried by ``"memory"``, at most: as many as take a million numbers; where not even four
            of them do, one is carried, as a mean of the pieces' factors weighted by their singular values. Only then
            does the order of the data matter: sorted ones (by class, say) had better be shuffled.
        tolerance: iterations stop when another double step is expected to change A, scaled to norm one, by no more,
            by how fast the changes shrink (`kronfisher.fits.rearrangement.stopping`). The error is off by half of its
            square. From 1e-4 up, wide weights, and those that many positions share, are iterated through their leading
            16 directions and A settles to about 0.03 only: that leaves about a thousandth of ‖F‖. Groups of one weight
            (of a convolution, attention heads) take as many steps as the slowest of them: others come closer than by
            themselves.
        iterations: double steps at most, in one piece and, for ``"exact"``, over the data.
        warm_start: start from the result so far, where a start is free.
        max_dim: factors beyond this size are kept as their diagonals, as those of lookups in a table are: then B ⊗ A is
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
        check_max_dim(self)
        if self.aggregation not in ("memory", "running", "approx", "exact"):
            raise ValueError(f"aggregation={self.aggregation!r}: use 'memory', 'exact', 'running' or 'approx'.")
        keep_integer(self, "rank_memory", 1)
        keep_integer(self, "iterations", 1)
        if not self.tolerance >= 0:
            raise ValueError(f"{self!r}: the tolerance is at least 0.")
        if self.route is not None and self.route not in ROUTES:
            raise ValueError(f"route={self.route!r}: use one of {', '.join(ROUTES)}, or None for the cheapest.")

    @property
    def of_gradients(self) -> bool:
        return True

    @property
    def linear(self) -> bool:
        return False

    @property
    def by_batch(self) -> bool:
        return self.aggregation in BY_BATCH

    def _terms(self, block: Block) -> int:
        """Products that are carried."""
        shapes = self.sides(block)
        room = _WIDE // sum(elements(*shape) for shape in shapes)
        many = self.aggregation in ("memory", "exact") and not has_diagonal(shapes)
        return min(self.rank_memory, room) if many and room >= min(self.rank_memory, _SOME) else 1

    def sides(self, block: Block) -> Shapes:
        """Shapes of A and B: ``[H, D, D]``, or ``[H, D]`` for a diagonal."""
        return factor_shapes((block,), self.max_dim)

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        numbers, terms = [elements(*shape) for shape in self.sides(group[0])], self._terms(group[0])
        # Terms are merged with new ones, and a leading pair is iterated on a few matrices of the larger factor's size.
        temporary = 4 * terms * sum(numbers) if terms > 1 else 2 * max(numbers)
        passes = 1 if self.aggregation != "exact" else 1 + 2 * self.iterations
        room = max(_ROOM, element * max(numbers))
        if group[0].dim <= _SMALL:
            room = max(room, element * group[0].dim * _PIECES_SHARED * _PIECE)
        bytes = (terms + 1) * element * sum(numbers)
        return Plan(bytes, passes, temporary=temporary * element, waits=_PIECES * _PIECE, waiting=room)

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> ProductSums:
        (inputs, outputs), terms = self.sides(group[0]), self._terms(group[0])
        numbers: dict[str, Any] = {
            name: like.new_zeros((), dtype=torch.float64) for name in ("norm", "pieces", "steps", "change")
        }
        return ProductSums(
            group,
            plan,
            inputs=unwritten_zeros(like, (terms, *inputs)),
            outputs=unwritten_zeros(like, (terms, *outputs)),
            weight=like.new_zeros(inputs[0]),
            **numbers,
        )

    def update(self, state: ProductSums | HalfStep, samples: tuple[Samples, ...]) -> ProductSums | HalfStep:
        (use,) = samples
        if use.first:
            state.rows = state.rows + use.rows
        if not len(use):
            return state
        if isinstance(state, HalfStep):
            state.add_(self._rearrange(use, self.sides(state.blocks[0])))
            return state
        if self.by_batch and use.first:  # draws and columns of one batch come one by one
            self._flush(state)
        shares = use.positions == 1 and self.takes_columns(state.blocks[0])
        if shares and not self.by_batch and self._enough(state):  # with all columns of the last examples
            self._flush(state)
        written = self._write_out(use, state.blocks[0])
        state.waiting.append(written or use)
        if not self.by_batch and (self._too_much(state) or (not shares and self._enough(state))):
            self._flush(state)
        elif written is None:
            state.keep()
        return state

    def _write_out(self, use: Samples, block: Block) -> WrittenOut | None:
        """The samples as their gradients, where these are what half steps are on, and take less memory."""
        if use.positions == 1 or self.by_batch or self.route not in (None, "explicit"):
            return None
        explicit = cheapest(use.shape, len(use), use.positions, tolerance=self.tolerance) == "explicit"
        return write_out(use) if explicit and not has_diagonal(self.sides(block)) else None

    def takes_columns(self, block: Block) -> bool:
        return self.route in (None, *SHARING) and not has_diagonal(self.sides(block)) and shares_columns(block.shape)

    def _enough(self, state: ProductSums) -> bool:
        """Whether what is waiting is worth a piece, or more than one."""
        if len(state.inputs) > 1:
            shared = any(use.positions > 1 for use in state.waiting)
            return sum(map(len, state.waiting)) > (_PIECES_SHARED if shared else _PIECES) * _PIECE
        return sum(map(len, state.waiting)) >= (_SHARED if _share_the_weight(state.waiting) else _PIECE)

    def _too_much(self, state: ProductSums) -> bool:
        """Whether more is waiting than may wait."""
        room = state.plan.waiting
        if _share_the_weight(state.waiting):
            room = min(room, max(_SHARED_ROOM, state.inputs[0].nbytes, state.outputs[0].nbytes))
        return sum(samples.bytes for samples in state.waiting) > room

    def _flush(self, state: ProductSums, most: int = _PIECE) -> None:
        """Merge what has been waiting, at most so many samples at once."""
        if not state.waiting:
            return
        state.single = None
        told = check_gradients(state)  # decompositions tell less of what is wrong
        waiting, state.waiting = alike(state.waiting), []
        merging = Merging(
            aggregation=self.aggregation,
            tolerance=self.tolerance,
            iterations=self.iterations,
            warm_start=self.warm_start,
            route=self.route,
            shapes=self.sides(state.blocks[0]),
        )
        whole = self.by_batch or any(samples.positions > 1 for samples in waiting)
        for piece in [waiting] if whole else pieces(waiting, self._size(state, waiting, most)):
            with naming_errors(state):
                merging.add_(state, piece)
        A, B = (Factor.of(factors[0]).diagonal().any() for factors in (state.inputs, state.outputs))
        if not told and not bool(A & B):
            tell_vanished(waiting, state.name)

    def _size(self, state: ProductSums, waiting: list[Samples], most: int) -> int:
        """Samples that are treated at once where positions do not share the weight: fewer in a small memory budget."""
        (_, outputs, width), element = state.blocks[0].shape, state.inputs.element_size()
        columns = max(use.columns for use in waiting)
        outputs *= columns if columns == 1 else columns + outputs  # and the sum of their products
        wide = cheapest(state.blocks[0].shape, _PIECE, 1, tolerance=self.tolerance) == "projected"
        size = _PROJECTED if wide and len(state.inputs) == 1 and self.route is None else most
        while size > 1 and state.plan.workspace < WORKSPACE:  # Gram matrices, and both factors of the samples
            if element * size * (6 * size + 4 * (outputs + width)) <= state.plan.workspace:
                break
            size //= 2
        return size

    def _rearrange(self, use: Samples, shapes: Shapes) -> Rearranged:
        """ℛ(F) of some samples, for a single half step."""
        if has_diagonal(shapes):
            return Diagonals([use], shapes)
        if self.route in ("weights", "rows", "explicit"):
            return rearrange([use], self.route)
        route = cheapest(use.shape, len(use), use.positions, steps=1)
        return rearrange([use], "weights" if route == "gram" else route)  # a Gram matrix pays only over many half steps

    def combine(self, x: Any, y: Any, wx: float = 1.0, wy: float = 1.0) -> ProductSums | HalfStep:
        if isinstance(x, HalfStep) or isinstance(y, HalfStep):
            return x.plus(y, wx, wy)
        if wx == wy == 1 and not self.by_batch and not y.begun:  # y came after x: as if one state had taken in both
            both = replace(x.copy(), waiting=[*x.waiting, *y.waiting], single=None)
            both.count, both.rows = x.count + y.count, x.rows + y.rows
            if self._enough(both) or self._too_much(both):
                self._flush(both)
            return both
        for state in (x, y):
            self._flush(state)
        terms = max(len(state.inputs) for state in (x, y))
        x, y = x.widen(terms), y.widen(terms)
        both = x.plus(y, wx, wy)
        lost = x.begun and y.begun and (terms == 1 or len(x.weight) > 1)  # what they share beyond their terms
        both.uncertain = x.uncertain or y.uncertain or lost
        both.route, both.directions = y.route or x.route, y.directions or x.directions
        both.norm = wx**2 * x.norm + wy**2 * y.norm
        if terms == 1 and self.aggregation != "running":
            return both  # sums of pieces' factors
        both.inputs, both.outputs, inner = add_terms((x.inputs, wx * x.outputs), (y.inputs, wy * y.outputs), terms)
        both.norm += 2 * inner
        return both

    def next_pass(self, state: ProductSums | HalfStep) -> HalfStep | None:
        if self.aggregation != "exact":
            return None
        shapes = self.sides(state.blocks[0])
        if isinstance(state, HalfStep):
            state.check()
            return state.following(shapes, self.tolerance, last=state.phase >= 2 * self.iterations)
        self._flush(state)
        state.check()
        alone = float(state.pieces) <= 1 and state.route != "projected"
        if alone and float(state.change) <= self.tolerance:
            return None
        A, B = state.terms()
        first = leading(A, B, state.name)[0] if len(A) > 1 else A[0]
        return OutputsStep.around(state, over(first, norm(first)), shapes, state.route)

    def _single(self, state: ProductSums) -> ProductSums | None:
        """The samples that wait, as one piece where nothing came before them: then only its leading pair is needed."""
        if not state.waiting or self.by_batch or state.begun or len(state.inputs) == 1:
            return None
        fit = replace(self, rank_memory=1)
        single = fit.init(state.blocks, state.plan, state.inputs)
        single.count, single.rows, single.waiting = state.count, state.rows, list(state.waiting)
        fit._flush(single, _PIECES * _PIECE)
        return single if float(single.pieces) == 1 else None

    def finish(self, state: ProductSums | HalfStep) -> Kronecker:
        if isinstance(state, HalfStep):
            state.check()
            return balance(state.inputs, state.outputs, reciprocal(state.count), state.name)
        if single := self._single(state):
            state.single = single  # the samples go on waiting: with more to come terms are needed
            state = single
        self._flush(state)
        state.check()
        A, B, scale = state.inputs[0], state.outputs[0], reciprocal(state.count)
        if len(state.inputs) > 1 and not (state.route == "projected" and float(state.pieces) == 1):
            A, B = leading(state.inputs, state.outputs, state.name)  # else one term, semidefinite as it was made
        if len(state.inputs) == 1 and self.aggregation != "running":
            unit = power_of_two(state.weight)  # weights at the end of the range have no inverse
            scale, B = scale * torch.where(state.weight > 0, unit / state.weight, 0), times(B, 1 / unit)
        return balance(A, B, scale, state.name)

    def error(self, state: ProductSums | HalfStep, operator: Operator) -> float | None:
        """Where ‖F‖ is known; over several pieces from the terms carried, and slightly too small by what these miss."""
        if isinstance(state, HalfStep):
            return None
        state = state.single or state
        if state.uncertain or not float(state.pieces):
            return None
        squared = float(state.norm)
        if squared < torch.finfo(state.norm.dtype).tiny and bool(operator.frobenius_norm() > 0):
            return None  # it vanished when it was squared
        held = (float(operator.frobenius_norm()) * float(state.count)) ** 2
        return max(1 - held / squared, 0.0) ** 0.5 if squared > 0 else 0.0

    def notes(self, state: ProductSums | HalfStep) -> str:
        if isinstance(state, HalfStep):
            return state.notes
        state = state.single or state
        pieces, change = float(state.pieces), float(state.change)
        if not pieces:
            return "no samples"
        done = "" if change <= (_ROUGH if state.route == "projected" else self.tolerance) else " (not converged)"
        which = "the last changed" if state.route == "projected" else "another would change"
        text = f"{float(state.steps) / pieces:.1f} double steps by {state.route}, {which} A by {change:.0e}{done}"
        if pieces > 1:
            text += f"; {pieces:.0f} pieces" + ("" if state.uncertain else ", error from their terms")
        return f"{text}; error not measured, fisher.error(data) does that" if state.uncertain else text


def _share_the_weight(waiting: list[Samples]) -> bool:
    """Whether samples have several positions, and wait as inputs and output gradients."""
    return any(use.positions > 1 and not isinstance(use, WrittenOut) for use in waiting)


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


register("kfoc", KFOC, "the best Kronecker product", "K-FOC")
register("kfoc-exact", lambda: KFOC("exact"), "the same, exact over all data", "K-FOC, exact")
register("kfoc-running", lambda: KFOC("running"), "the best product batch by batch", "K-FOC, running")
register("kfoc-approx", lambda: KFOC("approx"), "the mean of batches' best products", "K-FOC, approximate")
register("kpsvd", KPSVD, "the best product by power iteration", "KPSVD")
