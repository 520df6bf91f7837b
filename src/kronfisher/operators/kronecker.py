"""One Kronecker product per group: K-FAC, K-FOC and their kin."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kronfisher.errors import NumericalWarning, require
from kronfisher.linalg import negligible, stable_norm
from kronfisher.operators.algebra import matching, nonnegative
from kronfisher.operators.eigen import Eigen, KroneckerBasis
from kronfisher.operators.factors import (
    Factor,
    check_factors,
    cholesky_solve,
    outer,
    sandwich,
    separate,
    size_text,
    stack,
)
from kronfisher.operators.gradients import Gradients
from kronfisher.operators.operator import Operator

__all__ = ["Kronecker"]


@dataclass(frozen=True, eq=False, repr=False)
class Kronecker(Operator, kind="kronecker"):
    """``blockdiag_h(B_h ⊗ A_h)``: takes ``W [H, O, I]`` to ``B_h W_h A_h`` (both symmetric).

    Without damping it is inverted by the Cholesky factors of A and B; ``+ λ`` goes through their eigenvectors, found
    once for all λ.

    Attributes:
        A: the input factor ``[H, I, I]``, or its diagonal ``[H, I]``. One group still has the leading axis.
        B: the output factor ``[H, O, O]``, or its diagonal ``[H, O]``.
        name: what the matrix belongs to, for messages.
        definite: the factors are positive definite by construction (damped): no pivot is mistaken for rounding noise.

    Raises:
        DataError: the factors do not fit each other.

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
    def product(self) -> tuple[Factor, Factor]:
        """A and B."""
        return self.input_factor, self.output_factor

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

    def half_inverse(self, other: "Kronecker", *, outputs: bool) -> "Kronecker":
        """`inverse` of one factor alone, B if `outputs`; the second is that of another inverse."""
        factor = self.output_factor if outputs else self.input_factor
        label = f"{self.name or self.structure} ({'output' if outputs else 'input'} factor)"
        made = factor.cholesky(label, definite=self.definite).cholesky_inverse().tensor
        return replace(other, B=made) if outputs else replace(other, A=made)

    def spectral(self) -> Eigen:
        """Eigenvectors of both factors; the eigenvalues are all products of theirs."""
        return self._spectral

    def transposed(self, outputs: int, inputs: int) -> Operator:
        """The factors change places; for one group."""
        return replace(self, A=self.B, B=self.A) if len(self.A) == 1 else super().transposed(outputs, inputs)

    def merged(self, other: Operator) -> Operator | None:
        """Two terms of one form as a sum of products, where they are too large to be formed: it can be solved."""
        return None if self.is_small else self.beside(other)

    def beside(self, other: Operator) -> Operator | None:
        """Two terms of one form as a sum of products, of which the first leads; None if they are not of one form."""
        if other.product is None:
            return None
        pairs = tuple(zip(self.product, other.product, strict=True))
        if any((mine.groups, mine.width) != (theirs.groups, theirs.width) for mine, theirs in pairs):
            return None
        A, B = (stack(*factors) for factors in pairs)
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

    def quadratic(self, samples: Gradients) -> Tensor:
        """``Σ_k ⟨G_k, B G_k A⟩``, from the factors of the gradients."""
        A, B = self.input_factor.mT.tensor, self.output_factor.mT.tensor
        if self.input_factor.is_diagonal:
            (product,) = samples.rotate(A, B)
            return samples.inner(product)
        total = samples.gradients.new_zeros((), dtype=torch.float64)
        for plain, product in zip(samples.pieces(), samples.rotate(A, B), strict=True):
            total += plain.inner(product)
        return total

    def factored_damping(self, damping: float) -> "Kronecker":
        """``(B + √λ/π·1) ⊗ (A + π√λ·1)``, group by group.

        Warns:
            NumericalWarning: λ was raised to what does not drown in the rounding errors of A and B.
        """
        root_a, root_b = (factor.diagonal().mean(1).clamp_min(0).sqrt() for factor in self.product)
        nonzero = (root_a > 0) & (root_b > 0)  # a factor of zero trace is zero, and so is the product
        ratio = torch.where(nonzero, root_a, 1) / torch.where(nonzero, root_b, 1)
        root = self._root_of(damping, root_a * root_b)
        A = self.input_factor.scale(nonzero).shift(ratio * root)  # the shift alone where the product is zero
        B = self.output_factor.scale(nonzero).shift(root / ratio)
        return Kronecker(A.tensor, B.tensor, self.name, definite=True)

    def damped_by_shares(self, inputs: float | Tensor, outputs: float | Tensor, *, apart: bool = False) -> "Kronecker":
        """``(B_h + outputs·b̄·1) ⊗ (A_h + inputs·ā·1)``; reads no value.

        ā and b̄ are the mean eigenvalues over all groups, or of each `apart`.
        """
        means = self._means(apart)
        nonzero = (means[0] > 0) & (means[1] > 0)  # a factor of zero trace is zero, and so is the product
        A, B = (
            factor.shift(torch.where(nonzero, matching(share, mean) * mean, 1).expand(factor.groups))
            for factor, mean, share in zip(self.product, means, (inputs, outputs), strict=True)
        )
        return Kronecker(A.tensor, B.tensor, self.name, definite=True)

    def normalized(self, inputs: float | Tensor, outputs: float | Tensor, *, apart: bool = False) -> "Kronecker":
        """``(B_h / b̄ + outputs·1) ⊗ (A_h / ā + inputs·1)`` with means as `damped_by_shares` takes them."""
        damped = self.damped_by_shares(inputs, outputs, apart=apart)
        scales = [_reciprocal(mean).expand(len(self.A)) for mean in self._means(apart)]
        for tensor, scale in zip((damped.A, damped.B), scales, strict=True):
            tensor.mul_(scale.view(-1, *[1] * (tensor.dim() - 1)))  # in memory of its own
        return damped

    def _means(self, apart: bool) -> list[Tensor]:
        return [factor.diagonal().mean(1 if apart else (0, 1)) for factor in self.product]

    def _root_of(self, damping: float, mean_root: Tensor) -> Tensor:
        # √λ per group. The shift relative to the mean eigenvalue of its factor is √(λ / mean of X) for both alike.
        floor = negligible(self.dtype) * max(self.input_factor.width, self.output_factor.width) * mean_root
        root = torch.full_like(floor, damping**0.5)
        require(
            (root >= floor).all(),
            lambda: NumericalWarning(
                f"{self.name or self.structure}: λ = {damping:.1e} is too small for {self.dtype}; raised to "
                f"{float(floor.max()) ** 2:.1e}. Use a larger λ or float64."
            ),
        )
        return torch.maximum(root, floor)

    def relative_to(self, diagonal: Tensor) -> Operator:
        """A product again where the diagonal is one."""
        root = diagonal.sqrt().reshape(self.input_factor.groups, self.output_factor.width, self.input_factor.width)
        parts = separate(root)
        if parts is None:
            return super().relative_to(diagonal)
        outputs, inputs = parts
        A, B = self.input_factor.divide_by(inputs), self.output_factor.divide_by(outputs)
        return Kronecker(A.tensor, B.tensor, self.name)

    @cached_property
    def _lower(self) -> tuple[Factor, Factor]:
        label = self.name or self.structure
        lower_a = self.input_factor.cholesky(f"{label} (input factor)", definite=self.definite)
        return lower_a, self.output_factor.cholesky(f"{label} (output factor)", definite=self.definite)

    @cached_property
    def _spectral(self) -> Eigen:
        label = self.name or self.structure
        values_a, vectors_a = self.input_factor.eigh(f"{label} (input factor)")
        values_b, vectors_b = self.output_factor.eigh(f"{label} (output factor)")
        # Products of eigenvalues are as precise as the eigenvalues: each factor is judged by its own largest.
        definite = self.definite or all(
            bool((values.amin(1) > negligible(self.dtype) * values.amax(1)).all()) for values in (values_a, values_b)
        )
        basis = KroneckerBasis(vectors_a.tensor, vectors_b.tensor)
        return Eigen(basis, outer(values_b, values_a), self.name, definite=definite, form=self.structure)


def _reciprocal(mean: Tensor) -> Tensor:
    """``1 / mean``, and 1 for a mean of zero."""
    return 1 / torch.where(mean > 0, mean, 1)
