"""The cheapest structure of every layer that is close enough to the true block."""

from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields, replace
from math import prod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from kronfisher.errors import MemoryBudgetError
from kronfisher.fisher.blocks import Block
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
from kronfisher.fits.shapes import elements, sizes
from kronfisher.fits.state import State, WaitingState, reciprocal
from kronfisher.layers.activations import Dense
from kronfisher.layers.samples import Samples
from kronfisher.operators import Operator

__all__ = ["Auto"]

_PIECE = 512  # samples on which structures are compared, at most
_SHARED = 4  # where positions share the weight, so many times fewer say as much
_LEAST = 16  # samples, however large their gradients are
_ROOM = 2**29  # bytes that gradients of the samples written out may take
_LARGE = 2**30  # bytes of an estimate beyond which a structure is not tried
_GOLDEN = 0.6180339887498949
_CANDIDATES = (
    Diagonal(),
    KFAC(),
    KFOC(),
    EKFAC(KFOC()),
    KroneckerSum(2, "nonnegative"),
    KroneckerSum(4, "nonnegative"),
    Full(),
)


@dataclass(frozen=True)
class Trial:
    """One candidate on the samples kept.

    Attributes:
        candidate: its place in `Auto.candidates`.
        error: relative, against the true block of these samples.
        bytes: of its operator.
    """

    candidate: int
    error: float
    bytes: int


@dataclass(kw_only=True)
class Chosen(WaitingState):
    """Samples kept while there is no choice yet, then the state of the fit that was chosen.

    Attributes:
        nothing: a tensor without elements, of the dtype and device of the sums.
        inner: the state of the fit that was chosen.
        choice: its place in `Auto.candidates`.
        trials: of all candidates that were tried, in their order.
        kept: how many samples they were tried on.
        uses: how many backward passes brought samples.
        seen: how many samples there were.
        stride: of how many samples one is kept.
    """

    nothing: Tensor
    inner: State | None = None
    choice: int | None = None
    trials: tuple[Trial, ...] = ()
    kept: int = 0
    uses: int = 0
    seen: int = 0
    stride: int = 1

    @property
    def sums(self) -> dict[str, Tensor]:
        """Those of the fit that was chosen."""
        return {} if self.inner is None else self.inner.sums

    def check(self) -> Self:
        """Itself, if every sum of the fit that was chosen is finite; NumericalError otherwise."""
        if self.inner is not None:
            self.inner.check()
        return self

    def release(self) -> None:
        """Let go of the samples and of the sums of the fit that was chosen."""
        super().release()
        if self.inner is not None:
            self.inner.release()


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
        found = [fit for fit in small if bytes[fit] <= _LARGE]
        return found or [min(self.candidates, key=lambda fit: bytes[fit])]

    def _most(self, group: tuple[Block, ...], positions: int, element: int) -> int:
        """How many samples are kept."""
        most = _PIECE if positions == 1 else _PIECE // _SHARED
        return max(_LEAST, min(most, _ROOM // (element * elements(*sizes(group)))))

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> Chosen:
        return Chosen(group, plan, nothing=like.new_empty(0))

    def update(self, state: Chosen, samples: tuple[Samples, ...]) -> Chosen:
        (use,) = samples
        if state.inner is not None:
            state.inner = self._fit(state).update(state.inner, samples)
            state.rows = state.inner.rows
            return state
        if use.first:
            state.rows = state.rows + use.rows
        state.uses += 1
        state.seen += len(use)
        begin = int(state.uses * _GOLDEN % 1 * state.stride)  # no period of the batches meets that of the stride
        if begin < len(use):
            part = (
                use
                if state.stride == 1
                else use.select(torch.arange(begin, len(use), state.stride, device=use.gradients.device))
            )
            state.waiting.append(replace(part, first=True).copy())
        most = self._most(state.blocks, use.positions, use.gradients.element_size())
        while sum(map(len, state.waiting)) > most:
            state.stride *= 2
            state.waiting = [each for k, part in enumerate(state.waiting) for each in _halved(part, k)]
        return state

    def _fit(self, state: Chosen) -> Fit:
        """The fit that was chosen."""
        assert state.choice is not None
        return self.candidates[state.choice]

    def combine(self, x: Chosen, y: Chosen, wx: float = 1.0, wy: float = 1.0) -> Chosen:
        """States of parts of the data, once the same fit was chosen for both.

        Raises:
            ValueError: it was not.
        """
        if x.choice is None or x.choice != y.choice:
            raise ValueError(
                f"{x.name}: states of {self!r} combine only after the same fit was chosen for both. Choose once, by an "
                "estimate, and use the fit that its report names."
            )
        inner = self._fit(x).combine(_inner(x), _inner(y), wx, wy)
        return replace(x, inner=inner, count=inner.count, rows=inner.rows)

    def next_pass(self, state: Chosen) -> Chosen | None:
        choice, trials, kept = state.choice, state.trials, state.kept
        if choice is None:
            kept = sum(map(len, state.waiting))
            choice, trials = self._choice(state)
            inner = self._begin(state, self.candidates[choice])
        else:
            inner = self.candidates[choice].next_pass(_inner(state))
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

    def _choice(self, state: Chosen) -> tuple[int, tuple[Trial, ...]]:
        element = state.nothing.element_size()
        eligible = self._eligible(state.blocks, element)
        if not state.waiting:  # nothing ever came: all are zero
            return self.candidates.index(eligible[0]), ()
        state.waiting = _joined(state.waiting)
        squared = squared_norm(state.waiting)
        trials = tuple(self._tried(fit, state, squared) for fit in eligible)
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

    def _tried(self, fit: Fit, state: Chosen, squared: Tensor) -> Trial:
        """A candidate on the samples kept, in the scale of the whole."""
        share = sum(map(len, state.waiting)) / state.seen
        trial: State | None = self._begin(state, fit)
        last = trial
        while trial is not None:
            for samples in state.waiting:
                trial = fit.update(trial, (samples,))
            trial.count = state.count * share
            last, trial = trial, fit.next_pass(trial)
        operator = fit.finish(last)
        scale = reciprocal(last.count)
        cross = sum(operator.quadratic(samples) for samples in state.waiting) * scale
        whole = squared * scale**2
        missed = whole - 2 * cross + operator.frobenius_norm().double() ** 2
        error = float(missed.clamp_min(0).sqrt() / whole.sqrt()) if float(whole) > 0 else 0.0
        return Trial(self.candidates.index(fit), error, operator.bytes)

    def finish(self, state: Chosen) -> Operator:
        return self._fit(state).finish(_inner(state))

    def error(self, state: Chosen, operator: Operator) -> float | None:
        return self._fit(state).error(_inner(state), operator)

    def notes(self, state: Chosen) -> str:
        tried = ", ".join(
            f"{_short(self.candidates[trial.candidate])} {trial.error:.2g} ({trial.bytes:,} bytes)"
            for trial in state.trials
        )
        error = next((trial.error for trial in state.trials if trial.candidate == state.choice), 0.0)
        missed = "" if error <= self.goal or not self.goal else f", none reaches {self.goal:g}"
        fit = self._fit(state)
        own = fit.notes(_inner(state))
        chosen = f"chose {_short(fit)}{missed}; errors on {state.kept} samples: {tried}"
        return f"{chosen}; {own}" if own else chosen


def _joined(samples: list[Samples]) -> list[Samples]:
    """All in one, inputs written out, where that takes little room: every candidate goes through them many times."""
    size = sum(prod(each.activations.shape) for each in samples) * samples[0].gradients.element_size()
    alike = len({(each.positions, each.mask is None) for each in samples}) == 1
    if not alike or size > samples[0].workspace or any(each.activations.onehot for each in samples):
        return samples
    activations = Dense(torch.cat([each.activations.dense() for each in samples], dim=1))
    mask = None if samples[0].mask is None else torch.cat([each.mask for each in samples if each.mask is not None])
    gradients = torch.cat([each.gradients for each in samples], dim=1)
    return [replace(samples[0], activations=activations, gradients=gradients, mask=mask)]


def _short(fit: Fit) -> str:
    """As one would write it: without what is left at its default."""
    own = [entry for entry in fields(fit) if entry.repr and getattr(fit, entry.name) != _usual(entry)]
    values = ((entry.name, getattr(fit, entry.name)) for entry in own)
    text = ", ".join(f"{name}={_short(value) if isinstance(value, Fit) else repr(value)}" for name, value in values)
    return f"{type(fit).__name__}({text})"


def _usual(entry: Field[Any]) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def _inner(state: Chosen) -> State:
    """The state of the fit that was chosen, which knows the number of data that the other was told."""
    assert state.inner is not None
    state.inner.count = state.count
    return state.inner


def _halved(samples: Samples, number: int) -> list[Samples]:
    """Every second sample."""
    begin = int(number * _GOLDEN % 1 * 2)
    return (
        [samples.select(torch.arange(begin, len(samples), 2, device=samples.gradients.device))]
        if begin < len(samples)
        else []
    )


register("auto", Auto, "the smallest structure within .1, layer by layer", "chosen by layer")
