"""Two Kronecker products, diagonalised together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from kronfisher.errors import DataError, IndefiniteError, SingularError
from kronfisher.linalg import eigh, full_precision, negligible, singular_message
from kronfisher.operators.algebra import nonnegative
from kronfisher.operators.diagonal import Diagonal
from kronfisher.operators.factors import DenseFactor, Factor, outer, sandwich
from kronfisher.operators.operator import Operator
from kronfisher.operators.sum import Sum

__all__ = ["Pair"]


@dataclass(frozen=True, eq=False, repr=False)
class Pair(Operator, kind="pair"):
    """``X = K diag(values) Kᴴ`` with ``K = blockdiag_h(L_B U_B ⊗ L_A U_A)``: invertible L, unitary U.

    With ``A₁ = L_A L_Aᵀ``, ``L_A⁻¹ A₂ L_A⁻ᵀ = U_A s_A U_Aᴴ`` and the same for B, this is
    ``B₁ ⊗ A₁ + B₂ ⊗ A₂`` for ``values = 1 + s_B s_Aᵀ``; antisymmetric A₂ and B₂ have imaginary eigenvalues, and
    complex U. The values are eigenvalues *relative to the first term*: those of X in coordinates where the first term
    is the identity. X is positive definite exactly if all of them are positive. `clamped` and `absolute` act on them,
    so they change X in those coordinates; for the same in the parameters' own, take ``X.spectral()`` first.

    Attributes:
        A: L_A ``[H, I, I]``, or its diagonal ``[H, I]``.
        B: L_B ``[H, O, O]``, or its diagonal ``[H, O]``.
        UA: ``[H, I, I]``, real or complex; ``[H, I]`` of ones for the identity.
        UB: ``[H, O, O]``, likewise.
        values: ``[D]`` in the canonical order ``[H, O, I]``.
        name: what the matrix belongs to, for messages.
        definite: the values are positive by construction, so that none is mistaken for rounding noise.
        form: what `structure` says.

    Example:
        >>> one, two = torch.eye(2)[None], torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
        >>> X = Pair.of((two, one), (one, one))  # pairs (A, B)
        >>> X.to_dense()[:2, :2]
        tensor([[3., 1.],
                [1., 3.]])
        >>> X.solve(X @ torch.ones(4)).round(decimals=4)
        tensor([1., 1., 1., 1.])
    """

    remedy = "use what a pair gives: solve, inverse, logdet and samples."
    A: Tensor
    B: Tensor
    UA: Tensor
    UB: Tensor
    values: Tensor
    name: str = ""
    definite: bool = False
    form: str = "pair"

    @classmethod
    def of(
        cls,
        first: tuple[Tensor, Tensor],
        second: tuple[Tensor, Tensor],
        *,
        antisymmetric: bool = False,
        name: str = "",
        definite: bool = False,
        form: str = "pair",
    ) -> Self:
        """``B₁ ⊗ A₁ + B₂ ⊗ A₂`` from the pairs (A₁, B₁) and (A₂, B₂) of factors.

        Args:
            first: positive definite.
            second: both symmetric or both antisymmetric.
            antisymmetric: which of the two.
            name: for messages.
            definite: `first` is positive definite by construction.
            form: for reports.

        Raises:
            SingularError: a factor of the first product is numerically singular.
        """
        (A, UA, low_a), (B, UB, low_b) = (
            _diagonalise(
                Factor.of(one),
                Factor.of(two),
                antisymmetric,
                f"{name or form} ({side} factor of the first term)",
                definite,
            )
            for one, two, side in zip(first, second, ("input", "output"), strict=True)
        )
        product = outer(low_b, low_a)
        return cls(
            A.tensor, B.tensor, UA.tensor, UB.tensor, 1 - product if antisymmetric else 1 + product, name, form=form
        )

    @property
    def dim(self) -> int:
        """D = H·O·I."""
        return len(self.A) * self.A.shape[1] * self.B.shape[1]

    @property
    def structure(self) -> str:
        """The form."""
        return self.form

    @property
    def semidefinite(self) -> bool:
        """From the values."""
        return self.definite or self._extremes[0] >= 0

    def matvecs(self, rows: Tensor) -> Tensor:
        """``K diag(values) Kᴴ v`` for K rows v ``[K, D]``."""
        return self._back(self._turned(rows) * self.values)

    def solves(self, rows: Tensor) -> Tensor:
        """``K⁻ᴴ diag(1/values) K⁻¹ v`` for K rows v ``[K, D]``."""
        return self._inverse.matvecs(rows)

    def colour(self, noise: Tensor, *, inverse: bool = True) -> Tensor:
        """``L U diag(√values) Uᴴ`` times the noise, which is real, has the covariance ``X``."""
        if inverse:
            return self._inverse.colour(noise, inverse=False)
        roots = self._rooted().values.sqrt()
        turned = sandwich(Factor.of(self.UB).mH, noise.to(self.UB.dtype), Factor.of(self.UA).mH)
        return self._back(turned * roots)

    def inverse(self) -> "Pair":
        """A pair with the transposed inverses of L and the same U."""
        return self._inverse

    def logdet(self) -> Tensor:
        """``Σ log values + 2 Σ_h (O log|L_A| + I log|L_B|)``."""
        self.checked()
        inputs, outputs = self.A.shape[1], self.B.shape[1]
        return (
            self.values.log().sum()
            + 2 * (outputs * Factor.of(self.A).logabsdet() + inputs * Factor.of(self.B).logabsdet()).sum()
        )

    def checked(self) -> Self:
        """Itself, if it is positive definite.

        Raises:
            IndefiniteError: a value is negative, by more than rounding explains.
            SingularError: a value is numerically zero.
        """
        low, high = self._extremes
        if low <= 0 or not (self.definite or low > negligible(self.dtype) * high):
            self._rooted()
            raise SingularError(singular_message(self.name or self.form, self._mean, self.dtype))
        return self

    def shifted(self, damping: float) -> Operator:
        """``X + λ·1``: through the spectrum of a small matrix, else as a lazy sum."""
        shift = nonnegative(damping, "the damping λ")
        if shift == 0 or self.is_small:
            return super().shifted(shift)
        return Sum.from_terms((self, Diagonal(torch.full_like(self.values, shift), self.name, definite=True)))

    def clamped(self, floor: float = 0.0) -> "Pair":
        """The values, which are relative to the first term, raised to at least `floor`."""
        floor = nonnegative(floor, "the floor")
        if self._extremes[0] >= floor:
            return self
        return self._change(lambda values: values.clamp_min(floor), f"clamped at {floor:g}", floor > 0)

    def absolute(self) -> "Pair":
        """The absolute values of the values, which are relative to the first term."""
        return self if self.semidefinite else self._change(torch.abs, "absolute", False)

    def scaled(self, factor: float) -> "Pair":
        """The factor goes into the values."""
        factor = nonnegative(factor, "the factor")
        return replace(self, values=self.values * factor, definite=self.definite and factor > 0)

    def trace(self) -> Tensor:
        """The sum of the diagonal."""
        return self.diagonal().sum()

    def diagonal(self) -> Tensor:
        """``|K|∘² values``, ``[D]``."""
        left, right = (side.square() for side in self._basis)
        return sandwich(left, self.values[None], right)[0]

    def frobenius_norm(self) -> Tensor:
        """``valuesᵀ |KᴴK|∘² values``, at unit scale so that nothing overflows."""
        scale = torch.stack([side.tensor.abs().amax() for side in self._basis]).prod() * self.values.abs().amax().sqrt()
        if not bool(scale > 0):
            return scale
        left, right = (Factor.of(side.tensor / side.tensor.abs().amax()) for side in self._basis)
        values = self.values / self.values.abs().amax()
        grams = [(side.mH @ side).square() for side in (left, right)]
        inner = (values * sandwich(grams[0], values[None], grams[1])[0]).sum()
        return inner.clamp_min(0).sqrt() * scale * scale

    def tensors(self) -> dict[str, Tensor]:
        """L, U (complex ones as pairs of real numbers in a last axis) and the values."""
        U = {"UA": self.UA, "UB": self.UB}
        real = {key: torch.view_as_real(side) if side.is_complex() else side for key, side in U.items()}
        return {"values": self.values, "A": self.A, "B": self.B, **real}

    def settings(self) -> dict[str, Any]:
        """Name, definiteness and form."""
        return {"name": self.name, "definite": self.definite, "form": self.form, "unitary": self.UA.is_complex()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], **settings: Any) -> Self:
        """From L, U and the values."""
        UA, UB = tensors["UA"], tensors["UB"]
        if settings.pop("unitary"):
            UA, UB = torch.view_as_complex(UA.contiguous()), torch.view_as_complex(UB.contiguous())
        return cls(tensors["A"], tensors["B"], UA, UB, tensors["values"], **settings)

    def _change(self, function: Callable[[Tensor], Tensor], how: str, definite: bool) -> "Pair":
        values = function(self.values)
        return replace(self, values=values, definite=definite, form=f"{self.form}, {how}")

    def _turned(self, rows: Tensor) -> Tensor:
        left, right = self._basis
        return sandwich(left.mH, rows.to(left.tensor.dtype), right.mH)

    def _back(self, rows: Tensor) -> Tensor:
        left, right = self._basis
        result = sandwich(left, rows, right)
        return result.real.contiguous() if result.is_complex() else result

    def _rooted(self) -> "Pair":
        # with negative rounding noise set to zero; IndefiniteError if there is more than that
        low, high = self._extremes
        if low >= 0:
            return self
        if low < -negligible(self.dtype) * max(high, -low):
            raise IndefiniteError(
                f"{self.name or self.form} is indefinite: relative to its first term its eigenvalues go from {low:.3g} "
                f"to {high:.3g}. Damp it, choose a fit whose terms are all positive semidefinite, or change its "
                "spectrum explicitly: .clamped(floor) raises small eigenvalues, .absolute() takes their size."
            )
        return replace(self, values=self.values.clamp_min(0))

    @property
    def _mean(self) -> float:
        return float(self.trace()) / self.dim

    @cached_property
    def _extremes(self) -> tuple[float, float]:
        low, high = torch.stack(torch.aminmax(self.values)).tolist()
        return low, high

    @cached_property
    def _basis(self) -> tuple[Factor, Factor]:
        return Factor.of(self.B) @ Factor.of(self.UB), Factor.of(self.A) @ Factor.of(self.UA)

    @cached_property
    def _inverse(self) -> "Pair":
        self.checked()
        A, B = (Factor.of(side).inverse_transpose().tensor for side in (self.A, self.B))
        return replace(self, A=A, B=B, values=self.values.reciprocal(), definite=True)


def _diagonalise(
    first: Factor, second: Factor, antisymmetric: bool, name: str, definite: bool
) -> tuple[Factor, Factor, Tensor]:
    # L with first = L Lᵀ; U and s with L⁻¹ second L⁻ᵀ = U s Uᴴ, or -i U s Uᴴ if it is antisymmetric
    if first.is_diagonal and not second.is_diagonal:
        first = DenseFactor(first.dense())
    lower = first.cholesky(name, definite=definite)
    if first.is_diagonal:
        if antisymmetric:
            raise DataError(f"{name}: a diagonal factor is not antisymmetric")
        return lower, Factor.of(torch.ones_like(second.tensor)), second.tensor / first.tensor
    with full_precision(lower.tensor.device.type):
        half = torch.linalg.solve_triangular(lower.tensor, second.dense(), upper=False)
        white = torch.linalg.solve_triangular(lower.tensor, half.mT.contiguous(), upper=False).mT
    if antisymmetric:
        white = torch.complex(torch.zeros_like(white), (white - white.mT) / 2)
    values, vectors = eigh(white, name, semidefinite=False)
    return lower, DenseFactor(vectors), values
