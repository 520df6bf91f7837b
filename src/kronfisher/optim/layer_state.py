"""What training knows of one layer: the moving average of its curvature and an inverse made from it."""

import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from kronfisher.errors import NumericalError, NumericalWarning, UnsupportedError
from kronfisher.estimation.groups import Group
from kronfisher.fisher.blocks import Block
from kronfisher.fisher.damping import Damping
from kronfisher.fisher.layout import gather, scatter
from kronfisher.operators import Kronecker, Operator
from kronfisher.operators.spectral import Spectral
from kronfisher.optim.moving_average import Phased, Phases, scaled

__all__ = ["Layer"]

RAISES = 6  # times that λ is raised tenfold for a layer that cannot be factorised, before its last inverse is kept


@dataclass
class Layer:
    """One group of blocks that a fit treats together.

    Attributes:
        group: its fit, blocks, and the statistics of the batch in hand.
        average: the moving average of the statistics.
        operator: the curvature as it was when the inverse was made, kept where another λ costs next to nothing.
        inverse: the damped inverse; None before the first statistics.
        solves: whether `inverse` is the damped matrix itself, which has no inverse that could be kept.
        value: λ in it.
        mean: the mean eigenvalue of the undamped curvature.
        due: the step at which the inverse is due.
        made: the step at which it was made.
        turned: the step at which the second pass of the fit began anew, for a fit of two.
        seconds: spent on factorising.
        trouble: what went wrong with the last inverse, empty if nothing.
    """

    group: Group
    average: Phases | None = None
    operator: Operator | None = None
    inverse: Operator | None = None
    solves: bool = False
    value: float = 0.0
    mean: float = 0.0
    due: int = 0
    made: int = -1
    turned: int = -1
    seconds: float = 0.0
    trouble: str = ""

    @property
    def fit(self) -> Phased:
        fit = self.group.fit
        assert isinstance(fit, Phased)
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
    def separable(self) -> bool:
        """Whether the inverse is one Kronecker product of dense sides."""
        inverse = self.inverse
        if not isinstance(inverse, Kronecker) or self.solves or len(self.blocks) > 1 or len(inverse.A) > 1:
            return False
        return not inverse.has_diagonal

    def merge(self, keep: float) -> None:
        """Take the batch's statistics into the average, of which the share `keep` stays."""
        state = self.group.state
        assert isinstance(state, Phases)
        if not bool(state.count > 0):
            return
        _count(state)
        self.average = state if self.average is None else self.fit.combine(self.average, state, keep, 1.0)
        self.empty()

    def turn(self, keep: float) -> bool:
        """Begin the second pass of the fit anew, from all that is known now; False if the batch is not finite."""
        try:
            self.group.state.checked()
        except NumericalError:
            return False
        before = self.average.states[1:] if self.average is not None else []
        self.merge(keep)
        assert self.average is not None
        # What the last eigenvalues were without this batch, which they are going to see in their new basis.
        self.average.states[1:] = [scaled(state, keep) for state in before]
        self.average = self.fit.turned(self.average)
        assert self.average is not None
        self.empty()
        return True

    def merge_last(self) -> None:
        """Take the batch's statistics into the second pass alone: the first has seen them."""
        state, average = self.group.state, self.average
        assert isinstance(state, Phases) and average is not None
        _count(state)
        *before, last = average.states
        average.states = [*before, self.fit.fit.combine(last, state.states[-1])]
        self.empty()

    def empty(self) -> None:
        """Forget the batch's statistics."""
        state = self.average or self.group.state
        assert isinstance(state, Phases)
        self.group.state = self.fit.fresh(state)

    def estimate(self) -> None:
        """The operator of the average.

        Raises:
            NumericalError: the average is not finite.
        """
        assert self.average is not None
        self.operator = self.fit.finish(self.average)
        self.mean = float(self.operator.trace()) / self.operator.dim

    def invert(self, damping: Damping, value: float, step: int) -> None:
        """Make the inverse of the operator with λ = `value`; λ is raised where that is too small for this layer."""
        began = time.perf_counter()
        assert self.operator is not None
        tried = value
        for _ in range(RAISES):
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", NumericalWarning)
                    damped = damping.at(tried)(self.operator)
                    try:
                        self.inverse, self.solves = damped.inverse(), False
                    except UnsupportedError:
                        self.inverse, self.solves = damped, True
                self.trouble = str(caught[0].message) if caught else ""
                if tried != value:
                    self.trouble = f"singular with λ = {value:.1e}; raised to {tried:.1e}"
                self.value, self.made = value, step
                break
            except NumericalError as error:
                tried, self.trouble = 10 * tried, str(error)
        else:
            if self.inverse is None:
                raise NumericalError(
                    f"{self.name}: no inverse even with λ = {tried:.1e}. Look at this layer's inputs and gradients, or "
                    "give it a diagonal fit."
                )
        if not isinstance(self.operator, Spectral):
            self.operator = None
        self.seconds += time.perf_counter() - began

    def apply(self, rows: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> None:
        """Write the inverse times a vector ``{name: [1, *shape]}`` into `out`."""
        assert self.inverse is not None
        given = {name: rows.get(name) for block in self.blocks for name in block.parameters}
        if all(tensor is None for tensor in given.values()):
            return
        vectors = {name: _zeros(self.blocks, name, rows) if t is None else t for name, t in given.items()}
        vector = gather(self.blocks, vectors).to(self.inverse.dtype)
        answer = self.inverse.solves(vector) if self.solves else self.inverse.matvecs(vector)
        scatter(self.blocks, answer, {name: out.get(name, vectors[name]) for name in given})

    def state(self) -> dict[str, Any]:
        """Everything as tensors, numbers and strings."""
        phases = self.average.states if self.average is not None else []
        return {
            "blocks": [asdict(block) for block in self.blocks],
            "average": [
                {key: getattr(phase, key) for key in ("sums", "fixed", "count", "rows", "phase", "facts")}
                for phase in phases
            ],
            "operator": _written(self.operator),
            "inverse": _written(self.inverse),
            **{key: getattr(self, key) for key in _NUMBERS},
        }

    def load(self, state: Mapping[str, Any], device: Any) -> None:
        """Take over what `state` wrote."""
        average = self.group.state
        assert isinstance(average, Phases)
        if phases := state["average"]:
            first = average.states[0]
            states = [
                type(first)(
                    self.blocks,
                    first.plan,
                    {key: t.to(device) for key, t in phase["sums"].items()},
                    {key: t.to(device) for key, t in phase["fixed"].items()},
                    phase["count"],
                    phase["rows"],
                    phase["phase"],
                    facts=dict(phase["facts"]),
                )
                for phase in phases
            ]
            self.average = Phases(self.blocks, average.plan, {}, states=states)
        self.empty()
        self.operator, self.inverse = (_read(state[key], device) for key in ("operator", "inverse"))
        for key in _NUMBERS:
            setattr(self, key, state[key])


_NUMBERS = ("solves", "value", "mean", "due", "made", "turned", "trouble")


def _written(operator: Operator | None) -> dict[str, Any] | None:
    if operator is None:
        return None
    return {"tensors": operator.tensors(), "settings": {"kind": operator.kind, **operator.settings()}}


def _read(written: Mapping[str, Any] | None, device: Any) -> Operator | None:
    if written is None:
        return None
    return Operator.restored({key: t.to(device) for key, t in written["tensors"].items()}, written["settings"])


def _count(state: Phases) -> None:
    for phase in state.states:
        phase.count = phase.count + state.count


def _zeros(blocks: tuple[Block, ...], name: str, rows: Mapping[str, Tensor]) -> Tensor:
    view = next(view for block in blocks for view in block.views if view.parameter == name)
    return next(iter(rows.values())).new_zeros(1, *view.shape)
