"""Sums of Kronecker products: some terms per group, and perhaps a multiple of the identity."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from kronfisher.errors import DataError
from kronfisher.linalg import negligible
from kronfisher.operators.algebra import nonnegative
from kronfisher.operators.cg import Iterative, conjugate_gradients
from kronfisher.operators.factors import Factor, check_factors, size_text
from kronfisher.operators.gradients import Gradients
from kronfisher.operators.kronecker import Kronecker
from kronfisher.operators.operator import Operator
from kronfisher.operators.pair import Pair
from kronfisher.operators.spectral import Spectral, warn_if_lost

__all__ = ["KroneckerSum"]


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerSum(Iterative, Operator, kind="kronecker-sum"):
    """``blockdiag_h(Σ_r B_rh ⊗ A_rh) + λ·1``: takes ``W [H, O, I]`` to ``Σ_r B_r W A_rᵀ + λ W``.

    The first term leads: it is positive semidefinite, the others are corrections and may be anything symmetric, so that
    the sum may be indefinite. Then what needs a positive definite matrix raises `IndefiniteError`.

    At most two terms without λ are solved, inverted and sampled exactly at any size, by diagonalising both together
    (`Pair`); this needs a positive definite first term. Everything else is solved by conjugate gradients on the exact
    matrix, preconditioned with the exactly damped first term; `convergence` says how that went. What has no structure
    (determinant, roots, eigenvalues) forms the matrix if it is small.

    Attributes:
        A: the input factors ``[R, H, I, I]``, or their diagonals ``[R, H, I]``.
        B: the output factors ``[R, H, O, O]``, or their diagonals ``[R, H, O]``.
        name: what the matrix belongs to, for messages.
        shift: λ, of at least 0.
        nonnegative: every term is positive semidefinite, and so is the sum. Not verified.
        antisymmetric: for every term whether both its factors are antisymmetric instead of symmetric, as the singular
            pairs of a rearranged matrix of shared weights may be; None: looked up in A and B.
        definite: the factors of the first term are positive definite by construction (damped).

    Raises:
        DataError: the factors do not fit each other, or are neither both symmetric nor both antisymmetric.

    Example:
        >>> A = torch.tensor([[[[2.0, 1.0], [1.0, 2.0]]], [[[0.0, 1.0], [1.0, 0.0]]]])
        >>> X = KroneckerSum(A, torch.tensor([[[[3.0]]], [[[1.0]]]]), name="fc.weight")
        >>> X @ torch.tensor([1.0, 0.0])
        tensor([6., 4.])
        >>> X.solve(torch.tensor([6.0, 4.0])).round(decimals=4)
        tensor([1., 0.])
        >>> (X + 0.5).solve(torch.tensor([6.5, 4.0])).round(decimals=4)
        tensor([1., 0.])
    """

    remedy = (
        "use what works at any size: solve, trace, norm; factored damping of at most two terms, which then give "
        "everything exactly; or samples of a sum whose terms are all positive semidefinite."
    )
    A: Tensor
    B: Tensor
    name: str = ""
    shift: float = 0.0
    nonnegative: bool = False
    antisymmetric: tuple[bool, ...] | None = None
    definite: bool = False

    def __post_init__(self) -> None:
        label = self.name or "KroneckerSum"
        object.__setattr__(self, "shift", nonnegative(self.shift, "the damping λ"))
        if len(self.A) != len(self.B) or not len(self.A) or self.A.dim() not in (3, 4) or self.B.dim() not in (3, 4):
            raise DataError(
                f"{label}: A must be [R, H, I, I] and B [R, H, O, O] (without the last axis for diagonals) of the same "
                f"R >= 1 terms, not {list(self.A.shape)} and {list(self.B.shape)}"
            )
        check_factors({"A": self.A[0], "B": self.B[0]}, label)
        if self.antisymmetric is None:
            object.__setattr__(self, "antisymmetric", _antisymmetric(self.A, self.B, label))
        kinds = self._kinds
        if len(kinds) != len(self.A) or (any(kinds) and _has_diagonal(self.A, self.B)):
            raise DataError(f"{label}: antisymmetric={kinds} does not fit {len(self.A)} terms with these factors")
        if kinds[0] or (self.nonnegative and any(kinds)):
            raise DataError(f"{label}: an antisymmetric term neither leads nor is positive semidefinite")

    @property
    def dim(self) -> int:
        """D = H·O·I."""
        return self.terms[0].dim

    @property
    def structure(self) -> str:
        """The number of terms and the sizes of A and B."""
        return f"sum of {len(self.A)} kronecker {size_text(Factor.of(self.A[0]), Factor.of(self.B[0]))}"

    @property
    def semidefinite(self) -> bool:
        """Whether every term is positive semidefinite."""
        return self.nonnegative

    @cached_property
    def terms(self) -> tuple[Kronecker, ...]:
        """The single products; all but the first may be indefinite."""
        return tuple(Kronecker(A, B, self.name) for A, B in zip(self.A, self.B, strict=True))

    @property
    def products(self) -> tuple[tuple[Factor, Factor], ...] | None:
        return None if self.shift else tuple(term.product for term in self.terms)

    def matvecs(self, rows: Tensor) -> Tensor:
        """``Σ_r B_r W A_rᵀ + λ W`` for K rows W ``[K, D]``."""
        total = sum((term.matvecs(rows) for term in self.terms[1:]), start=self.terms[0].matvecs(rows))
        return total.add_(rows, alpha=self.shift) if self.shift else total

    def solves(self, rows: Tensor) -> Tensor:
        """Exactly for a pair, else by conjugate gradients.

        Warns:
            NumericalWarning: they did not converge.
        """
        if self._pair:
            return self._pair.solves(rows)
        leading = self._plain._leading.spectral()
        high = leading.extremes[1]
        noise = negligible(self.dtype) * high
        if self.shift:
            warn_if_lost(self, self.shift, float(high))
        near = leading.shifted(max(self.shift, noise)).inverse()
        floor = noise if not self.shift and not self.definite else 0.0
        label = self.name or self.structure
        answer, convergence = conjugate_gradients(
            self.matvecs, near.matvecs, rows, scale=high + self.shift, floor=floor, name=label
        )
        self.remember(convergence)
        return answer

    def noise_dim(self, *, inverse: bool = True) -> int:
        """D for every term that is drawn apart, and for λ."""
        return self.dim * (len(self.A) + bool(self.shift)) if self._apart(inverse) else self.dim

    def colour(self, noise: Tensor, *, inverse: bool = True) -> Tensor:
        """Term by term where all are positive semidefinite, else by the pair or the formed matrix.

        The sum of independent draws from ``N(0, X_r)`` has the covariance X, and ``X⁻¹`` times it the covariance
        ``X⁻¹``.
        """
        if not self._apart(inverse):
            return (self._pair or self.write_out("its root")).colour(noise, inverse=inverse)
        parts = noise.split(self.dim, dim=1)
        drawn = [term.colour(part, inverse=False) for term, part in zip(self.terms, parts, strict=False)]
        if self.shift:
            drawn.append(parts[-1] * self.shift**0.5)
        draws = torch.stack(drawn).sum(0)
        return self.solves(draws) if inverse else draws

    def inverse(self) -> Operator:
        """A `Pair` for at most two terms; else of the matrix itself, UnsupportedError if it is too large."""
        return self._pair.inverse() if self._pair else self.write_out("its inverse").inverse()

    def logdet(self) -> Tensor:
        """As `inverse`."""
        return self._pair.logdet() if self._pair else self.write_out("its determinant").logdet()

    def spectral(self) -> Spectral:
        """Of the matrix itself, negative eigenvalues and all; UnsupportedError as in `write_out`."""
        spectral = cast(Spectral, self._plain.write_out("its spectrum").spectral())
        return spectral.shifted(self.shift) if self.shift else spectral

    def quadratic(self, samples: Gradients) -> Tensor:
        """Term by term, and λ times the squared norms."""
        total = torch.stack([term.quadratic(samples) for term in self.terms]).sum()
        return total + self.shift * samples.squares().sum(dtype=torch.float64)

    def factored_damping(self, damping: float) -> "KroneckerSum":
        """With the first term damped so: two terms keep an exact inverse."""
        return self.with_first(self.terms[0].factored_damping(damping))

    def normalized(self, inputs: float | Tensor, outputs: float | Tensor) -> "KroneckerSum":
        """Over the first term's mean eigenvalue, with the first term damped: two terms keep an exact inverse."""
        first = self.terms[0]
        mean = first.trace() / first.dim
        damped = self.with_first(first.damped_by_shares(inputs, outputs))
        return replace(damped, B=damped.B / torch.where(mean > 0, mean, 1))

    def shifted(self, damping: float) -> "KroneckerSum":
        """``X + λ·1``, exactly and for nothing: λ is kept apart. Copies share what was decomposed."""
        shift = nonnegative(damping, "the damping λ")
        if shift == 0:
            return self
        result = replace(self, shift=self.shift + shift)
        vars(result)["_plain"] = self._plain
        return result

    def clamped(self, floor: float = 0.0) -> Operator:
        """At most two terms without λ: as their `Pair`, relative to the first term. Else by the spectrum."""
        if self._pair and not (floor == 0 and self.nonnegative):
            return self._pair.clamped(floor)
        return super().clamped(floor)

    def absolute(self) -> Operator:
        """As `clamped`."""
        return self._pair.absolute() if self._pair and not self.nonnegative else super().absolute()

    def transposed(self, outputs: int, inputs: int) -> Operator:
        """The factors of every term change places; for one group."""
        return replace(self, A=self.B, B=self.A) if self.A.shape[1] == 1 else super().transposed(outputs, inputs)

    def scaled(self, factor: float) -> "KroneckerSum":
        """The factor goes into B and λ."""
        factor = nonnegative(factor, "the factor")
        return replace(self, B=self.B * factor, shift=self.shift * factor, definite=self.definite and factor > 0)

    def with_first(self, first: Kronecker) -> "KroneckerSum":
        """The same with another first term, whose factors are dense or diagonal as those of the sum."""
        A, B = (torch.cat([new[None], old[1:]]) for new, old in ((first.A, self.A), (first.B, self.B)))
        return replace(self, A=A, B=B, definite=first.definite)

    def trace(self) -> Tensor:
        """``Σ_r Σ_h tr A_rh tr B_rh + λ D``."""
        return torch.stack([term.trace() for term in self.terms]).sum() + self.shift * self.dim

    def diagonal(self) -> Tensor:
        """``Σ_r diag B_r ⊗ diag A_r + λ``, ``[D]``."""
        return torch.stack([term.diagonal() for term in self.terms]).sum(0) + self.shift

    def frobenius_norm(self) -> Tensor:
        """``‖Σ_r B_r ⊗ A_r‖² = Σ_h Σ_{r,s} ⟨A_r, A_s⟩ ⟨B_r, B_s⟩``, from the two Gram matrices, in float64."""
        scale, grams = torch.ones((), dtype=torch.float64, device=self.device), []
        for side in (self.A, self.B):
            high = side.abs().amax().clamp_min(torch.finfo(side.dtype).tiny).double()
            rows = (side.double() / high).flatten(2).transpose(0, 1)  # [H, R, n²] at unit scale
            grams.append(rows @ rows.mT)
            scale = scale * high
        squared = (grams[0] * grams[1]).sum()
        if self.shift:
            trace = torch.stack([term.trace().double() for term in self.terms]).sum() / scale
            shift = self.shift / scale
            squared = squared + 2 * shift * trace + shift.square() * self.dim
        return (squared.clamp_min(0).sqrt() * scale).to(self.dtype)

    def to_dense(self) -> Tensor:
        """``[D, D]``."""
        total = sum((term.to_dense() for term in self.terms[1:]), start=self.terms[0].to_dense())
        total.diagonal().add_(self.shift)
        return total

    def merged(self, other: Operator) -> "KroneckerSum | None":
        """The terms of both in one sum: no larger than the two apart, and it can be solved."""
        if isinstance(other, KroneckerSum):
            kinds, A, B, shift, good = other._kinds, other.A, other.B, other.shift, other.nonnegative
        elif other.product is not None:
            A, B = (factor.tensor[None] for factor in other.product)
            kinds, shift, good = (False,), 0.0, True
        else:
            return None
        if A.shape[1:] != self.A.shape[1:] or B.shape[1:] != self.B.shape[1:]:
            return None
        joined = {"A": torch.cat([self.A, A]), "B": torch.cat([self.B, B]), "antisymmetric": (*self._kinds, *kinds)}
        return replace(self, **joined, shift=self.shift + shift, nonnegative=self.nonnegative and good)

    def _apart(self, inverse: bool) -> bool:
        # drawn term by term: a pair needs a positive definite first term, which N(0, X) does not
        return self.nonnegative and not (inverse and self._paired)

    @property
    def _kinds(self) -> tuple[bool, ...]:
        return self.antisymmetric or ()

    @property
    def _paired(self) -> bool:
        return len(self.A) <= 2 and not self.shift

    @cached_property
    def _leading(self) -> Kronecker:
        return Kronecker(self.A[0], self.B[0], self.name, definite=self.definite)

    @cached_property
    def _plain(self) -> "KroneckerSum":
        return replace(self, shift=0.0) if self.shift else self

    @cached_property
    def _pair(self) -> Pair | None:
        if not self._paired:
            return None
        last = len(self.A) - 1
        second = (self.A[last], self.B[last]) if last else (torch.zeros_like(self.A[0]), torch.zeros_like(self.B[0]))
        return Pair.of(
            (self.A[0], self.B[0]),
            second,
            antisymmetric=self._kinds[last],
            name=self.name,
            definite=self.definite,
            form=self.structure,
        )


def _has_diagonal(*stacks: Tensor) -> bool:
    return any(Factor.type_of(stack.shape[1:]).is_diagonal for stack in stacks)


def _antisymmetric(A: Tensor, B: Tensor, label: str) -> tuple[bool, ...]:
    """For every term whether its factors are antisymmetric; DataError if neither holds for both."""
    if _has_diagonal(A, B):
        return (False,) * len(A)
    kinds = []
    for r, pair in enumerate(zip(A, B, strict=True)):
        noise = [1e3 * torch.finfo(side.dtype).eps * side.abs().amax() for side in pair]
        even = [bool((side - side.mT).abs().amax() <= eps) for side, eps in zip(pair, noise, strict=True)]
        odd = [bool((side + side.mT).abs().amax() <= eps) for side, eps in zip(pair, noise, strict=True)]
        if not all(even) and not all(odd):
            raise DataError(f"{label}: the factors of term {r} are neither both symmetric nor both antisymmetric")
        kinds.append(not all(even))
    return tuple(kinds)
