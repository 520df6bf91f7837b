"""One Kronecker product per group: K-FAC, K-FOC and their kin."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from kronfisher.operators import factors as sides
from kronfisher.operators.algebra import nonnegative
from kronfisher.operators.eigen import Eigen, KroneckerBasis
from kronfisher.operators.operator import Operator, stable_norm
from kronfisher.operators.spectral import negligible
from kronfisher.operators.sum import DENSE_LIMIT

__all__ = ["Kronecker"]


@dataclass(frozen=True, eq=False, repr=False)
class Kronecker(Operator, kind="kronecker"):
    """``blockdiag_h(B_h ⊗ A_h)``: takes ``W [H, O, I]`` to ``B_h W_h A_h`` (both symmetric).

    Without damping it is inverted by the Cholesky factors of A and B; ``+ λ`` goes through their eigenvectors, found
    once for all λ.

    Attributes:
        A: the input side ``[H, I, I]``, or its diagonal ``[H, I]``. One group still has the leading axis.
        B: the output side ``[H, O, O]``, or its diagonal ``[H, O]``.
        name: what the matrix belongs to, for messages.
        definite: the sides are positive definite by construction (damped): no pivot is mistaken for rounding noise.

    Raises:
        DataError: the sides do not fit each other.

    Example:
        >>> X = Kronecker(A=torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]), B=torch.tensor([[[3.0]]]), name="fc.weight")
        >>> X @ torch.tensor([1.0, 0.0])
        tensor([6., 3.])
        >>> X.solve(X @ torch.tensor([1.0, 0.0])).round(decimals=4)
        tensor([1., 0.])
        >>> X
        <kronecker 2x1 of fc.weight, torch.float32>
    """

    A: Tensor
    B: Tensor
    name: str = ""
    definite: bool = False

    def __post_init__(self) -> None:
        sides.check(self.tensors(), self.name or "Kronecker")

    @property
    def dim(self) -> int:
        """D = H·O·I."""
        return len(self.A) * self.A.shape[1] * self.B.shape[1]

    @property
    def structure(self) -> str:
        """The sizes of A and B."""
        return f"kronecker {sides.size(self.A, self.B)}"

    def matvecs(self, rows: Tensor) -> Tensor:
        """``B W Aᵀ`` for K rows W ``[K, D]``."""
        return sides.sandwich(self.B, rows, self.A)

    def solves(self, rows: Tensor) -> Tensor:
        """``B⁻¹ W A⁻¹`` for K rows W ``[K, D]``."""
        lower_a, lower_b = self._factors
        return sides.solve(lower_b, rows, lower_a)

    def colour(self, noise: Tensor, *, inverse: bool = True) -> Tensor:
        """``N(0, X⁻¹)`` by the Cholesky factors, ``N(0, X)`` by the symmetric root, which exists when X is singular."""
        if not inverse:
            return super().colour(noise, inverse=False)
        lower_a, lower_b = self._factors
        return sides.solve(lower_b, noise, lower_a, whiten=True)

    def inverse(self) -> "Kronecker":
        """``B⁻¹ ⊗ A⁻¹``."""
        lower_a, lower_b = self._factors
        return Kronecker(sides.inverse(lower_a), sides.inverse(lower_b), self.name, definite=True)

    def spectral(self) -> Eigen:
        """Eigenvectors of both sides; the eigenvalues are all products of theirs."""
        return self._spectral

    def transposed(self, outputs: int, inputs: int) -> Operator:
        """The sides change places; for one group."""
        return replace(self, A=self.B, B=self.A) if len(self.A) == 1 else super().transposed(outputs, inputs)

    def merged(self, other: Operator) -> Operator | None:
        """Two terms of one form as a sum of products, where they are too large to be formed: it can be solved."""
        if not isinstance(other, Kronecker) or self.dim <= DENSE_LIMIT:
            return None
        if (len(self.A), self.A.shape[1], self.B.shape[1]) != (len(other.A), other.A.shape[1], other.B.shape[1]):
            return None
        A, B = sides.stacked(self.A, other.A), sides.stacked(self.B, other.B)
        settings = {"name": self.name, "nonnegative": True, "antisymmetric": (False, False)}
        return Operator.kinds["kronecker-sum"].from_tensors({"A": A, "B": B}, **settings)

    def scaled(self, factor: float) -> "Kronecker":
        """The factor goes into B."""
        factor = nonnegative(factor, "the factor")
        return replace(self, B=self.B * factor, definite=self.definite and factor > 0)

    def trace(self) -> Tensor:
        """``Σ_h tr A_h tr B_h``."""
        return (sides.diagonal(self.A).sum(1) * sides.diagonal(self.B).sum(1)).sum()

    def diagonal(self) -> Tensor:
        """``diag B_h ⊗ diag A_h``, ``[D]``."""
        return sides.outer(sides.diagonal(self.B), sides.diagonal(self.A))

    def frobenius_norm(self) -> Tensor:
        """``√(Σ_h ‖A_h‖² ‖B_h‖²)``."""
        return stable_norm(sides.norms(self.A) * sides.norms(self.B))

    def logdet(self) -> Tensor:
        """``Σ_h O log|A_h| + I log|B_h|``."""
        lower_a, lower_b = self._factors
        inputs, outputs = self.A.shape[1], self.B.shape[1]
        return (outputs * sides.logdet(lower_a) + inputs * sides.logdet(lower_b)).sum()

    def to_dense(self) -> Tensor:
        """The Kronecker products on the diagonal of ``[D, D]``."""
        left, right = sides.dense(self.B), sides.dense(self.A)
        products = left[:, :, None, :, None] * right[:, None, :, None, :]
        size = self.A.shape[1] * self.B.shape[1]
        return torch.block_diag(*products.reshape(len(left), size, size))

    def tensors(self) -> dict[str, Tensor]:
        """A and B."""
        return {"A": self.A, "B": self.B}

    def settings(self) -> dict[str, Any]:
        """Name and definiteness."""
        return {"name": self.name, "definite": self.definite}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], **settings: Any) -> Self:
        """From A and B."""
        return cls(tensors["A"], tensors["B"], **settings)

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        label = self.name or self.structure
        lower_a = sides.factor(self.A, f"{label} (input side)", definite=self.definite)
        return lower_a, sides.factor(self.B, f"{label} (output side)", definite=self.definite)

    @cached_property
    def _spectral(self) -> Eigen:
        label = self.name or self.structure
        values_a, vectors_a = sides.decompose(self.A, f"{label} (input side)")
        values_b, vectors_b = sides.decompose(self.B, f"{label} (output side)")
        # Products of eigenvalues are as precise as the eigenvalues: each side is judged by its own largest.
        definite = self.definite or all(
            bool((values.amin(1) > negligible(self.dtype) * values.amax(1)).all()) for values in (values_a, values_b)
        )
        basis = KroneckerBasis(vectors_a, vectors_b)
        return Eigen(basis, sides.outer(values_b, values_a), self.name, definite=definite, form=self.structure)
