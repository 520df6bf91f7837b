"""From samples to an operator: the protocol of every fit.

A fit is a frozen bag of settings. What it accumulates lives in a `State`, a tree of sums: states add, so that batching,
moving averages and partitions of the data are one `+` and one `*`. Only `finish` divides by the number of data.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from kronfisher.errors import NumericalError
from kronfisher.fisher.blocks import Block, Key
from kronfisher.layers.samples import Samples
from kronfisher.linalg import WORKSPACE
from kronfisher.operators import Factor, Operator

__all__ = ["FITS", "Fit", "Plan", "State", "named", "register"]

Number = float | Tensor


@dataclass(frozen=True)
class Plan:
    """What a fit is going to do with a group of blocks, by static cost.

    Attributes:
        bytes: size of the state and of the operator made from it.
        temporary: bytes of matrices that come and go while samples are taken in, beside those of `bytes`.
        waits: samples that may wait for more.
        waiting: bytes that they may take, at most.
        sample: bytes of the inputs and gradients of one datum, about; known once there are data.
        passes: times the data are read, at most.
        by_example: whether rows must be sorted by sample.
        workspace: bytes that temporaries may take.
    """

    bytes: int
    passes: int = 1
    by_example: bool = True
    workspace: int = WORKSPACE
    temporary: int = 0
    waits: int = 0
    waiting: int = 0
    sample: int = 0

    @property
    def standing(self) -> int:
        """Bytes that are taken from the first datum to the last."""
        return self.bytes + min(self.waiting, self.waits * self.sample)

    @property
    def least(self) -> int:
        """Bytes that come and go with one datum: itself, written out, and what is made of it.

        What plans no bytes at all keeps an account of its own.
        """
        return self.temporary + 3 * self.sample if self.bytes else 0


@dataclass
class State:
    """Sums over samples; the only mutable thing of a fit.

    Attributes:
        blocks: the group.
        plan: how it is treated.
        sums: name → sum over samples, unscaled.
        fixed: name → what stays during a pass (a basis).
        count: N, data so far.
        rows: positions that counted so far.
        phase: number of the pass, from 0.
        waiting: samples that wait for more, in memory of their own, for fits that take many at once.
        facts: what `Fit.notes` tells of how the sums came about; it is not added up.
    """

    blocks: tuple[Block, ...]
    plan: Plan
    sums: dict[str, Tensor]
    fixed: dict[str, Tensor] = field(default_factory=dict)
    count: Number = 0.0
    rows: Number = 0.0
    phase: int = 0
    waiting: list[Samples] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return ", ".join(block.name for block in self.blocks)

    def checked(self) -> "State":
        """Itself, if every sum and all that waits to be added is finite.

        Raises:
            NumericalError: naming the block.
        """
        waiting = [("gradients", samples.gradients) for samples in self.waiting]
        for name, value in [*self.sums.items(), *waiting]:
            if not bool(torch.isfinite(value.sum())):  # one NaN or Inf makes the sum one
                raise NumericalError(
                    f"{self.name}: the accumulated {name} hold NaN or Inf. The outputs were finite, so a gradient or "
                    "an input of this layer overflowed: look at its weights, or use float64."
                )
        return self


@dataclass(frozen=True)
class Fit:
    """Base of all fits: one block at a time, one pass, linear states; a subclass says what is summed.

    Attributes:
        exact: it keeps what it keeps of the matrix exactly, however the gradients are come by.
        trains: moving averages of its states can be kept, as in training.
    """

    exact: ClassVar[bool] = False
    trains: ClassVar[bool] = True

    @property
    def linear(self) -> bool:
        """Whether states are plain sums over samples, so that those of partitions add up to that of all data."""
        return True

    @property
    def by_batch(self) -> bool:
        """Whether the answer depends on the size and order of the batches."""
        return False

    @property
    def chained(self) -> bool:
        """Whether layers that follow each other are treated together, so that it has to be known which do."""
        return False

    def groups(self, blocks: Sequence[Block], after: Mapping[Key, Key]) -> list[tuple[Block, ...]]:
        """Which blocks are treated together.

        Args:
            blocks: all that this fit is given, in the order of the forward pass.
            after: key of a block → key of the one that alone takes its outputs and nothing else, row by row; only for
                blocks of which `alone` says nothing.
        """
        return [(block,) for block in blocks]

    def alone(self, block: Block) -> str:
        """For a chained fit: why a block is treated apart from those before and after it, or nothing."""
        return ""

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        """Bytes and passes for a group whose numbers take `element` bytes each."""
        raise NotImplementedError

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> State:
        """An empty state with the dtype and device of `like`."""
        raise NotImplementedError

    def update(self, state: State, samples: tuple[Samples, ...]) -> State:
        """Add the samples of one backward pass, one entry per block of the group; the state given is used up."""
        raise NotImplementedError

    def combine(self, x: State, y: State, wx: float = 1.0, wy: float = 1.0) -> State:
        """``wx·x + wy·y``: moving averages, partitions of the data, ranks of a process group.

        Raises:
            ValueError: the states are of different blocks, passes or bases.
        """
        same = x.blocks == y.blocks and x.phase == y.phase and x.fixed.keys() == y.fixed.keys()
        if not same or not all(
            x.fixed[name] is y.fixed[name] or torch.equal(x.fixed[name], y.fixed[name]) for name in x.fixed
        ):
            raise ValueError(
                f"{x.name}: states can be combined only for the same blocks, in the same pass and basis; "
                "finish one of them, or restart its average in the new basis."
            )
        sums = {name: wx * value + wy * y.sums[name] for name, value in x.sums.items()}
        return replace(x, sums=sums, count=wx * x.count + wy * y.count, rows=wx * x.rows + wy * y.rows)

    def next_pass(self, state: State) -> State | None:
        """The state with which the data are read once more, or None when it is done."""
        return None

    def carried(self, before: State, after: State) -> State:
        """The empty state of a later pass that training begins anew, with what can be kept of the one before it."""
        return after

    def finish(self, state: State) -> Operator:
        """The operator of the mean over data: the only place where 1/N is applied."""
        raise NotImplementedError

    def error(self, state: State, operator: Operator) -> float | None:
        """The relative error ``‖F − X‖ / ‖F‖`` of the operator that `finish` made, where the sums tell it."""
        return None

    def notes(self, state: State) -> str:
        """What the report says about this block besides its structure, such as iterations and convergence."""
        return ""


FITS: dict[str, Callable[[], Fit]] = {}
"""Name → fit with its default settings; the conformance tests run every one."""


def register(name: str, build: Callable[[], Fit]) -> None:
    """Make a fit known by name."""
    FITS[name] = build


def named(fit: "Fit | str") -> Fit:
    """The fit itself, or the one known by that name.

    Example:
        >>> import kronfisher as kf
        >>> named("kfac")
        KFAC(mode='expand')
    """
    if isinstance(fit, Fit):
        return fit
    if not isinstance(fit, str) or fit not in FITS:
        raise ValueError(f"fit={fit!r} is not known; use a fit object such as KFAC() or one of {sorted(FITS)}.")
    return FITS[fit]()


def sizes(group: tuple[Block, ...]) -> tuple[int, int, int]:
    """H, O, I of a group of one block."""
    (block,) = group
    return block.shape


MAX_DIM = 10240  # of a side that is a matrix: 400 MiB in float32

Shapes = tuple[tuple[int, ...], tuple[int, ...]]


def checked_max_dim(fit: Any) -> None:
    """ValueError unless its `max_dim` is a size."""
    if not isinstance(fit.max_dim, int) or fit.max_dim < 0:
        raise ValueError(
            f"{type(fit).__name__}(max_dim={fit.max_dim!r}): the largest side that is a matrix is an integer >= 0."
        )


def side_shapes(group: tuple[Block, ...], max_dim: int = MAX_DIM, *, summed: bool = False) -> Shapes:
    """Shapes of the sides A and B of a group of one block: ``[H, D, D]``, or ``[H, D]`` for a diagonal.

    Args:
        group: one block.
        max_dim: sides beyond it are diagonals, as are those of inputs that are looked up in a table.
        summed: rows of a table are summed before they are multiplied, so that their moments are no diagonal.
    """
    groups, outputs, inputs = sizes(group)
    onehot = group[0].onehot and not summed

    def shape(size: int, diagonal: bool) -> tuple[int, ...]:
        return (groups, size) if diagonal or size > max_dim else (groups, size, size)

    return shape(inputs, onehot), shape(outputs, False)


def has_diagonal(shapes: Shapes) -> bool:
    """Whether a factor is kept as its diagonal."""
    return any(Factor.type_of(shape).is_diagonal for shape in shapes)


def elements(*shape: int) -> int:
    """How many numbers a tensor of that shape holds."""
    return prod(shape)


def reciprocal(count: Number) -> Number:
    """``1 / count``, zero where nothing was counted."""
    if isinstance(count, Tensor):
        return torch.where(count > 0, 1 / count, torch.zeros_like(count))
    return 1 / count if count else 0.0
