"""A sum of operators that is never formed unless it is small."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any, Self

import torch
from torch import Tensor

from kronfisher.errors import DataError, UnsupportedError
from kronfisher.linalg import negligible
from kronfisher.operators.algebra import nonnegative
from kronfisher.operators.cg import Iterative, conjugate_gradients
from kronfisher.operators.diagonal import Diagonal
from kronfisher.operators.operator import Operator

__all__ = ["Sum"]


@dataclass(frozen=True, eq=False, repr=False)
class Sum(Iterative, Operator, kind="total"):
    """``Σ_i X_i``: products, trace and diagonal are sums; the rest forms the matrix if it is small.

    ``+`` makes one where the terms have no common structure.

    Attributes:
        terms: operators of one dimension, dtype and device.
        name: what the matrix belongs to, for messages.

    Example:
        >>> from kronfisher.operators import Dense
        >>> X = Diagonal(torch.tensor([1.0, 2.0])) + Dense(torch.ones(2, 2)) + Diagonal(torch.tensor([1.0, 1.0]))
        >>> X.structure, X.trace()
        ('dense 2x2', tensor(7.))
    """

    remedy = "choose a fit of one term."
    terms: tuple[Operator, ...]
    name: str = ""

    @classmethod
    def from_terms(cls, terms: Iterable[Operator]) -> Operator:
        """The sum, with terms merged where that costs nothing; one operator if all of them merge.

        Raises:
            DataError: the terms differ in dimension or device.
        """
        flat = [part for term in terms for part in (term.terms if isinstance(term, Sum) else (term,))]
        if len({(t.dim, t.device) for t in flat}) > 1:
            listed = ", ".join(f"{t!r} on {t.device}" for t in flat)
            raise DataError(f"a sum needs one dimension and one device: {listed}")
        dtype = reduce(torch.promote_types, (t.dtype for t in flat))
        kept: list[Operator] = []
        for term in flat:
            term = term.to(dtype=dtype)
            for k, other in enumerate(kept):
                if (merged := other.merged(term) or term.merged(other)) is not None:
                    kept[k] = merged
                    break
            else:
                kept.append(term)
        return kept[0] if len(kept) == 1 else cls(tuple(kept), kept[0].name)

    @property
    def dim(self) -> int:
        """D."""
        return self.terms[0].dim

    @property
    def semidefinite(self) -> bool:
        """Whether all terms are."""
        return all(term.semidefinite for term in self.terms)

    @property
    def structure(self) -> str:
        """Its terms."""
        return " + ".join(term.structure for term in self.terms)

    def matvecs(self, rows: Tensor) -> Tensor:
        """The sum of the products, for K rows ``[K, D]``."""
        return sum((term.matvecs(rows) for term in self.terms[1:]), start=self.terms[0].matvecs(rows))

    def solves(self, rows: Tensor) -> Tensor:
        """By the Cholesky factor of the matrix itself if it is small, else by conjugate gradients on the terms.

        They are preconditioned with the first term (or first product of a sum of them) that has eigenvectors, scaled to
        the trace of all, plus the smallest number of those that are diagonal.

        Raises:
            UnsupportedError: it is large, and no term has eigenvectors.

        Warns:
            NumericalWarning: they did not converge.
        """
        if self.is_small:
            return self.write_out("its inverse").solves(rows)
        label = self.name or self.structure
        near, high, definite = self._near
        floor = 0.0 if definite else negligible(self.dtype) * high
        answer, convergence = conjugate_gradients(self.matvecs, near.matvecs, rows, scale=high, floor=floor, name=label)
        self.remember(convergence)
        return answer

    @cached_property
    def _near(self) -> tuple[Operator, float, bool]:
        """An approximate inverse, about the largest eigenvalue, and whether a diagonal term makes the sum definite."""
        diagonals = [values for term in self.terms if (values := term.diagonal_values) is not None]
        shift = sum((float(values.min()) for values in diagonals), start=0.0)
        for term in self.terms:
            leading: Operator = getattr(term, "terms", (term,))[0]  # of a sum of products, which leads with its largest
            if leading.diagonal_values is not None:
                continue
            try:
                spectral = leading.spectral()
            except UnsupportedError:
                continue
            own, rest = float(leading.trace()), float(self.trace()) - shift * self.dim
            factor = max(rest / own, 1.0) if own > 0 else 1.0
            high = factor * spectral.extremes[1] + shift
            noise = negligible(self.dtype) * high
            return spectral.scaled(factor).shifted(max(shift, noise)).inverse(), high, shift > 0
        return self.write_out("its inverse"), 0.0, False  # raises

    def colour(self, noise: Tensor, *, inverse: bool = True) -> Tensor:
        """As the matrix itself does; UnsupportedError as in `write_out`."""
        return self.write_out("its root").colour(noise, inverse=inverse)

    def inverse(self) -> Operator:
        """Of the matrix itself; UnsupportedError as in `write_out`."""
        return self.write_out("its inverse").inverse()

    def logdet(self) -> Tensor:
        """Of the matrix itself; UnsupportedError as in `write_out`."""
        return self.write_out("its determinant").logdet()

    def frobenius_norm(self) -> Tensor:
        """Of the matrix itself; UnsupportedError as in `write_out`."""
        return self.write_out("its norm").frobenius_norm()

    def shifted(self, damping: float) -> Operator:
        """``Σ X_i + λ·1``: through the spectrum where there is one, else with the identity as one more term."""
        shift = nonnegative(damping, "the damping λ")
        if shift == 0 or self.is_small:
            return super().shifted(shift)
        identity = torch.full((self.dim,), shift, dtype=self.dtype, device=self.device)
        return Sum.from_terms((*self.terms, Diagonal(identity, self.name, definite=True)))

    def scaled(self, factor: float) -> "Sum":
        """Term by term."""
        return replace(self, terms=tuple(term.scaled(factor) for term in self.terms))

    def transposed(self, outputs: int, inputs: int) -> Operator:
        """Term by term."""
        return Sum.from_terms(term.transposed(outputs, inputs) for term in self.terms)

    def trace(self) -> Tensor:
        """The sum of the traces."""
        return torch.stack([term.trace() for term in self.terms]).sum()

    def diagonal(self) -> Tensor:
        """The sum of the diagonals, ``[D]``."""
        return torch.stack([term.diagonal() for term in self.terms]).sum(0)

    def to_dense(self) -> Tensor:
        """``[D, D]``."""
        return sum((term.to_dense() for term in self.terms[1:]), start=self.terms[0].to_dense())

    def tensors(self) -> dict[str, Tensor]:
        """Those of the terms, numbered."""
        return {f"{k}.{key}": t for k, term in enumerate(self.terms) for key, t in term.tensors().items()}

    def settings(self) -> dict[str, Any]:
        """The name, and kind and settings of every term."""
        return {"name": self.name, "terms": [{"kind": term.kind, **term.settings()} for term in self.terms]}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], **settings: Any) -> Self:
        """Term by term."""
        terms = []
        for k, term in enumerate(settings["terms"]):
            own = {key.removeprefix(f"{k}."): t for key, t in tensors.items() if key.startswith(f"{k}.")}
            terms.append(Operator.restored(own, term))
        return cls(tuple(terms), settings["name"])
