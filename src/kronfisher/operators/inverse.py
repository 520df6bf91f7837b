"""The inverse of a matrix that can solve, but has no form of its own for its inverse."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, cast, runtime_checkable

from torch import Tensor

from kronfisher.operators.algebra import nonnegative
from kronfisher.operators.operator import Operator
from kronfisher.operators.spectral import Spectral

__all__ = ["Inverse"]


@runtime_checkable
class Solvable(Protocol):
    """An operator that knows the diagonal and the trace of its inverse."""

    def inverse_diagonal(self) -> Tensor:
        """``diag(X⁻¹)``."""
        ...

    def inverse_trace(self) -> Tensor:
        """``tr X⁻¹``."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class Inverse(Operator, kind="inverse"):
    """``X⁻¹`` for a positive definite X: products are solutions, and the other way round.

    Attributes:
        of: X, which knows ``inverse_diagonal()`` and ``inverse_trace()``.
    """

    of: Operator

    @property
    def name(self) -> str:
        """Of X, for messages."""
        return self.of.name

    @property
    def dim(self) -> int:
        """D."""
        return self.of.dim

    @property
    def structure(self) -> str:
        """Of what it is the inverse."""
        return f"inverse of {self.of.structure}"

    def matvecs(self, rows: Tensor) -> Tensor:
        """``X⁻¹ v`` for K rows v ``[K, D]``."""
        return self.of.solves(rows)

    def solves(self, rows: Tensor) -> Tensor:
        """``X v`` for K rows v ``[K, D]``."""
        return self.of.matvecs(rows)

    def inverse(self) -> Operator:
        """X."""
        return self.of

    def noise_dim(self, *, inverse: bool = True) -> int:
        """That of X."""
        return self.of.noise_dim(inverse=not inverse)

    def colour(self, noise: Tensor, *, inverse: bool = True) -> Tensor:
        """By X."""
        return self.of.colour(noise, inverse=not inverse)

    def logdet(self) -> Tensor:
        """``−log|X|``."""
        return -self.of.logdet()

    def trace(self) -> Tensor:
        """``tr X⁻¹``."""
        return cast(Solvable, self.of).inverse_trace()

    def diagonal(self) -> Tensor:
        """``diag(X⁻¹)``, ``[D]``."""
        return cast(Solvable, self.of).inverse_diagonal()

    def scaled(self, factor: float) -> "Operator":
        """``(X / factor)⁻¹``; zero where the factor is."""
        factor = nonnegative(factor, "the factor")
        return replace(self, of=self.of.scaled(1 / factor)) if factor else self.of.scaled(0)

    def spectral(self) -> Spectral:
        """As that of X; UnsupportedError where it has none."""
        return cast(Spectral, self.of.spectral().positive_map(lambda values: values.reciprocal()))

    def transposed(self, outputs: int, inputs: int) -> Operator:
        """Of the transpose."""
        return replace(self, of=self.of.transposed(outputs, inputs))

    def tensors(self) -> dict[str, Tensor]:
        """Those of X."""
        return self.of.tensors()

    def settings(self) -> dict[str, Any]:
        """Kind and settings of X."""
        return {"of": {"kind": self.of.kind, **self.of.settings()}}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], **settings: Any) -> Self:
        """From those of X."""
        return cls(Operator.restored(tensors, settings["of"]))
