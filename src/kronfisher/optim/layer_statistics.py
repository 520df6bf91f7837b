"""The moving average of the curvature of one layer."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from kronfisher.errors import NumericalError, require, together
from kronfisher.estimation.groups import Group
from kronfisher.fisher.blocks import Block
from kronfisher.fits.state import FactorSums, WaitingState
from kronfisher.linalg import mirror_
from kronfisher.operators import Operator
from kronfisher.optim.intervals import Refresh
from kronfisher.optim.moving_average import AverageState, MovingAverage

__all__ = ["LayerStatistics", "periods"]


@dataclass(eq=False)
class LayerStatistics:
    """Statistics of one group of blocks that a fit treats together.

    Attributes:
        group: its fit, blocks, and the statistics of the batch in hand.
        average: the moving average of the statistics.
        basis_due: the step at which a fit of two passes renews its basis.
        basis_renewed: the step at which it last did.
        reads_data: whether the inputs of all its uses are data that depend on no parameter.
        makes_outputs: whether the model's outputs depend on it directly, with no other layer in between.
        before: the average and `basis_renewed` from before a step's statistics, while these may yet be left out.
    """

    group: Group
    average: AverageState | None = None
    basis_due: int = 0
    basis_renewed: int = -1
    before: tuple[AverageState | None, int] | None = None
    reads_data: bool = False
    makes_outputs: bool = False
    _completed: tuple[ref[Tensor] | None, int] = field(default=(None, 0), init=False, repr=False)
    _has_room: bool = field(default=True, init=False, repr=False)  # for the statistics of a batch

    @property
    def fit(self) -> MovingAverage:
        fit = self.group.fit
        assert isinstance(fit, MovingAverage)
        return fit

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.group.blocks

    @property
    def name(self) -> str:
        return ", ".join(block.name for block in self.blocks)

    @property
    def dim(self) -> int:
        return sum(block.dim for block in self.blocks)

    @property
    def input_sums(self) -> Tensor | None:
        """``Σ a aᵀ [H, I, I]`` of fits that keep it as a matrix, both triangles; None of others."""
        first = None if self.average is None else self.average.states[0]
        if not (isinstance(first, FactorSums) and first.inputs.dim() == 3):
            return None
        sums = first.inputs  # whose lower triangle means nothing, so that it may hold the upper one
        known, version = self._completed
        if known is None or known() is not sums or version != sums._version:
            mirror_(sums)
            self._completed = ref(sums), sums._version
        return sums

    @property
    def passes(self) -> int:
        """How many passes over the data the fit makes in an estimate."""
        return self.group.state.plan.passes

    def renews_basis(self, step: int) -> bool:
        """Whether the second pass of the fit begins anew with this step's batch."""
        return self.passes > 1 and self.basis_due <= step and self.basis_renewed != step

    @property
    def waits(self) -> bool:
        """Whether samples wait to be summed, so that finite ones may still give sums that are not."""
        assert isinstance(self.group.state, AverageState)
        return any(isinstance(state, WaitingState) and bool(state.waiting) for state in self.group.state.states)

    @property
    def counts(self) -> Tensor | bool:
        """Whether any example of the batch counts."""
        return self.group.state.count > 0

    def merge(self, keep: float, step: int | None = None) -> None:
        """Take the batch's statistics, of which some count, into the average, of which the share `keep` stays.

        Args:
            keep: the share; all stays of an average that took in a batch of this step when its basis was renewed.
            step: its number.

        Raises:
            NumericalError: products of samples are not finite; `discard` goes back to the average of before.
        """
        state, keep = self.group.state, 1.0 if self.basis_renewed == step else keep
        assert isinstance(state, AverageState)
        waits = self.waits
        if waits:
            self._remember()
        _count(state)
        if self.average is not None:
            average = _copy(self.average) if waits else self.average  # summing what waits changes a state in place
            self.average = self.fit.combine(average, state, keep, 1.0)
            if waits:
                self.average.check()
        else:
            if waits:  # they go on waiting, so that whether they can be summed is tried on a copy
                self.fit.combine(self.fit.fresh(state), _copy(state), 0.0, 1.0).check()  # with weights nothing waits
            self.average = state
        self.empty()

    def renew_basis(self, keep: float) -> bool:
        """Begin the second pass of the fit anew, from the average of the first.

        Returns:
            False if the batch is not finite, or nothing in it counts.

        Raises:
            NumericalError: as in `merge`.
        """
        try:
            with together():
                self.group.state.check()
                require(torch.as_tensor(self.counts), lambda: NumericalError(f"{self.name}: nothing counts"))
        except NumericalError:
            return False
        before = self.average.states[1:] if self.average is not None else []
        self._remember()
        self.merge(keep)
        assert self.average is not None
        # The eigenvalues are to see this batch in their new basis: continue from the average without it.
        self.average = replace(self.average, states=[self.average.states[0], *(state.times(keep) for state in before)])
        self.average = self.fit.renew_basis(self.average)
        assert self.average is not None
        self.begin()
        return True

    def _remember(self) -> None:
        """Keep what `discard` goes back to."""
        if self.before is None:
            self.before = self.average, self.basis_renewed

    def merge_second_pass(self, step: int) -> None:
        """Take the batch's statistics into the renewed second pass alone: the first already includes them."""
        state, average = self.group.state, self.average
        assert isinstance(state, AverageState) and average is not None
        _count(state)
        *before, last = average.states
        average.states = [*before, self.fit.fit.combine(last, state.states[-1])]
        self.empty()
        self.basis_renewed = step

    def begin(self) -> None:
        """Make room for a batch's statistics, in the bases of the average."""
        state = self.average or self.group.state
        assert isinstance(state, AverageState)
        if self.average is None:  # a basis that a batch gave which was discarded is forgotten, too
            state = replace(state, states=state.states[:1])
        self.group.state = self.fit.fresh(state)
        self._has_room = True

    def make_room(self) -> None:
        """Begin again, where a pass of this step renewed the basis and its statistics were merged already."""
        if not self._has_room:
            self.begin()

    def announce(self, examples: int) -> None:
        """Say how many examples are going to be read, so that part of many rows is enough; 0: all rows are wanted."""
        assert isinstance(self.group.state, AverageState)
        self.group.state.examples = examples

    def empty(self) -> None:
        """Forget the batch's statistics, with the memory that they took: `begin` makes room for the next."""
        state = self.average or self.group.state
        assert isinstance(state, AverageState)
        self.group.state = self.fit.without_sums(state)
        self._has_room = False

    def discard(self) -> None:
        """Forget the batch's statistics, those that this step's average has taken in among them."""
        if self.before is not None:
            self.average, self.basis_renewed = self.before
            self.before = None
        self.empty()

    def operator(self) -> Operator:
        """The curvature as the average has it.

        Raises:
            NumericalError: the average is not finite.
        """
        assert self.average is not None
        return self.fit.finish(self.average)

    def state_dict(self) -> dict[str, Any]:
        """Everything as tensors, numbers and strings."""
        return {
            "blocks": [asdict(block) for block in self.blocks],
            "average": None if self.average is None else self.average.to_dict(),
            "basis_due": self.basis_due,
            "basis_renewed": self.basis_renewed,
            "reads_data": self.reads_data,
            "makes_outputs": self.makes_outputs,
        }

    def load_state_dict(self, state: Mapping[str, Any], device: Any) -> None:
        """Take over what `state_dict` gave."""
        if saved := state["average"]:
            self.average = AverageState.from_dict(saved, self.blocks, device)
        self.empty()
        self.basis_due, self.basis_renewed = state["basis_due"], state["basis_renewed"]
        self.reads_data, self.makes_outputs = (state.get(name, False) for name in ("reads_data", "makes_outputs"))


def periods(refresh: Refresh, layers: Iterable[LayerStatistics]) -> Refresh:
    """Periods for the fits in use: shorter at the start if any has a basis that goes stale."""
    return refresh.careful() if any(layer.passes > 1 for layer in layers) else refresh


def _copy(average: AverageState) -> AverageState:
    return replace(average, states=[state.copy() for state in average.states])


def _count(state: AverageState) -> None:
    for one in state.states:
        one.count = one.count + state.count
