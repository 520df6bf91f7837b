"""From samples to an operator: the protocol of every fit.

A fit is a frozen bag of settings. What it accumulates lives in a `State` of its own type, whose fields say what they
are: states add, so that batching, moving averages and partitions of the data are one weighted sum. Only `finish`
divides by the number of examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from kronfisher.fisher.blocks import Block, Key
from kronfisher.fits.plan import Plan
from kronfisher.fits.state import State
from kronfisher.layers.samples import Samples
from kronfisher.operators import Operator

__all__ = ["Fit"]


@dataclass(frozen=True)
class Fit:
    """Base of all fits: one block at a time, one pass, linear states; a subclass says what is summed.

    A subclass has to define `plan`, `init`, `update` and `finish`; everything else has a default. Methods that take a
    state are given one of the type that `init` or `next_pass` made.

    Attributes:
        exact: what it stores is exact, whatever the source of the gradients.
        additive: what it makes of a weight in two roles is a sum over the roles, so that it needs no products of them.
        trains: moving averages of its states can be kept, as in training.
        renews: training renews the basis of its second pass from the average of the first, within a step.
        largest_tried: rows of the block up to which `Auto` tries it.

    Example:
        >>> import torch, kronfisher as kf
        >>> isinstance(kf.KFOC(), kf.Fit)
        True
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> fits: dict[str, kf.Fit] = {"2.*": kf.Full(), "*": kf.KFAC()}  # by patterns of parameter names
        >>> print(kf.coverage(model, torch.randn(5, 4), fit=fits).rows[-1].treatment)
        Full(across_layers=False)
    """

    exact: ClassVar[bool] = False
    additive: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    renews: ClassVar[bool] = False
    largest_tried: ClassVar[float] = float("inf")

    @property
    def linear(self) -> bool:
        """Whether states are plain sums over samples, so that those of partitions add up to that of all data."""
        return True

    @property
    def of_gradients(self) -> bool:
        """Whether the answer depends on each example's gradient alone, not on the positions that add up to it."""
        return False

    @property
    def adds_roles(self) -> bool:
        """Whether a weight in two roles, as a matrix and as its transpose, has a term for each; their sum is used."""
        return self.additive or not self.exact

    @property
    def by_batch(self) -> bool:
        """Whether the answer depends on the size and order of the batches."""
        return False

    @property
    def positions_apart(self) -> bool:
        """Whether scales, shifts and tables, whose positions are summed out else, bring them one by one."""
        return False

    @property
    def chained(self) -> bool:
        """Whether layers that follow each other are treated together, so that it has to be known which do."""
        return False

    def groups(self, blocks: Sequence[Block], after: Mapping[Key, Key]) -> list[tuple[Block, ...]]:
        """The groups of blocks that are treated together.

        Args:
            blocks: all that this fit is given, in the order of the forward pass.
            after: key of a block → key of the one that alone takes its outputs and nothing else, row by row; only for
                blocks of which `alone` says nothing.
        """
        return [(block,) for block in blocks]

    def takes_columns(self, block: Block) -> bool:
        """Whether columns of the same examples may come together, as `kronfisher.fits.columns.Columns`."""
        return False

    def alone(self, block: Block) -> str:
        """For a chained fit: why a block is treated apart from those before and after it, or nothing."""
        return ""

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        """Bytes and passes for a group whose numbers take `element` bytes each."""
        raise NotImplementedError

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> State:
        """An empty state with the dtype and device of `like`."""
        raise NotImplementedError

    def update(self, state: Any, samples: tuple[Samples, ...]) -> State:
        """Add the samples of one backward pass, one entry per block of the group; the state given is used up."""
        raise NotImplementedError

    def combine(self, x: Any, y: Any, wx: float = 1.0, wy: float = 1.0) -> State:
        """``wx·x + wy·y``: moving averages, partitions of the data, ranks of a process group.

        Raises:
            ValueError: the states are of different blocks, passes or bases.
        """
        return x.plus(y, wx, wy)

    def next_pass(self, state: Any) -> State | None:
        """The state with which the data are read once more, or None when it is done."""
        return None

    def carried(self, before: Any, after: Any) -> State:
        """The empty state of a later pass that training starts again, filled with what the previous one can pass on."""
        return after

    def finish(self, state: Any) -> Operator:
        """The operator of the mean over data: the only place where 1/N is applied."""
        raise NotImplementedError

    def error(self, state: Any, operator: Operator) -> float | None:
        """The relative error ``‖F − X‖ / ‖F‖`` of the operator that `finish` made, where the sums tell it."""
        return None

    def notes(self, state: Any) -> str:
        """A line for the report about this block besides its structure, such as iterations and convergence."""
        return ""
