"""The cheapest structure of every layer that is close enough to the true block."""

from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kronfisher.errors import MemoryBudgetError
from kronfisher.fisher.blocks import Block
from kronfisher.fits.auto_state import Chosen
from kronfisher.fits.columns import Columns
from kronfisher.fits.diagonal import Diagonal
from kronfisher.fits.ekfac import EKFAC
from kronfisher.fits.fit import Fit
from kronfisher.fits.full import Full
from kronfisher.fits.kfac import KFAC
from kronfisher.fits.kfoc import KFOC
from kronfisher.fits.kronecker_sum import KroneckerSum
from kronfisher.fits.plan import Plan
from kronfisher.fits.quadratic import squared_norm
from kronfisher.fits.registry import register
from kronfisher.fits.scaling import moderate
from kronfisher.fits.shapes import elements, sizes
from kronfisher.fits.state import State
from kronfisher.fits.trial import Trial, join_parts, try_fit
from kronfisher.layers.samples import Samples
from kronfisher.operators import Operator

__all__ = ["Auto"]

_PIECE = 512  # samples on which structures are compared, at most
_SHARED = 4  # where positions share the weight, so many times fewer say as much
_LEAST = 16  # samples, however large their gradients are
_ROOM = 2**29  # bytes that gradients of the samples written out may take
_LARGE = 2**30  # bytes of an estimate beyond which a structure is not tried
_CANDIDATES = (
    Diagonal(),
    KFAC(),
    KFOC(),
    EKFAC(KFOC()),
    KroneckerSum(2, "nonnegative"),
    KroneckerSum(4, "nonnegative"),
    Full(),
)


@dataclass(frozen=True, init=False, repr=False)
class Auto(Fit):
    """For every layer the structure with the fewest bytes that is close enough to its true block.

    The first pass over the data keeps at most 512 samples of every layer (128 where positions share the weight), evenly
    spread over all batches and columns. All candidates are fitted to these, and compared with the true block of these.
    The one that is chosen is then fitted to all data, in further passes over the same batches, and is what it would be
    had it been asked for by name. The report names it and the errors of all that were tried. An error on few samples
    is too good for structures with many numbers; that of the result is ``fisher.error(data)``.

    Args:
        error: relative Frobenius error ``‖F − X‖ / ‖F‖`` to reach. Of the candidates that do, the one of fewest bytes
            is taken, of equals the first; if none does, the one with the smallest error. Left out, it is 0.1 without
            `memory`, and 0 with it: the smallest error for that memory.
        memory: bytes that the operator of one layer may take, for every layer alike; None: any number.
        candidates: fits to choose from, the cheapest to make first. The exact block is tried up to 1024 rows, and
            nothing whose estimate takes more than 1 GiB for a layer.

    Raises:
        ValueError: an option makes no sense.
        MemoryBudgetError: while it is fitted, no candidate was small enough for a layer.

    Example:
        >>> import torch, kronfisher as kf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> data = torch.randn(64, 4)
        >>> fisher = kf.estimate(model, data, kf.Gaussian(), fit=kf.Auto(error=0.3), labels="exact")
        >>> all(error <= 0.3 for error in fisher.error(data).blocks.values())
        True
        >>> fisher.bytes < kf.estimate(model, data, kf.Gaussian(), fit="full").bytes
        True
    """

    # The argument `error` is stored as `goal`: every fit has a method of that name.
    goal: float
    memory: int | None
    candidates: tuple[Fit, ...]

    trains: ClassVar[bool] = False
    _default: ClassVar[float] = 0.1

    def __init__(
        self, error: float | None = None, memory: int | None = None, candidates: Sequence[Fit] = _CANDIDATES
    ) -> None:
        goal = error if error is not None else self._default if memory is None else 0.0
        if not goal >= 0:
            raise ValueError(f"Auto(error={error!r}): a relative error to reach is a number of at least 0.")
        if memory is not None and not memory > 0:
            raise ValueError(f"Auto(memory={memory!r}): bytes for the operator of one layer are a positive number.")
        if not candidates or any(isinstance(fit, Auto) or not isinstance(fit, Fit) for fit in candidates):
            raise ValueError(f"Auto(candidates={candidates!r}): name at least one fit, and none that chooses itself.")
        for name, value in (("goal", goal), ("memory", memory), ("candidates", tuple(candidates))):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        memory = "" if self.memory is None else f", memory={self.memory}"
        own = "" if self.candidates == _CANDIDATES else f", candidates={self.candidates!r}"
        return f"Auto(error={self.goal:g}{memory}{own})"

    @property
    def linear(self) -> bool:
        return False

    @property
    def by_batch(self) -> bool:
        return any(fit.by_batch for fit in self.candidates)

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        plans = [fit.plan(group, element) for fit in self._eligible(group, element)]
        kept = self._most(group, 1, element) * element * sum(sizes(group))
        return Plan(max(plan.bytes for plan in plans) + kept, passes=1 + max(plan.passes for plan in plans))

    def _eligible(self, group: tuple[Block, ...], element: int) -> list[Fit]:
        """Candidates that are worth a trial; one, where all are too large."""
        bytes = {fit: fit.plan(group, element).bytes for fit in self.candidates}
        small = [fit for fit in self.candidates if group[0].dim <= fit.largest_tried]
        fitting = [fit for fit in small if bytes[fit] <= _LARGE]
        return fitting or [min(self.candidates, key=lambda fit: bytes[fit])]

    def _most(self, group: tuple[Block, ...], positions: int, element: int) -> int:
        """The largest number of samples that are kept."""
        most = _PIECE if positions == 1 else _PIECE // _SHARED
        return max(_LEAST, min(most, _ROOM // (element * elements(*sizes(group)))))

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> Chosen:
        return Chosen(group, plan, nothing=like.new_empty(0))

    def takes_columns(self, block: Block) -> bool:
        return any(fit.takes_columns(block) for fit in self.candidates)

    def update(self, state: Chosen, samples: tuple[Samples, ...]) -> Chosen:
        (use,) = samples
        whole = state.inner is not None and self._fit(state).takes_columns(state.blocks[0])
        if isinstance(use, Columns) and not whole:
            for column in use.apart():
                state = self.update(state, (column,))
            return state
        if state.inner is not None:
            state.inner = self._fit(state).update(state.inner, samples)
            state.rows = state.inner.rows
            return state
        if use.first:
            state.rows = state.rows + use.rows
        state.keep(use, self._most(state.blocks, use.positions, use.gradients.element_size()))
        return state

    def _fit(self, state: Chosen) -> Fit:
        """The fit that was chosen."""
        assert state.choice is not None
        return self.candidates[state.choice]

    def combine(self, x: Chosen, y: Chosen, wx: float = 1.0, wy: float = 1.0) -> Chosen:
        """States of parts of the data: samples that are kept of each, or sums once the same fit was chosen for both.

        Raises:
            ValueError: it was not; samples kept have no weights.
        """
        if x.choice is None and y.choice is None and wx == wy == 1:
            both = x.joined(y)
            if both.waiting:
                use = both.waiting[0]
                both.thin(self._most(both.blocks, use.positions, use.gradients.element_size()))
            return both
        if x.choice is None or x.choice != y.choice:
            raise ValueError(
                f"{x.name}: states of {self!r} combine only after the same fit was chosen for both. Choose once, by an "
                "estimate, and use the fit that its report names."
            )
        inner = self._fit(x).combine(x.chosen, y.chosen, wx, wy)
        return replace(x, inner=inner, count=inner.count, rows=inner.rows)

    def next_pass(self, state: Chosen) -> Chosen | None:
        choice, trials, kept = state.choice, state.trials, state.kept
        if choice is None:
            kept = sum(map(len, state.waiting))
            choice, trials = self._choose(state)
            inner = self._begin(state, self.candidates[choice])
        else:
            inner = self.candidates[choice].next_pass(state.chosen)
            if inner is None:
                return None
        after = Chosen(state.blocks, replace(inner.plan, passes=1 + inner.plan.passes), nothing=state.nothing)
        after.phase, after.inner = state.phase + 1, inner
        after.choice, after.trials, after.kept = choice, trials, kept
        return after

    def _begin(self, state: Chosen, fit: Fit) -> State:
        """An empty state of a candidate."""
        plan = replace(fit.plan(state.blocks, state.nothing.element_size()), workspace=state.plan.workspace)
        return fit.init(state.blocks, plan, state.nothing)

    def _choose(self, state: Chosen) -> tuple[int, tuple[Trial, ...]]:
        """The place of the candidate to take, and the trials of all."""
        element = state.nothing.element_size()
        eligible = self._eligible(state.blocks, element)
        if not state.waiting:  # nothing ever came: all are zero
            return self.candidates.index(eligible[0]), ()
        state.waiting = join_parts(state.waiting)
        squared = squared_norm(state.waiting)
        limits = torch.finfo(squared.dtype)
        if not limits.tiny < float(squared) < limits.max:  # errors are relative: any scale will do
            state.waiting = moderate(state.waiting)
            squared = squared_norm(state.waiting)
        count = state.count * (sum(map(len, state.waiting)) / state.seen)
        trials = tuple(
            try_fit(fit, self.candidates.index(fit), self._begin(state, fit), state.waiting, count, squared)
            for fit in eligible
        )
        small = [trial for trial in trials if self.memory is None or trial.bytes <= self.memory]
        if not small:
            least = min(trial.bytes for trial in trials)
            raise MemoryBudgetError(
                f"{state.name}: no candidate of {self!r} takes less than {least:,} bytes for this layer. Allow so much "
                "memory, or leave the layer to another fit, by a mapping from names to fits."
            )
        # Errors are roots of differences of squares: what is below this is rounding.
        goal = max(self.goal, 2 * torch.finfo(state.nothing.dtype).eps ** 0.5)
        return min(small, key=lambda trial: (max(trial.error, goal), trial.bytes)).candidate, trials

    def finish(self, state: Chosen) -> Operator:
        return self._fit(state).finish(state.chosen)

    def error(self, state: Chosen, operator: Operator) -> float | None:
        return self._fit(state).error(state.chosen, operator)

    def notes(self, state: Chosen) -> str:
        tried = ", ".join(
            f"{_describe(self.candidates[trial.candidate])} {trial.error:.2g} ({trial.bytes:,} bytes)"
            for trial in state.trials
        )
        error = next((trial.error for trial in state.trials if trial.candidate == state.choice), 0.0)
        missed = "" if error <= self.goal or not self.goal else f", none reaches {self.goal:g}"
        fit = self._fit(state)
        own = fit.notes(state.chosen)
        chosen = f"chose {_describe(fit)}{missed}; errors on {state.kept} samples: {tried}"
        return f"{chosen}; {own}" if own else chosen


def _describe(fit: Fit) -> str:
    """The call that makes it, without arguments left at their defaults."""
    own = [entry for entry in fields(fit) if entry.repr and getattr(fit, entry.name) != _default(entry)]
    values = ((entry.name, getattr(fit, entry.name)) for entry in own)
    text = ", ".join(f"{name}={_describe(value) if isinstance(value, Fit) else repr(value)}" for name, value in values)
    return f"{type(fit).__name__}({text})"


def _default(entry: Field[Any]) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


register("auto", Auto, "the smallest structure within .1, layer by layer", "chosen by layer")
