"""Eigenvalues in a basis: the spectral form of every operator, and EKFAC's own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from kronfisher.errors import DataError
from kronfisher.linalg import full_precision
from kronfisher.operators.algebra import matching
from kronfisher.operators.factors import Factor, check_factors, sandwich, size_text
from kronfisher.operators.gradients import Gradients
from kronfisher.operators.operator import Operator
from kronfisher.operators.spectral import Spectral

__all__ = ["Basis", "DenseBasis", "Eigen", "KroneckerBasis"]


class Basis(Protocol):
    """An orthogonal matrix U ``[D, D]``."""

    @property
    def dim(self) -> int:
        """D."""
        ...

    @property
    def size(self) -> str:
        """For reports."""
        ...

    def rotate(self, rows: Tensor) -> Tensor:
        """``Uᵀ v`` for K rows v ``[K, D]``."""
        ...

    def back(self, rows: Tensor) -> Tensor:
        """``U v`` for K rows v ``[K, D]``."""
        ...

    def spread(self, rows: Tensor) -> Tensor:
        """``(U∘²) v`` for K rows v ``[K, D]``: eigenvalues to the diagonal."""
        ...

    @property
    def factors(self) -> tuple[Factor, Factor] | None:
        """``U_A, U_B`` where U is their Kronecker product."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that define it."""
        ...


@dataclass(frozen=True, eq=False)
class KroneckerBasis:
    """``blockdiag_h(U_B ⊗ U_A)``: eigenvectors of two factors, in columns.

    Attributes:
        A: ``[H, I, I]``; ``[H, I]`` of ones for the identity.
        B: ``[H, O, O]``; ``[H, O]`` of ones for the identity.
    """

    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        check_factors(self.tensors(), "KroneckerBasis")

    @cached_property
    def input_factor(self) -> Factor:
        """U_A."""
        return Factor.of(self.A)

    @cached_property
    def output_factor(self) -> Factor:
        """U_B."""
        return Factor.of(self.B)

    @property
    def factors(self) -> tuple[Factor, Factor]:
        """U_A and U_B."""
        return self.input_factor, self.output_factor

    @property
    def dim(self) -> int:
        """D = H·O·I."""
        return len(self.A) * self.A.shape[1] * self.B.shape[1]

    @property
    def size(self) -> str:
        """I x O, after the number of groups if there is more than one."""
        return size_text(self.input_factor, self.output_factor)

    def rotate(self, rows: Tensor) -> Tensor:
        """``U_Bᵀ W U_A`` for K rows W ``[K, D]``."""
        return sandwich(self.output_factor.mT, rows, self.input_factor.mT)

    def back(self, rows: Tensor) -> Tensor:
        """``U_B W U_Aᵀ`` for K rows W ``[K, D]``."""
        return sandwich(self.output_factor, rows, self.input_factor)

    def spread(self, rows: Tensor) -> Tensor:
        """``U_B∘² W (U_A∘²)ᵀ`` for K rows W ``[K, D]``."""
        return sandwich(self.output_factor.square(), rows, self.input_factor.square())

    def tensors(self) -> dict[str, Tensor]:
        """A and B."""
        return {"A": self.A, "B": self.B}


@dataclass(frozen=True, eq=False)
class DenseBasis:
    """Eigenvectors in the columns of one matrix.

    Attributes:
        U: ``[D, D]``.
    """

    U: Tensor
    factors = None

    @property
    def dim(self) -> int:
        """D."""
        return len(self.U)

    @property
    def size(self) -> str:
        """D x D."""
        return f"{self.dim}x{self.dim}"

    def rotate(self, rows: Tensor) -> Tensor:
        """``Uᵀ v`` for K rows v ``[K, D]``."""
        with full_precision(rows.device.type):
            return rows @ self.U

    def back(self, rows: Tensor) -> Tensor:
        """``U v`` for K rows v ``[K, D]``."""
        with full_precision(rows.device.type):
            return rows @ self.U.mT

    def spread(self, rows: Tensor) -> Tensor:
        """``(U∘²) v`` for K rows v ``[K, D]``."""
        with full_precision(rows.device.type):
            return rows @ self.U.square().mT

    def tensors(self) -> dict[str, Tensor]:
        """U."""
        return {"U": self.U}


@dataclass(frozen=True, eq=False, repr=False)
class Eigen(Spectral, kind="eigen"):
    """``U diag(values) Uᵀ``; with a `KroneckerBasis` and free eigenvalues this is EKFAC (George et al. 2018).

    Attributes:
        basis: U, shared by every function of this matrix.
        values: ``[D]``, nonnegative; canonical order ``[H, O, I]`` for a `KroneckerBasis`.
        name: what the matrix belongs to, for messages.
        definite: the values are positive by construction, so that none is mistaken for rounding noise.
        form: what `structure` says where this is the spectral form of something else.

    Example:
        >>> import torch
        >>> identity = torch.eye(2)[None]
        >>> ekfac = Eigen(KroneckerBasis(identity, identity), torch.tensor([1.0, 2.0, 3.0, 4.0]))
        >>> (ekfac + 1.0).solve(torch.ones(4))
        tensor([0.5000, 0.3333, 0.2500, 0.2000])
    """

    basis: Basis
    values: Tensor
    name: str = ""
    definite: bool = False
    form: str = ""

    def __post_init__(self) -> None:
        if self.values.shape != (self.basis.dim,):
            expected = f"{self.basis.dim} eigenvalues expected"
            raise DataError(f"{self.name or 'Eigen'}: {expected}, not {list(self.values.shape)}")

    @property
    def dim(self) -> int:
        """D."""
        return self.basis.dim

    @property
    def structure(self) -> str:
        """The form it came from, or its own."""
        label = "dense" if self.basis.factors is None else "eigenvalue-corrected"
        return self.form or f"{label} {self.basis.size}"

    def map(self, function: Callable[[Tensor], Tensor], *, definite: bool = False) -> Self:
        """``U f(S) Uᵀ``, sharing U."""
        return replace(self, values=function(self.values), definite=definite)

    def matvecs(self, rows: Tensor) -> Tensor:
        """``U S Uᵀ v`` for K rows v ``[K, D]``."""
        return self.basis.back(self.basis.rotate(rows) * self.values)

    def diagonal(self) -> Tensor:
        """``(U∘²) S``, ``[D]``."""
        return self.basis.spread(self.values[None])[0]

    @property
    def product_basis(self) -> tuple[Factor, Factor] | None:
        """Those of a `KroneckerBasis`."""
        return self.basis.factors

    def quadratic(self, samples: Gradients) -> Tensor:
        """From the squared gradients in a `KroneckerBasis`."""
        if self.product_basis is None:
            return super().quadratic(samples)
        A, B = (factor.tensor for factor in self.product_basis)
        squares = torch.stack([part.squares().double() for part in samples.rotate(A, B)]).sum(dim=0)
        return (squares.flatten() * self.values.double()).sum()

    def factored_damping(self, damping: float) -> Operator:
        """Corrected eigenvalues get what the product with their row and column sums would get."""
        if self.product_basis is None or self.form:
            return self.shifted(damping)
        A, B = self.product_basis
        values = self.values.reshape(A.groups, B.width, A.width)
        rows, columns = values.mean(2, keepdim=True).clamp_min(0), values.mean(1, keepdim=True).clamp_min(0)
        mean = rows.mean(1, keepdim=True)
        root = torch.where(mean > 0, damping / torch.where(mean > 0, mean, 1), 0).sqrt()  # balanced: a, b of one mean
        return replace(self.shifted(damping), values=(values + damping + root * (rows + columns)).flatten())

    def normalized(self, inputs: float | Tensor, outputs: float | Tensor) -> Operator:
        """Corrected eigenvalues get what the product with their row and column means would get."""
        if self.product_basis is None or self.form:
            return super().normalized(inputs, outputs)
        A, B = self.product_basis
        values = self.values.reshape(A.groups, B.width, A.width)
        mean = values.mean((1, 2), keepdim=True)
        values = values * torch.where(mean > 0, 1 / torch.where(mean > 0, mean, 1), 0)
        rows, columns = values.mean(2, keepdim=True).clamp_min(0), values.mean(1, keepdim=True).clamp_min(0)
        inputs, outputs = matching(inputs, values), matching(outputs, values)
        damped = values + inputs * rows + outputs * columns + inputs * outputs
        return replace(self, values=damped.flatten(), definite=True)

    def transposed(self, outputs: int, inputs: int) -> Operator:
        """The factors of a `KroneckerBasis` of one group change places."""
        if self.basis.factors is None or self.basis.factors[0].groups > 1:
            return super().transposed(outputs, inputs)
        A, B = self.basis.factors
        values = self.values.reshape(B.width, A.width).mT.flatten()
        basis = KroneckerBasis(B.tensor, A.tensor)
        return replace(self, basis=basis, values=values, form="")

    def merged(self, other: Operator) -> Operator | None:
        """Sums in one and the same basis are sums of eigenvalues."""
        if isinstance(other, Eigen) and other.basis is self.basis:
            return replace(self, values=self.values + other.values, definite=self.definite or other.definite)
        return None

    def tensors(self) -> dict[str, Tensor]:
        """The values and the basis."""
        return {"values": self.values, **{f"basis.{key}": t for key, t in self.basis.tensors().items()}}

    def settings(self) -> dict[str, Any]:
        """Name, definiteness and form."""
        return {"name": self.name, "definite": self.definite, "form": self.form}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], **settings: Any) -> Self:
        """The basis is told by its tensors."""
        if "basis.U" in tensors:
            basis = DenseBasis(tensors["basis.U"])
        else:
            basis = KroneckerBasis(tensors["basis.A"], tensors["basis.B"])
        return cls(basis, tensors["values"], **settings)
