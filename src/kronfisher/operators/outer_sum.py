"""A sum of outer products of few vectors, plus λ: the exact Fisher matrix of few samples or of few weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from kronfisher.errors import NumericalError, SingularError
from kronfisher.linalg import cholesky, full_precision, negligible, singular_message
from kronfisher.operators.algebra import nonnegative
from kronfisher.operators.inverse import Inverse
from kronfisher.operators.operator import Operator
from kronfisher.operators.rows import Directions, Rows

__all__ = ["OuterSum"]


@dataclass(frozen=True, eq=False, repr=False)
class OuterSum(Operator, kind="outer-sum"):
    """``X = s·JᵀJ + λ`` with J ``[K, D]``, everything through the smaller of ``J Jᵀ`` and ``Jᵀ J``.

    With ``K₀ = J Jᵀ``: ``X⁻¹ = (1 − Jᵀ (λ/s + K₀)⁻¹ J)/λ`` and ``log|X| = D log λ + log|1 + s K₀/λ|`` (Woodbury); its
    eigenvalues are those of ``s K₀ + λ``, and λ. Where λ is so small that the squares in K₀ hide it (below √ε of the
    trace), the singular vectors of J itself serve, which are written out.

    Attributes:
        rows: J.
        scale: s, of at least 0.
        damping: λ, of at least 0.
        name: what the matrix belongs to, for messages.

    Example:
        >>> from kronfisher.operators.rows import PlainRows
        >>> X = OuterSum(Rows((PlainRows(torch.tensor([[1.0, 1.0]])),)), scale=2.0) + 1.0
        >>> X.solve(torch.tensor([5.0, 0.0])).round(decimals=4), X.eigenvalues()
        (tensor([ 3., -2.]), tensor([5., 1.]))
    """

    determined = True
    spans_layers = True
    remedy = "use what works at any size: solve, inverse, logdet, samples, trace, norm, eigenvalues."
    rows: Rows
    scale: float = 1.0
    damping: float = 0.0
    name: str = ""

    @property
    def dim(self) -> int:
        """D."""
        return self.rows.dim

    @property
    def structure(self) -> str:
        """Rows and columns of J."""
        return f"{len(self.rows)} samples x {self.dim}"

    # Products and solutions -------------------------------------------------------------------------------------------

    def matvecs(self, rows: Tensor) -> Tensor:
        """``s Jᵀ(J v) + λ v`` for M rows v ``[M, D]``."""
        return self.scale * self.rows.back(self.rows.along(rows)) + self.damping * rows

    def solves(self, rows: Tensor) -> Tensor:
        """``X⁻¹ v`` by Woodbury's identity, by the Cholesky factor of X, or by singular vectors; ``[M, D]``."""
        if self._squares_hide_damping:
            return self._map(rows, torch.reciprocal)
        with full_precision(rows.device.type):
            if not self.rows.wide:
                return torch.cholesky_solve(rows.mT, self._factor).mT
            inner = torch.cholesky_solve(self.rows.along(rows).mT, self._factor).mT
            return (rows - self.scale * self.rows.back(inner)) / self.damping

    def inverse(self) -> Operator:
        """``X⁻¹``, which solves where it multiplies."""
        self._require_regular()
        return Inverse(self)

    def inverse_diagonal(self) -> Tensor:
        """``diag(X⁻¹)`` ``[D]``."""
        values, rest = self._eigen
        diagonal = self._regular.squares(1 / values - rest)
        return diagonal + rest

    def inverse_trace(self) -> Tensor:
        """``tr X⁻¹``."""
        values, rest = self._eigen
        return (1 / values).sum() + (self.dim - len(values)) * rest

    def logdet(self) -> Tensor:
        """``D log λ + log|1 + s K₀/λ|``, or from the Cholesky factor or the singular values."""
        if self._squares_hide_damping:
            values, _ = self._eigen
            outside = self.dim - len(values)
            return values.log().sum() + (outside * math.log(self.damping) if outside else 0)
        own = 2 * self._factor.diagonal().log().sum()
        return own + (self.dim - len(self.rows)) * math.log(self.damping) if self.rows.wide else own

    def colour(self, noise: Tensor, *, inverse: bool = True) -> Tensor:
        """``X^{±1/2}`` times white noise, by the eigenvectors."""
        return self._map(noise, torch.rsqrt if inverse else torch.sqrt, inverse=inverse)

    # Numbers ----------------------------------------------------------------------------------------------------------

    def eigenvalues(self) -> Tensor:
        """Those of the smaller side, and λ; descending."""
        values = (self.scale * self._directions.values + self.damping).sort(descending=True).values
        return torch.cat([values, values.new_full((self.dim - len(values),), self.damping)])

    def eigenvectors(self) -> Tensor:
        """``[D, r]``: those that belong to the first r of the `eigenvalues`, which J spans."""
        found = self._directions
        order = found.values.argsort(descending=True)
        unit = torch.eye(len(order), dtype=found.values.dtype, device=found.values.device)
        return found.back(unit[order]).mT

    def trace(self) -> Tensor:
        """``s Σ_k ‖J_k‖² + D λ``."""
        return self.scale * self.rows.lengths().sum() + self.dim * self.damping

    def diagonal(self) -> Tensor:
        """``s Σ_k J_k∘² + λ``, ``[D]``."""
        return self.scale * self.rows.squares() + self.damping

    def frobenius_norm(self) -> Tensor:
        """``‖X‖² = s²‖K₀‖² + 2 λ s tr K₀ + D λ²``, in float64."""
        side = self.rows.small.double() * self.scale
        largest = side.abs().amax().clamp_min(max(self.damping, torch.finfo(torch.float64).tiny))
        side, shift = side / largest, self.damping / largest
        total = side.square().sum() + 2 * shift * side.trace() + self.dim * shift**2
        return (total.sqrt() * largest).to(self.dtype)

    # Other matrices ---------------------------------------------------------------------------------------------------

    def shifted(self, damping: float) -> "OuterSum":
        """``X + λ·1``.

        Raises:
            NumericalError: λ is below the rounding error of J's own singular values, which are the square roots.
        """
        shift = nonnegative(damping, "the damping λ")
        if shift == 0:
            return self
        high = self._bound
        if shift < negligible(self.dtype) ** 2 * high:
            raise NumericalError(
                f"{self.name or self.structure}: λ = {shift:.1e} is hidden by rounding even in the singular values of "
                f"the rows (the eigenvalues add up to {high:.1e}); use λ of at least "
                f"{negligible(self.dtype) ** 2 * high:.1e}, or float64."
            )
        return replace(self, damping=self.damping + shift)

    def scaled(self, factor: float) -> "OuterSum":
        """The factor goes into s and λ."""
        factor = nonnegative(factor, "the factor")
        return replace(self, scale=self.scale * factor, damping=self.damping * factor)

    def relative_to(self, diagonal: Tensor) -> Operator:
        """``P^{-1/2} X P^{-1/2}``, with the columns of J divided by √P."""
        if self.damping:
            return super().relative_to(diagonal)
        return replace(self, rows=self.rows.scaled_columns(diagonal.rsqrt()))

    def tensors(self) -> dict[str, Tensor]:
        """Those of the rows."""
        return self.rows.tensors()

    def settings(self) -> dict[str, Any]:
        """s, λ and the name."""
        return {"scale": self.scale, "damping": self.damping, "name": self.name}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], **settings: Any) -> Self:
        """From those of the rows."""
        return cls(Rows.from_tensors(tensors), **settings)

    # Inside -----------------------------------------------------------------------------------------------------------

    @cached_property
    def _bound(self) -> float:
        """At least the largest eigenvalue of ``s JᵀJ``."""
        return self.scale * self.rows.lengths().sum().item()

    @property
    def _squares_hide_damping(self) -> bool:
        return self.damping < torch.finfo(self.dtype).eps ** 0.5 * self._bound

    @property
    def _directions(self) -> Directions:
        return self.rows.singular if self.damping > 0 and self._squares_hide_damping else self.rows.directions

    @property
    def _eigen(self) -> tuple[Tensor, float]:
        """Eigenvalues of X along directions of J, and the reciprocal of the rest, if any; SingularError at zeros."""
        self._require_regular()
        values = self.scale * self._regular.values + self.damping
        return values, 1 / self.damping if len(values) < self.dim else 0.0

    @property
    def _regular(self) -> Directions:
        return self.rows.singular if self._squares_hide_damping else self.rows.directions

    def _require_regular(self) -> None:
        if self.damping:
            return
        values = self.rows.singular.values
        if len(values) < self.dim or bool(values.amin() <= negligible(self.dtype) * values.amax()):
            mean = self._bound / max(self.dim, 1)
            raise SingularError(singular_message(self.name or self.structure, mean, self.dtype))

    def _map(self, vectors: Tensor, function: Any, *, inverse: bool = True) -> Tensor:
        """A function of X times M vectors: of its eigenvalues along the directions of J, and of λ beside them."""
        if inverse:
            self._require_regular()
        found = self._regular if inverse else self._directions
        with full_precision(vectors.device.type):
            inside = found.along(vectors)
            values = function(self.scale * found.values + self.damping)
            if len(values) == self.dim:
                return found.back(inside * values)
            rest = float(function(torch.tensor(self.damping, dtype=torch.float64)))
            if found.vectors is None:
                return rest * vectors + found.back(inside * (values - rest))
            outside = vectors - found.back(inside)
            outside = outside - found.back(found.along(outside))  # once more, for what rounding left inside
            return found.back(inside * values) + rest * outside

    @cached_property
    def _factor(self) -> Tensor:
        """L with ``L Lᵀ = s K₀ + λ`` or ``s JᵀJ + λ``."""
        with full_precision(self.device.type):
            side = self.rows.small * self.scale
            side.diagonal().add_(self.damping)
            return cholesky(side, self.name or self.structure)
