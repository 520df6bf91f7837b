"""A matrix whose eigenvalues are at hand: every function of it is a function of numbers."""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from kronfisher.errors import IndefiniteError, NumericalError, NumericalWarning, SingularError
from kronfisher.linalg import indefinite_message, negligible, singular_message
from kronfisher.operators.algebra import nonnegative
from kronfisher.operators.operator import Operator

__all__ = ["Spectral", "warn_if_lost"]


def warn_if_lost(operator: Operator, shift: float, high: float) -> None:
    """NumericalWarning if a damping drowns in the rounding errors of the largest eigenvalue."""
    if shift < torch.finfo(operator.dtype).eps * high:
        warnings.warn(
            f"{operator.name or operator.structure}: λ = {shift:.1e} is below the {operator.dtype} precision of the "
            f"largest eigenvalue {high:.1e}; small eigenvalues are noise of that size. Use a larger λ or float64.",
            NumericalWarning,
            stacklevel=4,
        )


class Spectral(Operator):
    """A matrix given by eigenvalues in a basis that all its functions share.

    Attributes:
        values: ``[D]`` eigenvalues, in the order of the basis.
        definite: the eigenvalues are known to be positive (they were damped, say), however small beside the largest.
    """

    values: Tensor
    definite: bool

    @abstractmethod
    def map(self, function: Callable[[Tensor], Tensor], *, definite: bool = False) -> Self:
        """``U f(S) Uᵀ`` in the same basis, for `function` acting on each eigenvalue."""

    def spectral(self) -> Self:
        """Itself."""
        return self

    @property
    def semidefinite(self) -> bool:
        """From the eigenvalues."""
        return self.definite or self.extremes[0] >= 0

    @cached_property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest eigenvalue."""
        low, high = torch.stack(torch.aminmax(self.values)).tolist()
        return low, high

    def checked(self) -> Self:
        """Itself, if it can be inverted.

        Raises:
            IndefiniteError: an eigenvalue is negative, by more than rounding explains.
            SingularError: an eigenvalue is numerically zero.
            NumericalError: an eigenvalue is not finite.
        """
        low, high = self._finite()
        if low < -negligible(self.dtype) * max(high, -low):
            raise IndefiniteError(indefinite_message(self.name or self.structure, low, high))
        if low <= 0 or not (self.definite or low > negligible(self.dtype) * high):
            raise SingularError(singular_message(self.name or self.structure, self.values.mean().item(), self.dtype))
        return self

    def rooted(self) -> Self:
        """Itself with negative rounding noise set to zero, so that it has a root.

        Raises:
            IndefiniteError, NumericalError: as in `checked`.
        """
        low, high = self._finite()
        if low >= 0:
            return self
        if low < -negligible(self.dtype) * max(high, -low):
            raise IndefiniteError(indefinite_message(self.name or self.structure, low, high))
        return self.map(lambda values: values.clamp_min(0))

    def _finite(self) -> tuple[float, float]:
        low, high = self.extremes
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NumericalError(f"{self.name or self.structure}: an eigenvalue is NaN or Inf")
        return low, high

    def positive_map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """`map` by a function from positive to positive numbers; SingularError as in `checked`."""
        return self.checked().map(function, definite=True)

    def shifted(self, damping: float) -> Self:
        """``X + λ·1`` in the same basis; see `Operator.shifted`."""
        shift = nonnegative(damping, "the damping λ")
        if shift == 0:
            return self
        low, high = self.extremes
        warn_if_lost(self, shift, high)
        result = self.map(lambda values: values + shift, definite=low + shift > 0)
        vars(result)["extremes"] = (low + shift, high + shift)  # known, so a new λ needs no answer from the device
        return result

    def scaled(self, factor: float) -> Self:
        """``factor · X`` in the same basis; see `Operator.scaled`."""
        factor = nonnegative(factor, "the factor")
        return self.map(lambda values: values * factor, definite=self.definite and factor > 0)

    def trace(self) -> Tensor:
        """The sum of the eigenvalues."""
        return self.values.sum()
