"""States: what a fit has summed so far, in typed fields that say which of them add up.

A fit's state is a dataclass. A field of type `Total` is a sum over samples, so that batching, moving averages and
partitions of the data are one weighted sum (`State.plus`); a `Fixed` one stays during a pass, and two states must agree
in it before they can be added; a `Stack` holds terms of a sum of products, which only the fit can join. Everything else
is plain. Adding, scaling, checking and saving derive from these types.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import cache, partial
from math import isfinite
from typing import Annotated, Any, ClassVar, Self, get_args, get_type_hints

import torch
from torch import Tensor

from kronfisher.errors import NumericalError, require, together, waiting
from kronfisher.fisher.blocks import Block
from kronfisher.fits.plan import Plan
from kronfisher.fits.saving import from_plain, to_plain
from kronfisher.layers.samples import Samples
from kronfisher.linalg import all_finite

__all__ = [
    "FactorSums",
    "Fixed",
    "Number",
    "Stack",
    "State",
    "Total",
    "Totals",
    "Upper",
    "Uppers",
    "WaitingState",
    "reciprocal",
]

Number = float | Tensor


class Role(Enum):
    """Roles of tensors in a state, as marks of their types."""

    TOTAL = "total"
    FIXED = "fixed"
    STACK = "stack"
    UPPER = "upper"


Total = Annotated[Tensor, Role.TOTAL]
"""A sum over samples, unscaled."""
Totals = Annotated[tuple[Tensor, ...], Role.TOTAL]
"""The same of every block of a group."""
Upper = Annotated[Tensor, Role.TOTAL, Role.UPPER]
"""A sum over samples of which only the upper triangles count where it has three axes; with two it is a diagonal."""
Uppers = Annotated[tuple[Tensor, ...], Role.TOTAL, Role.UPPER]
"""The same of every block of a group."""
Fixed = Annotated[Tensor, Role.FIXED]
"""A tensor that stays during a pass, such as a basis; with ``Fixed | None`` it may be missing."""
Stack = Annotated[Tensor, Role.STACK]
"""Terms ``[R, ...]`` of a sum of products; its fit says how those of two states are joined."""


@dataclass
class State:
    """Sums over samples: the only mutable thing of a fit. Every fit has its own, with more fields.

    Attributes:
        blocks: the group.
        plan: memory and passes.
        count: N, examples so far.
        rows: positions that counted so far.
        phase: number of the pass, from 0.
        adds: whether its sums over parts of the data, added up, are all there is to those of the whole.
    """

    adds: ClassVar[bool] = True

    blocks: tuple[Block, ...]
    plan: Plan
    count: Number = 0.0
    rows: Number = 0.0
    phase: int = 0

    @property
    def name(self) -> str:
        return ", ".join(block.name for block in self.blocks)

    @property
    def sums(self) -> dict[str, Tensor]:
        """Name → tensor of every sum over samples, terms included; a tuple's entries have their place in the name."""
        return dict(_tensors(self, Role.TOTAL)) | dict(_tensors(self, Role.STACK))

    @property
    def triangles(self) -> set[str]:
        """Names of the sums of which only the upper triangles count."""
        return {name for name, tensor in _tensors(self, Role.UPPER) if tensor.dim() == 3}

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and device of the sums."""
        return next(iter(self.sums.values()))

    def check(self) -> Self:
        """Itself, if every sum and all that waits to be added is finite.

        Raises:
            NumericalError: naming the block.
        """

        def error(name: str) -> NumericalError:
            return NumericalError(
                f"{self.name}: the accumulated {name} hold NaN or Inf. The outputs were finite, so a gradient or an "
                "input of this layer overflowed: look at its weights, or use float64."
            )

        entries = list(self._checkable())
        if not waiting() and isfinite(sum(value.sum() if value.dim() else value for _, value in entries)):
            return self  # at once; a sum of sums may overflow where they do not
        with together():
            for name, value in entries:
                require(all_finite(value), partial(error, name))
        return self

    def _checkable(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.sums.items()

    def plus(self, other: "State", wx: float = 1.0, wy: float = 1.0) -> Self:
        """``wx · self + wy · other``; fields that are no sums are those of `self`.

        Raises:
            ValueError: the states are of different blocks, passes or bases.
        """
        same = type(self) is type(other) and self.blocks == other.blocks and self.phase == other.phase
        if not same or not _same_basis(self, other):
            raise ValueError(
                f"{self.name}: states can be combined only for the same blocks, in the same pass and basis; "
                "finish one of them, or restart its average in the new basis."
            )
        sums = {
            name: _each(partial(_weighted, wx, wy), getattr(self, name), getattr(other, name))
            for name in _names(type(self), Role.TOTAL)
        }
        return replace(self, **sums, count=wx * self.count + wy * other.count, rows=wx * self.rows + wy * other.rows)

    def times(self, factor: float) -> Self:
        """The sums times a number."""
        sums = {name: _each(lambda x: factor * x, getattr(self, name)) for name in _names(type(self), Role.TOTAL)}
        return replace(self, **sums, count=factor * self.count, rows=factor * self.rows)

    def copy(self) -> Self:
        """The same state for `next_pass` or `finish` to work on, which leaves this one as it is."""
        return replace(self)

    def empty(self) -> Self:
        """The same basis with sums of zero."""
        sums = {
            name: _each(lambda x: x.new_zeros(x.shape), getattr(self, name)) for name in _names(type(self), Role.TOTAL)
        }
        return replace(self, **sums, count=0.0, rows=0.0)

    def release(self) -> None:
        """Let go of the memory of all sums, once the operator is made."""
        for name in (*_names(type(self), Role.TOTAL), *_names(type(self), Role.STACK)):
            setattr(self, name, _each(lambda x: x.new_empty(0), getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """The whole state as tensors, numbers, strings, lists and dictionaries; the tensors are not copied.

        Its blocks are left out: they belong to the model.
        """
        return to_plain(self, without=("blocks",))

    @classmethod
    def from_dict(
        cls, saved: Mapping[str, Any], blocks: tuple[Block, ...], device: torch.device | str | None = None
    ) -> Self:
        """The state that `to_dict` gave, which goes on to the same bits; in memory of its own.

        Args:
            saved: by `to_dict`.
            blocks: of the state that was saved.
            device: where its tensors shall be; None: where they are.

        Raises:
            ValueError: it was saved by a fit that is not known here.
        """
        return from_plain(saved, cls, device, blocks=blocks)


@dataclass(kw_only=True)
class FactorSums(State):
    """Sums of which the input and the output factor are made: ``[H, D, D]``, the upper triangle, or ``[H, D]``."""

    inputs: Upper
    outputs: Upper


@dataclass(kw_only=True)
class WaitingState(State):
    """State of a fit that takes many samples at once.

    Attributes:
        waiting: samples that wait for more, in memory of their own.
    """

    adds: ClassVar[bool] = False

    waiting: list[Samples] = field(default_factory=list)

    def keep(self) -> None:
        """Copy what was appended last, which is going to wait."""
        self.waiting[-1] = self.waiting[-1].copy()

    def order_batches(self) -> None:
        """Let samples wait in the order in which batches were dealt to ranks, which is that of one process."""
        self.waiting = sorted(self.waiting, key=lambda use: use.batch)

    def _checkable(self) -> Iterator[tuple[str, Tensor]]:
        yield from super()._checkable()
        for samples in self.waiting:
            yield "gradients", samples.gradients

    def copy(self) -> Self:
        """Waiting samples are merged in place by whatever finishes a state, so sums are copied where some wait."""
        if not self.waiting:
            return super().copy()
        names = (*_names(type(self), Role.TOTAL), *_names(type(self), Role.STACK))
        return replace(
            self, **{name: _each(Tensor.clone, getattr(self, name)) for name in names}, waiting=[*self.waiting]
        )

    def release(self) -> None:
        """Let go of samples, too."""
        super().release()
        self.waiting = []


def reciprocal(count: Number) -> Number:
    """``1 / count``, zero where nothing was counted."""
    if isinstance(count, Tensor):
        return torch.where(count > 0, 1 / count, torch.zeros_like(count))
    return 1 / count if count else 0.0


@cache
def _names(kind: type[State], role: Role) -> tuple[str, ...]:
    """Fields of a type of state that have a role."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple(entry.name for entry in fields(kind) if _has_role(hints[entry.name], role))


def _has_role(hint: Any, role: Role) -> bool:
    return role in getattr(hint, "__metadata__", ()) or any(_has_role(part, role) for part in get_args(hint))


def _each(function: Callable[..., Tensor], *values: Any) -> Any:
    """The function of tensors, or of the entries of tuples of them."""
    if isinstance(values[0], tuple):
        return tuple(_each(function, *entries) for entries in zip(*values, strict=True))
    return function(*values)


def _weighted(wx: float, wy: float, x: Tensor, y: Tensor) -> Tensor:
    """``wx x + wy y``, in one pass over the memory where a weight is one, as in moving averages."""
    return y.add(x, alpha=wx) if wy == 1 and x.is_floating_point() else wx * x + wy * y


def _tensors(state: State, role: Role) -> Iterator[tuple[str, Tensor]]:
    for name in _names(type(state), role):
        value = getattr(state, name)
        if isinstance(value, tuple):
            yield from ((f"{name} {place}", tensor) for place, tensor in enumerate(value))
        else:
            yield name, value


def _same_basis(x: State, y: State) -> bool:
    pairs = [(getattr(x, name), getattr(y, name)) for name in _names(type(x), Role.FIXED)]
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)
