"""A diagonal matrix."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from kronfisher.errors import DataError
from kronfisher.operators.gradients import Gradients
from kronfisher.operators.operator import Operator
from kronfisher.operators.spectral import Spectral

__all__ = ["Diagonal"]


@dataclass(frozen=True, eq=False, repr=False)
class Diagonal(Spectral, kind="diagonal"):
    """``diag(values)``; its own spectral form.

    Attributes:
        values: ``[D]``, nonnegative.
        name: what the matrix belongs to, for messages.
        definite: the values are positive by construction.

    Example:
        >>> import torch
        >>> (Diagonal(torch.tensor([1.0, 3.0])) + 1.0).inverse().diagonal()
        tensor([0.5000, 0.2500])
    """

    values: Tensor
    name: str = ""
    definite: bool = False

    def __post_init__(self) -> None:
        if self.values.dim() != 1:
            raise DataError(f"{self.name or 'Diagonal'}: values must be [D], not {list(self.values.shape)}")

    @property
    def dim(self) -> int:
        """D."""
        return len(self.values)

    @property
    def structure(self) -> str:
        """The size."""
        return f"diagonal {self.dim}"

    @property
    def diagonal_values(self) -> Tensor:
        """The values."""
        return self.values

    def map(self, function: Callable[[Tensor], Tensor], *, definite: bool = False) -> Self:
        """``diag(f(values))``."""
        return replace(self, values=function(self.values), definite=definite)

    def matvecs(self, rows: Tensor) -> Tensor:
        """Each of K rows ``[K, D]`` times the values."""
        return rows * self.values

    def diagonal(self) -> Tensor:
        """The values (a copy)."""
        return self.values.clone()

    def to_dense(self) -> Tensor:
        """``[D, D]``."""
        return self.values.diag()

    def transposed(self, outputs: int, inputs: int) -> "Diagonal":
        """Its elements in another order."""
        return replace(self, values=self.values.view(outputs, inputs).mT.flatten())

    def merged(self, other: Operator) -> Operator | None:
        """Diagonals add up to a diagonal."""
        if isinstance(other, Diagonal):
            return replace(self, values=self.values + other.values, definite=self.definite or other.definite)
        return None

    def quadratic(self, samples: Gradients) -> Tensor:
        """From the squared gradients."""
        return (samples.squares().flatten().double() * self.values.double()).sum()

    def relative_to(self, diagonal: Tensor) -> "Diagonal":
        """Diagonal again."""
        return Diagonal(self.values / diagonal, self.name)
