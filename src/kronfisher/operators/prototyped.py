"""A few Kronecker-structured directions with curvature of their own, and eigenvalues in a basis for the rest."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from kronfisher.errors import DataError
from kronfisher.linalg import WORKSPACE, cholesky, chunks, full_precision, negligible
from kronfisher.operators.algebra import nonnegative
from kronfisher.operators.eigen import Eigen, KroneckerBasis
from kronfisher.operators.inverse import Inverse
from kronfisher.operators.operator import Operator
from kronfisher.operators.spectral import warn_if_lost

__all__ = ["Prototyped"]


@dataclass(frozen=True, eq=False, repr=False)
class Prototyped(Operator, kind="prototyped"):
    """``blockdiag_h(U (diag(s) + Σ_c w_c z_c z_cᵀ) Uᵀ)`` with ``z_c = b_c ⊗ a_c`` and ``U = U_B ⊗ U_A``.

    With ``Z [D, m]`` the prototypes of a group and ``M = 1 + W^{1/2} Zᵀ diag(1/s) Z W^{1/2}`` everything follows from
    Woodbury's identity: ``X⁻¹ = diag(1/s) − diag(1/s) Z W^{1/2} M⁻¹ W^{1/2} Zᵀ diag(1/s)``, ``log|X| = Σ log s +
    log|M|``. λ goes into s. M takes ``m² D`` multiplications and is kept; neither Z nor X is ever held. Where the
    matrix itself is wanted (eigenvalues, roots), it is formed if it is small.

    Attributes:
        rest: ``U diag(s) Uᵀ``, s of at least 0.
        A: the prototypes' input factors ``[H, m, I]``, in the coordinates of U_A.
        B: their output factors ``[H, m, O]``, in the coordinates of U_B.
        weights: w ``[H, m]``, of at least 0.

    Raises:
        DataError: the sizes do not fit.

    Example:
        >>> identity = torch.eye(2)[None]
        >>> rest = Eigen(KroneckerBasis(identity, identity), torch.ones(4))
        >>> X = Prototyped(rest, torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 0.0]]]), torch.tensor([[3.0]]))
        >>> X.solve(torch.ones(4))
        tensor([0.2500, 1.0000, 1.0000, 1.0000])
    """

    determined = True
    remedy = "use what works at any size: solve, inverse, logdet, samples, trace, norm."
    rest: Eigen
    A: Tensor
    B: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        basis = self.rest.basis
        if not isinstance(basis, KroneckerBasis):
            raise DataError(f"{self.name or 'Prototyped'}: the rest needs a Kronecker basis")
        shapes = [(len(basis.A), self.weights.shape[-1], factor.width) for factor in basis.factors]
        if (
            [tuple(self.A.shape), tuple(self.B.shape)] != shapes
            or self.weights.shape != self.A.shape[:2]
            or not shapes[0][1]
        ):
            raise DataError(
                f"{self.name or 'Prototyped'}: prototypes {list(self.A.shape)} and {list(self.B.shape)} with weights "
                f"{list(self.weights.shape)} do not fit a basis of {basis.size}"
            )

    @property
    def name(self) -> str:
        """Of the rest, for messages."""
        return self.rest.name

    @property
    def dim(self) -> int:
        """D = H·O·I."""
        return self.rest.dim

    @property
    def structure(self) -> str:
        """Prototypes of each group, and the size of the basis."""
        return f"{self.weights.shape[1]} prototypes + eigenvalue-corrected {self.rest.basis.size}"

    # Products ---------------------------------------------------------------------------------------------------------

    def matvecs(self, rows: Tensor) -> Tensor:
        """``U (s + Z W Zᵀ) Uᵀ v`` for K rows v ``[K, D]``."""
        rotated = self.rest.basis.rotate(rows)
        product = rotated * self.rest.values + self._spread(self._along(rotated) * self.weights)
        return self.rest.basis.back(product)

    def solves(self, rows: Tensor) -> Tensor:
        """``X⁻¹ v`` by Woodbury's identity, for K rows ``[K, D]``."""
        s = self.rest.checked().values
        direct = self.rest.basis.rotate(rows) / s
        root = self.weights.sqrt()
        along = (self._along(direct) * root).permute(1, 2, 0)  # [H, m, K]
        inner = torch.cholesky_solve(along, self._factor).permute(2, 0, 1) * root
        return self.rest.basis.back(direct - self._spread(inner) / s)

    def inverse(self) -> Operator:
        """``X⁻¹``, which solves where it multiplies."""
        _ = self._factor  # what is singular is refused now
        return Inverse(self)

    def inverse_diagonal(self) -> Tensor:
        """``diag(X⁻¹)`` ``[D]``."""
        s = self.rest.checked().values
        diagonal = self.rest.basis.spread((1 / s)[None])[0]
        root = self.weights.sqrt()
        eye = torch.eye(self.weights.shape[1], dtype=self.dtype, device=self.device).expand(len(root), -1, -1)
        half = torch.linalg.solve_triangular(self._factor, eye, upper=False) * root[:, None]  # rows: Y's columns
        for low, high in chunks(half.shape[1], 4 * self.dim * s.element_size()):
            columns = self._spread(half[:, low:high].transpose(0, 1)) / s
            diagonal = diagonal - self.rest.basis.back(columns).square().sum(0)
        return diagonal

    def inverse_trace(self) -> Tensor:
        """``tr X⁻¹``: ``Σ 1/s − tr M⁻¹ W^{1/2} Zᵀ diag(1/s²) Z W^{1/2}``."""
        s = self.rest.checked().values
        root = self.weights.sqrt()
        squares = root[:, :, None] * self._gram(s.square().reciprocal()) * root[:, None]
        inner = torch.cholesky_solve(squares, self._factor)
        return (1 / s).sum() - inner.diagonal(dim1=1, dim2=2).sum()

    def noise_dim(self, *, inverse: bool = True) -> int:
        """D, and one number for every prototype."""
        return self.dim + self.weights.numel()

    def colour(self, noise: Tensor, *, inverse: bool = True) -> Tensor:
        """Rest and prototypes are drawn apart; ``X⁻¹`` times a draw from ``N(0, X)`` is one from ``N(0, X⁻¹)``."""
        own = noise[:, : self.dim] * self.rest.values.sqrt()
        drawn = noise[:, self.dim :].reshape(len(noise), *self.weights.shape) * self.weights.sqrt()
        draws = self.rest.basis.back(own + self._spread(drawn))
        return self.solves(draws) if inverse else draws

    def logdet(self) -> Tensor:
        """``Σ log s + log|M|``."""
        return self.rest.logdet() + 2 * self._factor.diagonal(dim1=1, dim2=2).log().sum()

    def shifted(self, damping: float) -> "Prototyped":
        """``X + λ·1``: into the eigenvalues of the rest."""
        shift = nonnegative(damping, "the damping λ")
        if shift == 0:
            return self
        high = max(self.rest.extremes[1], self._heaviest)
        warn_if_lost(self, shift, high)
        low = self.rest.extremes[0] + shift
        result = replace(self, rest=self.rest.map(lambda values: values + shift, definite=low > 0))
        vars(result)["_heaviest"] = self._heaviest
        return result

    def scaled(self, factor: float) -> "Prototyped":
        """The factor goes into s and w."""
        factor = nonnegative(factor, "the factor")
        return replace(self, rest=self.rest.scaled(factor), weights=self.weights * factor)

    def trace(self) -> Tensor:
        """``Σ s + Σ_c w_c ‖a_c‖² ‖b_c‖²``."""
        return self.rest.trace() + (self.weights * self._lengths).sum()

    def diagonal(self) -> Tensor:
        """``(U∘²) s + Σ_c w_c (U z_c)∘²``, ``[D]``."""
        basis = self.rest.basis
        assert isinstance(basis, KroneckerBasis)
        with full_precision(self.device.type):
            a, b = basis.input_factor.right(self.A).square(), basis.output_factor.right(self.B).square()
            return self.rest.diagonal() + ((b * self.weights[..., None]).mT @ a).flatten()

    def frobenius_norm(self) -> Tensor:
        """``‖X‖² = Σ s² + 2 Σ_c w_c z_cᵀ diag(s) z_c + Σ_{c,d} w_c w_d (z_c·z_d)²``, in float64."""
        scale = torch.maximum(self.rest.values.amax(), self.weights.amax()).double()
        if not bool(scale > 0):
            return scale.to(self.dtype)
        s, w = self.rest.values.double() / scale, self.weights.double() / scale
        a, b = self.A.double(), self.B.double()
        squares = torch.einsum("hmo,hoi,hmi->hm", b.square(), s.reshape(len(a), b.shape[2], -1), a.square())
        grams = ((a @ a.mT) * (b @ b.mT)).square()
        total = s.square().sum() + 2 * (w * squares).sum() + torch.einsum("hm,hmn,hn->", w, grams, w)
        return (total.sqrt() * scale).to(self.dtype)

    def nullity(self) -> int:
        """Of the coordinates where s is zero, those that the prototypes do not reach."""
        s, groups = self.rest.values.double().reshape(len(self.A), -1), range(len(self.A))
        scale = max(self.rest.extremes[1], self._heaviest)
        empty = s <= negligible(self.dtype) * scale
        gram = self._gram(empty.to(self.A)).double() * self.weights.double().sqrt()[:, :, None]
        values = torch.linalg.eigvalsh(gram * self.weights.double().sqrt()[:, None])
        reached = (values > negligible(self.dtype) * scale).sum(1)
        return int(sum((empty[h].sum() - reached[h]).clamp_min(0) for h in groups))

    def transposed(self, outputs: int, inputs: int) -> Operator:
        """The factors change places; for one group."""
        return replace(self, rest=self.rest.transposed(outputs, inputs), A=self.B, B=self.A)

    def tensors(self) -> dict[str, Tensor]:
        """Those of the rest, A, B and the weights."""
        return {**self.rest.tensors(), "A": self.A, "B": self.B, "weights": self.weights}

    def settings(self) -> dict[str, Any]:
        """Those of the rest."""
        return self.rest.settings()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], **settings: Any) -> Self:
        """The rest is told by its own tensors."""
        return cls(Eigen.from_tensors(tensors, **settings), tensors["A"], tensors["B"], tensors["weights"])

    # Inside -----------------------------------------------------------------------------------------------------------

    @property
    def _lengths(self) -> Tensor:
        return self.A.square().sum(2) * self.B.square().sum(2)

    @cached_property
    def _heaviest(self) -> float:
        """The largest curvature of a prototype by itself: about the largest eigenvalue, and at most it."""
        return (self.weights * self._lengths).amax().item()

    @cached_property
    def _factor(self) -> Tensor:
        """L with ``M = L Lᵀ``, ``[H, m, m]``; SingularError where s has zeros."""
        root = self.weights.sqrt()
        inner = root[:, :, None] * self._gram(self.rest.checked().values.reciprocal()) * root[:, None]
        inner.diagonal(dim1=1, dim2=2).add_(1)
        return cholesky(inner, self.name or self.structure)

    def _gram(self, values: Tensor) -> Tensor:
        """``Zᵀ diag(values) Z``, ``[H, m, m]``, a few outputs at a time."""
        groups, number, inputs = self.A.shape
        values = values.reshape(groups, -1, 1, inputs)
        total = self.A.new_zeros(groups, number, number)
        size = 3 * groups * number * inputs * self.A.element_size()
        with full_precision(self.device.type):
            for low, high in chunks(self.B.shape[2], size, WORKSPACE):
                Z = self.B[:, :, low:high, None] * self.A[:, :, None]  # [H, m, o, I]
                total += (Z * values[:, low:high].transpose(1, 2)).flatten(2) @ Z.flatten(2).mT
        return total

    def _along(self, rows: Tensor) -> Tensor:
        """``Zᵀ v`` for K rows: ``[K, H, m]``."""
        parts = []
        for part in self._parts(rows):
            W = part.reshape(len(part), len(self.A), self.B.shape[2], self.A.shape[2])
            with full_precision(self.device.type):
                parts.append(((self.B @ W) * self.A).sum(3))
        return torch.cat(parts)

    def _spread(self, weights: Tensor) -> Tensor:
        """``Z y`` for K rows y ``[K, H, m]``: ``[K, D]``."""
        parts = []
        for part in self._parts(weights):
            with full_precision(self.device.type):
                parts.append((self.B.mT @ (part[..., None] * self.A)).flatten(1))
        return torch.cat(parts)

    def _parts(self, rows: Tensor) -> Iterator[Tensor]:
        size = 3 * self.A.numel() * self.A.element_size()
        if not len(rows):
            yield rows
        for low, high in chunks(len(rows), size, WORKSPACE):
            yield rows[low:high]
