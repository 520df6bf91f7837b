"""Moving averages of a fit's states: its passes over the data run side by side, each as a moving average."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kronfisher.errors import UnsupportedError
from kronfisher.fisher.blocks import Block, Key
from kronfisher.fits import Fit, Plan, State
from kronfisher.layers.samples import Samples
from kronfisher.operators import Operator

__all__ = ["AverageState", "MovingAverage"]

ENOUGH = 8  # rows of a batch over the width of a layer, of which averages over several batches are good
FEWEST = 8  # examples at the least, where only some are read: rows of one example are alike


@dataclass
class AverageState(State):
    """States of all passes of one fit: of the first pass, and with EKFAC of the eigenvalues in the basis it gave.

    Attributes:
        examples: of the batch that is going to be read, if part of its rows is enough; 0: it is not.
        turn: which part of a batch is read, or was last, where that is not all.
    """

    states: list[State] = field(default_factory=list)
    examples: int = 0
    turn: int = 0

    @property
    def adds(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether those of all passes do."""
        return all(state.adds for state in self.states)

    @property
    def sums(self) -> dict[str, Tensor]:
        """Those of all passes, by the number of the pass."""
        return {f"{name} of pass {k}": sum for k, state in enumerate(self.states) for name, sum in state.sums.items()}

    @property
    def triangles(self) -> set[str]:
        """Likewise."""
        return {f"{name} of pass {k}" for k, state in enumerate(self.states) for name in state.triangles}

    def check(self) -> "AverageState":
        """Itself, if every sum of every pass is finite; NumericalError otherwise."""
        for state in self.states:
            state.check()
        return self


@dataclass(frozen=True)
class MovingAverage(Fit):
    """A fit as training uses it: every batch goes to all of its passes, and each pass keeps a moving average.

    A fit of one pass is unchanged. With two passes (EKFAC: the basis, then eigenvalues in it) `renew_basis` starts the
    second one again from the average of the first.
    """

    fit: Fit

    @property
    def adds_roles(self) -> bool:
        """Sums of corrected eigenvalues, and of layers within chains, have no inverse at a layer's price."""
        return self.fit.adds_roles and not (self.fit.renews or self.fit.chained)

    @property
    def chained(self) -> bool:
        return self.fit.chained

    def groups(self, blocks: Sequence[Block], after: Mapping[Key, Key]) -> list[tuple[Block, ...]]:
        return self.fit.groups(blocks, after)

    def alone(self, block: Block) -> str:
        return self.fit.alone(block)

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        plan = self.fit.plan(group, element)
        if not self.fit.trains:
            raise UnsupportedError(
                f"{group[0].name}: {self.fit} keeps samples before it sums any, and training keeps moving averages of "
                "sums. Choose a fit of one pass, such as 'kfac', or EKFAC of one."
            )
        if plan.passes > 2:
            raise UnsupportedError(
                f"{group[0].name}: {self.fit} reads the data {plan.passes} times, and training reads each batch once. "
                "Choose a fit of one pass, or EKFAC of one."
            )
        return replace(plan, bytes=3 * plan.bytes)  # the average, the batch's own, the inverse

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> AverageState:
        return AverageState(group, plan, states=[self.fit.init(group, plan, like)])

    def fresh(self, average: AverageState) -> AverageState:
        """Empty states in the bases of the average."""
        first, *rest = average.states
        begun = self.fit.init(average.blocks, average.plan, first.like.new_empty(0))
        states = [begun, *(state.empty() for state in rest)]
        return AverageState(average.blocks, average.plan, states=states, turn=average.turn + 1)

    def without_sums(self, state: AverageState) -> AverageState:
        """States of the same kind and bases that take no memory and hold nothing; `fresh` begins with them, too."""
        bare = [replace(one, count=0.0, rows=0.0) for one in state.states]
        for one in bare:
            one.release()
        return AverageState(state.blocks, state.plan, states=bare, turn=state.turn)

    def takes_columns(self, block: Block) -> bool:
        return self.fit.takes_columns(block)

    def update(self, state: Any, samples: tuple[Samples, ...]) -> AverageState:
        if len(samples) == 1 and state.plan.passes == 1:
            samples = (_enough(samples[0], state.examples, state.turn),)
        state.states = [self.fit.update(one, samples) for one in state.states]
        return state

    def combine(self, x: Any, y: Any, wx: float = 1.0, wy: float = 1.0) -> AverageState:
        states = [self.fit.combine(old, new, wx, wy) for old, new in zip(x.states, y.states, strict=True)]
        return replace(x, states=states, count=wx * x.count + wy * y.count, turn=y.turn)

    def renew_basis(self, average: AverageState) -> AverageState | None:
        """The average with its second pass begun anew from the first; None for a fit of one pass."""
        again = self.fit.next_pass(average.states[0].copy())
        if again is not None and len(average.states) > 1:
            again = self.fit.carried(average.states[1], again)
        return None if again is None else replace(average, states=[average.states[0], again])

    def finish(self, state: Any) -> Operator:
        return self.fit.finish(state.states[-1])


def _enough(samples: Samples, examples: int, turn: int) -> Samples:
    """Part of the rows of a batch, with gradients that stand for all, if half of them is enough; all otherwise.

    Of layers with positions alone: second moments of all their rows would cost more than the rest of a backward pass.
    Where rows are sorted by example, some examples; otherwise one row of so many, of all examples. Which ones goes
    round from batch to batch: batches may be sorted.
    """
    size, positions = len(samples), samples.positions
    if samples.mask is not None or not examples or size * positions <= examples:
        return samples
    rows = ENOUGH * max(samples.shape[1:])
    times = size // (max(FEWEST, -(-rows // positions)) if positions > 1 else max(rows, examples))
    if times < 2:
        return samples
    low = turn % times
    if positions > 1:
        some = samples.part(low * (size // times), (low + 1) * (size // times))
    else:
        some = samples.select(torch.arange(low, size, times, device=samples.gradients.device))
    return replace(some, gradients=some.gradients * (size / len(some)) ** 0.5)
