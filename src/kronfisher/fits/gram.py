"""The exact matrix over all parameters, in the space of samples: for few samples or few weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kronfisher.errors import MemoryBudgetError, NumericalError, keep_integer
from kronfisher.fisher.blocks import Block, Key
from kronfisher.fits.fit import Fit
from kronfisher.fits.plan import Plan
from kronfisher.fits.registry import register
from kronfisher.fits.sketches import Drawn, Projected, split
from kronfisher.fits.state import State, reciprocal
from kronfisher.layers.activations import Dense
from kronfisher.layers.samples import Samples
from kronfisher.operators.memory import available_memory
from kronfisher.operators.outer_sum import OuterSum
from kronfisher.operators.rows import OuterRows, PlainRows, Rows, join
from kronfisher.tables import size

__all__ = ["Gram"]


@dataclass(kw_only=True)
class Gathered(State):
    """The rows of J so far.

    Attributes:
        rows_of_batches: one entry for every backward pass.
        inputs: of every block, what its next columns share with its last; None: nothing.
        held: bytes of all rows.
    """

    adds: ClassVar[bool] = False

    rows_of_batches: list[Rows] = field(default_factory=list)
    inputs: list[Tensor | None] = field(default_factory=list)
    held: int = 0

    @property
    def like(self) -> Tensor:
        return next(iter(self.rows_of_batches[0].tensors().values()))

    @property
    def number(self) -> int:
        """K so far."""
        return sum(len(rows) for rows in self.rows_of_batches)

    def release(self) -> None:
        self.rows_of_batches, self.inputs = [], [None] * len(self.blocks)


@dataclass(frozen=True)
class Gram(Fit):
    """``F = JᵀJ/N`` of all parameters that it is given, exactly: J ``[K, P]`` holds the vectors of the K samples.

    Products, solutions, determinant, spectrum and draws go through ``J Jᵀ [K, K]`` or ``JᵀJ [P, P]``, whichever is
    smaller. A layer that sees one position of every example keeps its inputs and output gradients, ``K (I + O)``
    numbers, if that is less than ``K O I``; others keep their rows of J. Weights in two roles are exact, too.

    Where there are more rows than can be kept, a `sketch` of them has ``max_rows`` rows, and says in the report how far
    it is from the whole:

    - ``"rows"``: a random sample, in which long rows are likelier, scaled so that the matrix is right on average; the
      relative error in the Frobenius norm that is to be expected, estimated from the sample itself.
    - ``"nystrom"``: Nyström's approximation, from products of F with ``max_rows`` random vectors. It is never above F,
      so that what is missing of the trace, which is known, bounds the error.

    Args:
        max_rows: the largest K, that is, samples times columns or draws; None: as memory allows.
        sketch: what to do with more rows; None: refuse them.

    Raises:
        ValueError: `max_rows` is no positive number, or `sketch` is none of the two, or has no `max_rows`.

    Example:
        >>> import torch, kronfisher as kf
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 30), torch.nn.Tanh(), torch.nn.Linear(30, 1))
        >>> fisher = kf.estimate(model, torch.randn(50, 2), kf.Gaussian(), fit="gram", labels="exact")
        >>> fisher.blocks["0.weight + 2.weight"].structure
        '50 samples x 121'
    """

    max_rows: int | None = None
    sketch: Literal["rows", "nystrom"] | None = None

    exact: ClassVar[bool] = True
    trains: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.max_rows is not None:
            keep_integer(self, "max_rows", 1, "use an integer of at least 1, or None")
        if self.sketch not in (None, "rows", "nystrom") or (self.sketch and self.max_rows is None):
            raise ValueError(f"sketch={self.sketch!r} with max_rows={self.max_rows}: use 'rows' or 'nystrom', and say "
                             "by max_rows how large the sketch shall be.")  # fmt: skip

    @property
    def linear(self) -> bool:
        return self.sketch != "rows"

    @property
    def by_batch(self) -> bool:
        return self.sketch == "rows"

    def groups(self, blocks: Sequence[Block], after: Mapping[Key, Key]) -> list[tuple[Block, ...]]:
        return [tuple(blocks)] if blocks else []

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        dim = sum(_kept(block) for block in group)
        if self.sketch is None or self.max_rows is None:
            return Plan(element * dim)  # one row; what follows is counted as it comes
        rows = min(self.max_rows, dim) if self.sketch == "nystrom" else self.max_rows
        return Plan(3 * element * rows * dim)

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> Gathered | Drawn | Projected:
        if self.sketch == "rows" and self.max_rows:
            return Drawn(group, plan, most=self.max_rows, inputs=[None] * len(group))
        if self.sketch == "nystrom" and self.max_rows:
            test = Projected.vectors(sum(block.dim for block in group), self.max_rows, like)
            nothing = torch.zeros_like(test)
            return Projected(group, plan, test=test, products=nothing, squares=nothing.new_zeros(()))
        return Gathered(group, plan, inputs=[None] * len(group))

    def update(self, state: Any, samples: tuple[Samples, ...]) -> State:
        if isinstance(state, Gathered):
            self._require_room(state, samples)
        inputs: list[Tensor | None] = [None] * len(samples) if isinstance(state, Projected) else state.inputs
        parts = [_part(inputs, place, use) for place, use in enumerate(samples)]
        kinds = [next(iter(part.tensors().values())).dtype for part in parts]
        widest = max(kinds, key=lambda kind: torch.finfo(kind).bits)
        rows = Rows(tuple(_widened(part, widest) for part in parts))
        if isinstance(state, Drawn | Projected):
            state.add_(rows)
            return state
        state.held += sum(tensor.numel() * tensor.element_size() for tensor in rows.tensors().values())
        state.rows_of_batches.append(rows)
        return state

    def combine(self, x: Any, y: Any, wx: float = 1.0, wy: float = 1.0) -> State:
        if isinstance(x, Projected):
            return super().combine(x, y, wx, wy)
        if x.blocks != y.blocks or type(x) is not type(y):
            raise ValueError(f"{x.name}: states can be combined only for the same blocks.")
        if isinstance(x, Drawn):
            both = x.joined(y, wx, wy)
            return replace(both, count=wx * x.count + wy * y.count, rows=wx * x.rows + wy * y.rows)
        rows = [_times(own, w**0.5) for state, w in ((x, wx), (y, wy)) for own in state.rows_of_batches]
        count, counted, none = wx * x.count + wy * y.count, wx * x.rows + wy * y.rows, [None] * len(x.blocks)
        return replace(x, rows_of_batches=rows, inputs=none, held=x.held + y.held, count=count, rows=counted)

    def finish(self, state: Any) -> OuterSum:
        if isinstance(state, Projected):
            rows = split(state.check().low_rank(), [block.dim for block in state.blocks])
        else:
            rows = state.rows_for_all() if isinstance(state, Drawn) else join(state.rows_of_batches)
        if not bool(torch.isfinite(rows.lengths().sum())):
            raise NumericalError(
                f"{state.name}: the gradients of the samples hold NaN or Inf. The outputs were finite, so a gradient "
                "or an input overflowed: look at the weights, or use float64."
            )
        return OuterSum(rows, float(reciprocal(state.count)), name=state.name)

    def notes(self, state: Any) -> str:
        if isinstance(state, Drawn) and state.rows_kept:
            kept, lost = len(state.rows_kept[0]), state.squared_error()
            square = float(OuterSum(state.rows_for_all(), name=state.name).frobenius_norm()) ** 2
            error = (lost / (square - lost)) ** 0.5 if lost < square else 1.0  # E‖X‖² is ‖F‖² and the error's square
            return f"{kept:,} of {state.seen:,} rows drawn, expected relative error {error:.2g}"
        if isinstance(state, Projected):
            rows = split(state.low_rank(), [block.dim for block in state.blocks])
            norm = float(OuterSum(rows, name=state.name).frobenius_norm())
            bound = state.missing(rows) / norm if norm else 0.0
            return f"Nyström, rank {len(rows)}, relative error at most {bound:.2g}"
        return ""

    def _require_room(self, state: Gathered, samples: tuple[Samples, ...]) -> None:
        """MemoryBudgetError if rows so far and those of the samples, or the smaller side, do not fit."""
        number, dim = state.number + len(samples[0]), sum(block.dim for block in state.blocks)
        if self.max_rows is not None and number > self.max_rows:
            raise MemoryBudgetError(
                f"fit='gram' is asked for more than max_rows={self.max_rows:,} rows (samples times columns or draws). "
                "Pass fewer data, use labels='sampled' or 'observed', which take one row each, or raise max_rows."
            )
        element = samples[0].gradients.element_size()
        own = len(samples[0]) * sum(_kept(block) for block in state.blocks) * element
        side = 3 * min(number, dim) ** 2 * element
        free = available_memory(samples[0].gradients.device) + state.held
        limit = free if state.plan.budget is None else min(free, state.plan.budget)
        needed = 2 * (state.held + own) + side
        if needed > limit:
            raise MemoryBudgetError(
                f"fit='gram' needs {needed:,} bytes ({size(needed)}) for {number:,} samples of {dim:,} "
                f"parameters and a matrix of {min(number, dim):,} rows, more than the limit of {limit:,} bytes. Pass "
                "fewer data, freeze layers, or choose a Kronecker-factored fit."
            )


def _kept(block: Block) -> int:
    """Numbers that one row of a block takes, at most."""
    return block.dim


def _part(inputs: list[Tensor | None], place: int, samples: Samples) -> PlainRows | OuterRows:
    """The rows of one block under one column: by inputs and gradients if these are fewer numbers."""
    groups, o, i = samples.shape
    if groups == 1 and samples.positions == 1 and i + o < i * o:
        shared = inputs[place]
        if samples.first or shared is None or len(shared) != len(samples):
            written = samples.activations.dense()[0, :, 0]
            kept = (
                isinstance(samples.activations, Dense) and samples.activations.bias
            )  # a column was appended to a copy
            shared = inputs[place] = written if kept else written.clone()
        each = torch.arange(len(samples), device=shared.device)
        return OuterRows(shared, samples.gradients[0, :, 0].clone(), each)
    return PlainRows(torch.cat([part.transpose(0, 1).flatten(1) for part in samples.per_sample()]))


def _widened(part: PlainRows | OuterRows, dtype: torch.dtype) -> PlainRows | OuterRows:
    if isinstance(part, PlainRows):
        return PlainRows(part.rows.to(dtype))
    return OuterRows(part.inputs.to(dtype), part.gradients.to(dtype), part.examples)


def _times(rows: Rows, factor: float) -> Rows:
    parts = (
        PlainRows(part.rows * factor)
        if isinstance(part, PlainRows)
        else OuterRows(part.inputs, part.gradients * factor, part.examples)
        for part in rows.parts
    )
    return Rows(tuple(parts))


register("gram", Gram, "the exact matrix over all parameters, by samples", "exact, by samples", standard=False)
