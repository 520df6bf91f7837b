"""One Kronecker product per group: K-FAC, K-FOC and their kin."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from kronfisher.linalg import negligible, stable_norm
from kronfisher.operators.algebra import nonnegative
from kronfisher.operators.eigen import Eigen, KroneckerBasis
from kronfisher.operators.factors import Factor, check_factors, cholesky_solve, outer, sandwich, size_text, stack
from kronfisher.operators.operator import Operator
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
        check_factors(self.tensors(), self.name or "Kronecker")

    @cached_property
    def input_factor(self) -> Factor:
        """A."""
        return Factor.of(self.A)

    @cached_property
    def output_factor(self) -> Factor:
        """B."""
        return Factor.of(self.B)

    @property
    def has_diagonal(self) -> bool:
        """Whether a factor is kept as its diagonal."""
        return self.input_factor.is_diagonal or self.output_factor.is_diagonal

    @property
    def dim(self) -> int:
        """D = H·O·I."""
        return len(self.A) * self.A.shape[1] * self.B.shape[1]

    @property
    def structure(self) -> str:
        """The sizes of A and B."""
        return f"kronecker {size_text(self.input_factor, self.output_factor)}"

    def matvecs(self, rows: Tensor) -> Tensor:
        """``B W Aᵀ`` for K rows W ``[K, D]``."""
        return sandwich(self.output_factor, rows, self.input_factor)

    def solves(self, rows: Tensor) -> Tensor:
        """``B⁻¹ W A⁻¹`` for K rows W ``[K, D]``."""
        lower_a, lower_b = self._lower
        return cholesky_solve(lower_b, rows, lower_a)

    def colour(self, noise: Tensor, *, inverse: bool = True) -> Tensor:
        """``N(0, X⁻¹)`` by the Cholesky factors, ``N(0, X)`` by the symmetric root, which exists when X is singular."""
        if not inverse:
            return super().colour(noise, inverse=False)
        lower_a, lower_b = self._lower
        return cholesky_solve(lower_b, noise, lower_a, whiten=True)

    def inverse(self) -> "Kronecker":
        """``B⁻¹ ⊗ A⁻¹``."""
        lower_a, lower_b = self._lower
        return Kronecker(lower_a.cholesky_inverse().tensor, lower_b.cholesky_inverse().tensor, self.name, definite=True)

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
        A = stack(self.input_factor, other.input_factor)
        B = stack(self.output_factor, other.output_factor)
        settings = {"name": self.name, "nonnegative": True, "antisymmetric": (False, False)}
        return Operator.kinds["kronecker-sum"].from_tensors({"A": A, "B": B}, **settings)

    def scaled(self, factor: float) -> "Kronecker":
        """The factor goes into B."""
        factor = nonnegative(factor, "the factor")
        return replace(self, B=self.B * factor, definite=self.definite and factor > 0)

    def trace(self) -> Tensor:
        """``Σ_h tr A_h tr B_h``."""
        return (self.input_factor.diagonal().sum(1) * self.output_factor.diagonal().sum(1)).sum()

    def diagonal(self) -> Tensor:
        """``diag B_h ⊗ diag A_h``, ``[D]``."""
        return outer(self.output_factor.diagonal(), self.input_factor.diagonal())

    def frobenius_norm(self) -> Tensor:
        """``√(Σ_h ‖A_h‖² ‖B_h‖²)``."""
        return stable_norm(self.input_factor.norms() * self.output_factor.norms())

    def logdet(self) -> Tensor:
        """``Σ_h O log|A_h| + I log|B_h|``."""
        lower_a, lower_b = self._lower
        inputs, outputs = self.A.shape[1], self.B.shape[1]
        return (outputs * lower_a.cholesky_logdet() + inputs * lower_b.cholesky_logdet()).sum()

    def to_dense(self) -> Tensor:
        """The Kronecker products on the diagonal of ``[D, D]``."""
        left, right = self.output_factor.dense(), self.input_factor.dense()
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
    def _lower(self) -> tuple[Factor, Factor]:
        label = self.name or self.structure
        lower_a = self.input_factor.cholesky(f"{label} (input side)", definite=self.definite)
        return lower_a, self.output_factor.cholesky(f"{label} (output side)", definite=self.definite)

    @cached_property
    def _spectral(self) -> Eigen:
        label = self.name or self.structure
        values_a, vectors_a = self.input_factor.eigh(f"{label} (input side)")
        values_b, vectors_b = self.output_factor.eigh(f"{label} (output side)")
        # Products of eigenvalues are as precise as the eigenvalues: each side is judged by its own largest.
        definite = self.definite or all(
            bool((values.amin(1) > negligible(self.dtype) * values.amax(1)).all()) for values in (values_a, values_b)
        )
        basis = KroneckerBasis(vectors_a.tensor, vectors_b.tensor)
        return Eigen(basis, outer(values_b, values_a), self.name, definite=definite, form=self.structure)
