"""A matrix that one rank of a process group holds, and all of them multiply with."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kronfisher.distributed import Ranks
from kronfisher.errors import UnsupportedError
from kronfisher.operators.algebra import nonnegative
from kronfisher.operators.operator import Operator

__all__ = ["Outline", "Owned", "require_whole"]


@dataclass(frozen=True)
class Outline:
    """What every rank knows of a matrix that one of them holds.

    Attributes:
        dim: D.
        structure: in words.
        dtype: of its tensors.
        semidefinite: see `Operator.semidefinite`.
        spans_layers: see `Operator.spans_layers`.
        noise_dims: numbers that a draw from ``N(0, X⁻¹)`` and from ``N(0, X)`` takes.
        notes: remarks for a report.
        name: what the matrix belongs to.
    """

    dim: int
    structure: str
    dtype: torch.dtype
    semidefinite: bool
    spans_layers: bool
    noise_dims: tuple[int, int]
    notes: str
    name: str

    @classmethod
    def of(cls, operator: Operator) -> "Outline":
        """That of an operator."""
        dims = operator.noise_dim(), operator.noise_dim(inverse=False)
        facts = operator.dim, operator.structure, operator.dtype, operator.semidefinite, operator.spans_layers
        return cls(*facts, dims, operator.notes, operator.name)


@dataclass(frozen=True, eq=False, repr=False)
class Owned(Operator):
    """A matrix at one rank. Every operation is a collective: all ranks call it, in the same order, and get the same.

    A product costs one broadcast of its answer; what gives another matrix leaves that at the owner, too.

    Attributes:
        operator: the matrix, at its owner; elsewhere None.
        owner: the rank that holds it.
        ranks: of the process group.
        outline: what all of them know of it.
        where: the device of vectors.
    """

    operator: Operator | None
    owner: int
    ranks: Ranks
    outline: Outline
    where: torch.device

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.outline.name

    @property
    def dim(self) -> int:
        return self.outline.dim

    @property
    def structure(self) -> str:
        return f"{self.outline.structure} at rank {self.owner}"

    @property
    def semidefinite(self) -> bool:
        return self.outline.semidefinite

    @property
    def spans_layers(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.outline.spans_layers

    @property
    def notes(self) -> str:
        return self.outline.notes

    @property
    def dtype(self) -> torch.dtype:
        return self.outline.dtype

    @property
    def device(self) -> torch.device:
        return self.where

    @property
    def bytes(self) -> int:
        """The memory that it takes on this rank."""
        return 0 if self.operator is None else self.operator.bytes

    def tensors(self) -> dict[str, Tensor]:
        raise _apart(self, "its tensors")

    def settings(self) -> dict[str, Any]:
        raise _apart(self, "its settings")

    # Products ---------------------------------------------------------------------------------------------------------

    def matvecs(self, rows: Tensor) -> Tensor:
        return self._product(rows, lambda operator: operator.matvecs(rows))

    def solves(self, rows: Tensor) -> Tensor:
        return self._product(rows, lambda operator: operator.solves(rows))

    def noise_dim(self, *, inverse: bool = True) -> int:
        return self.outline.noise_dims[0 if inverse else 1]

    def colour(self, noise: Tensor, *, inverse: bool = True) -> Tensor:
        like = noise.new_empty(len(noise), self.dim)
        return self._product(like, lambda operator: operator.colour(noise, inverse=inverse))

    def _product(self, like: Tensor, function: Callable[[Operator], Tensor]) -> Tensor:
        return self.ranks.fill(like, self.owner, lambda: function(self.held))

    # Numbers ----------------------------------------------------------------------------------------------------------

    def trace(self) -> Tensor:
        return self.value(lambda operator: operator.trace())

    def diagonal(self) -> Tensor:
        return self.value(lambda operator: operator.diagonal())

    def logdet(self) -> Tensor:
        return self.value(lambda operator: operator.logdet())

    def eigenvalues(self) -> Tensor:
        return self.value(lambda operator: operator.eigenvalues())

    def nullity(self) -> int:
        return self.value(lambda operator: operator.nullity())

    def frobenius_norm(self) -> Tensor:
        return self.value(lambda operator: operator.frobenius_norm())

    def to_dense(self) -> Tensor:
        return self.value(lambda operator: operator.to_dense())

    def value(self, function: Callable[[Operator], Any]) -> Any:
        """What a function makes of the matrix at its owner."""
        return self.ranks.of(self.owner, lambda: function(self.held), self.where)

    # Other matrices ---------------------------------------------------------------------------------------------------

    def scaled(self, factor: float) -> "Owned":
        return self._mapped(lambda operator: operator.scaled(factor))

    def shifted(self, damping: float) -> "Owned":
        if nonnegative(damping, "the damping λ") == 0:
            return self
        return self._mapped(lambda operator: operator.shifted(damping))

    def factored_damping(self, damping: float) -> "Owned":
        return self._mapped(lambda operator: operator.factored_damping(damping))

    def normalized(self, inputs: float | Tensor, outputs: float | Tensor) -> "Owned":
        return self._mapped(lambda operator: operator.normalized(inputs, outputs))

    def relative_to(self, diagonal: Tensor) -> "Owned":
        return self._mapped(lambda operator: operator.relative_to(diagonal))

    def inverse(self) -> "Owned":
        return self._mapped(lambda operator: operator.inverse())

    def inverse_sqrt(self) -> "Owned":
        return self._mapped(lambda operator: operator.inverse_sqrt())

    def sqrt(self) -> "Owned":
        return self._mapped(lambda operator: operator.sqrt())

    def clamped(self, floor: float = 0.0) -> "Owned":
        return self._mapped(lambda operator: operator.clamped(floor))

    def absolute(self) -> "Owned":
        return self._mapped(lambda operator: operator.absolute())

    def transposed(self, outputs: int, inputs: int) -> "Owned":
        return self._mapped(lambda operator: operator.transposed(outputs, inputs))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Owned":
        where = self.where if device is None else torch.device(device)
        if where == self.where and dtype in (None, self.dtype):
            return self
        return replace(self._mapped(lambda operator: operator.to(device, dtype)), where=where)

    def _mapped(self, function: Callable[[Operator], Operator]) -> "Owned":
        made: list[Operator] = []

        def make() -> Outline:
            made.append(function(self.held))
            return Outline.of(made[0])

        outline = self.ranks.of(self.owner, make, self.where)
        return replace(self, operator=made[0] if made else None, outline=outline)

    def _plus(self, other: object) -> Operator | None:
        """At the owner of the first, to whom a second one of another owner goes."""
        if not isinstance(other, Operator):
            return None
        if isinstance(other, Owned):
            theirs = other.operator
            if other.owner != self.owner:
                theirs = self.ranks.hand(theirs, other.owner, self.owner, self.where)
        else:
            theirs = other
        return self._mapped(lambda operator: operator + theirs)  # pyright: ignore[reportOperatorIssue]

    @property
    def held(self) -> Operator:
        """The matrix, at its owner."""
        assert self.operator is not None, "only the owner computes"
        return self.operator

    def whole(self) -> Operator:
        """The matrix, at every rank."""
        return self.ranks.of(self.owner, lambda: self.held, self.where)

    def at(self, rank: int) -> Operator | None:
        """The matrix, at one rank, in the memory of its processor; None at the others."""
        return self.ranks.hand(self.operator, self.owner, rank, torch.device("cpu"))


def require_whole(operators: Iterable[Operator], what: str) -> None:
    """UnsupportedError if any of the matrices is held by one rank of several alone; `what` needs them everywhere."""
    for operator in operators:
        if isinstance(operator, Owned):
            raise _apart(operator, what)


def _apart(operator: Owned, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{operator.name}: rank {operator.owner} alone holds this block (share='owned'), and {what} would take it on "
        "every rank. Give it fisher.whole(), or estimate with share='all': every rank has the whole matrix then."
    )
