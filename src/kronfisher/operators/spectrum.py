"""The spectral form that every operator has: what `Operator` needs of `Spectral`, which is one."""

from collections.abc import Callable
from typing import Protocol, Self, TypeVar

from torch import Tensor

__all__ = ["Spectrum"]

Matrix = TypeVar("Matrix", covariant=True)


class Spectrum(Protocol[Matrix]):
    """``U diag(values) Uᵀ``: see `Spectral` for what its methods do and raise."""

    @property
    def values(self) -> Tensor:
        """``[D]`` eigenvalues, in the order of the basis."""
        ...

    @property
    def definite(self) -> bool:
        """Whether the eigenvalues are known to be positive."""
        ...

    @property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest eigenvalue."""
        ...

    def map(self, function: Callable[[Tensor], Tensor], *, definite: bool = False) -> Matrix:
        """``U f(S) Uᵀ``."""
        ...

    def positive_map(self, function: Callable[[Tensor], Tensor]) -> Matrix:
        """`map` of a positive definite matrix by a function from positive to positive numbers."""
        ...

    def checked(self) -> Self:
        """Itself, if it can be inverted."""
        ...

    def rooted(self) -> Self:
        """Itself without negative rounding noise."""
        ...

    def shifted(self, damping: float) -> Matrix:
        """``X + λ·1``."""
        ...

    def scaled(self, factor: float) -> Matrix:
        """``factor · X``."""
        ...
