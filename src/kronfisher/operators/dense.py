"""A matrix without structure."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kronfisher.errors import DataError, SingularError
from kronfisher.linalg import eigh, full_precision, stable_norm
from kronfisher.operators.algebra import nonnegative
from kronfisher.operators.eigen import DenseBasis, Eigen
from kronfisher.operators.factors import DenseFactor
from kronfisher.operators.operator import Operator

__all__ = ["Dense"]


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Operator, kind="dense"):
    """A symmetric matrix, entry by entry.

    Attributes:
        matrix: ``[D, D]``.
        name: what the matrix belongs to, for messages.
        indefinite: it may be: then negative eigenvalues are kept and stop what needs positive ones. False: the matrix
            is positive semidefinite by construction, and they are rounding noise.

    Example:
        >>> X = Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> X.eigenvalues()
        tensor([3., 1.])
        >>> X.solve(torch.tensor([3.0, 0.0])).round(decimals=4)
        tensor([ 2., -1.])
    """

    matrix: Tensor
    name: str = ""
    indefinite: bool = False

    def __post_init__(self) -> None:
        if self.matrix.dim() != 2 or self.matrix.shape[0] != self.matrix.shape[1]:
            raise DataError(f"{self.name or 'Dense'}: the matrix must be [D, D], not {list(self.matrix.shape)}")

    @property
    def dim(self) -> int:
        """D."""
        return len(self.matrix)

    @property
    def structure(self) -> str:
        """The size."""
        return f"dense {self.dim}x{self.dim}"

    @property
    def semidefinite(self) -> bool:
        """As it was made."""
        return not self.indefinite

    def matvecs(self, rows: Tensor) -> Tensor:
        """The matrix times K rows ``[K, D]``."""
        with full_precision(rows.device.type):
            return rows @ self.matrix.mT

    def solves(self, rows: Tensor) -> Tensor:
        """By the Cholesky factor."""
        return torch.cholesky_solve(rows.mT, self._lower).mT

    def colour(self, noise: Tensor, *, inverse: bool = True) -> Tensor:
        """``N(0, X⁻¹)`` by the Cholesky factor, ``N(0, X)`` by the symmetric root, which exists when X is singular."""
        if not inverse:
            return super().colour(noise, inverse=False)
        return torch.linalg.solve_triangular(self._lower.mT, noise.mT, upper=True).mT

    def inverse(self) -> "Dense":
        """Dense again."""
        return Dense(torch.cholesky_inverse(self._lower), self.name)

    def logdet(self) -> Tensor:
        """From the Cholesky factor."""
        return DenseFactor(self._lower[None]).cholesky_logdet()[0]

    def spectral(self) -> Eigen:
        """Eigenvectors in a `DenseBasis`."""
        return self._spectral

    def scaled(self, factor: float) -> "Dense":
        """Entry by entry."""
        return replace(self, matrix=self.matrix * nonnegative(factor, "the factor"))

    def trace(self) -> Tensor:
        """The sum of the diagonal."""
        return self.matrix.trace()

    def diagonal(self) -> Tensor:
        """``[D]`` (a copy)."""
        return self.matrix.diagonal().clone()

    def frobenius_norm(self) -> Tensor:
        """From the entries."""
        return stable_norm(self.matrix.flatten())

    def to_dense(self) -> Tensor:
        """The matrix (a copy)."""
        return self.matrix.clone()

    def transposed(self, outputs: int, inputs: int) -> "Dense":
        """Rows and columns in another order."""
        order = torch.arange(outputs * inputs, device=self.device).view(outputs, inputs).mT.flatten()
        return replace(self, matrix=self.matrix[order][:, order])

    def merged(self, other: Operator) -> Operator | None:
        """Dense and diagonal matrices are added in place of the sum."""
        if isinstance(other, Dense):
            either = self.indefinite or other.indefinite
            return replace(self, matrix=self.matrix + other.matrix, indefinite=either)
        values = other.diagonal_values
        return None if values is None else replace(self, matrix=self.matrix + values.diag())

    @cached_property
    def _lower(self) -> Tensor:
        try:
            return DenseFactor(self.matrix[None]).cholesky(self.name or self.structure).tensor[0]
        except SingularError:
            if self.indefinite:
                self.spectral().checked()  # says so if negative eigenvalues are the reason
            raise

    @cached_property
    def _spectral(self) -> Eigen:
        values, vectors = eigh(self.matrix, self.name or self.structure, semidefinite=not self.indefinite)
        return Eigen(DenseBasis(vectors), values, self.name)
