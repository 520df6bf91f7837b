"""Sums, multiples and quotients in the usual notation, for all that can be shifted and scaled."""

import math
from abc import ABC, abstractmethod
from numbers import Real
from typing import Generic, TypeVar

from torch import Tensor

__all__ = ["Algebra", "as_number", "matching", "nonnegative"]

Matrix = TypeVar("Matrix")


def as_number(value: object) -> float | None:
    """`value` as a float if it is a real number or a tensor of one element, else None."""
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Tensor) and value.dim() == 0:
        return float(value.item())
    return None


def matching(number: float | Tensor, like: Tensor) -> float | Tensor:
    """A number that may be a tensor, of the dtype and on the device of another."""
    return number.to(like) if isinstance(number, Tensor) else number


def nonnegative(value: object, what: str) -> float:
    """`value` as a float.

    Raises:
        ValueError: it is not a finite number of zero or more, so that the matrix would not stay positive semidefinite.
    """
    number = as_number(value)
    if number is None or not math.isfinite(number) or number < 0:
        raise ValueError(f"{what} must be a finite number of at least 0 to keep the matrix semidefinite; it is {value}")
    return number


class Algebra(ABC, Generic[Matrix]):
    """``X + λ`` (and ``X + Y``), ``α X`` and ``X / α`` of a matrix that knows how to do these by name."""

    @abstractmethod
    def shifted(self, damping: float) -> Matrix:
        """``X + λ·1``."""

    @abstractmethod
    def scaled(self, factor: float) -> Matrix:
        """``α·X``."""

    @abstractmethod
    def _plus(self, other: object) -> Matrix | None:
        """``X + other`` for another of its kind, None for anything else."""

    def __add__(self, other: object) -> Matrix:
        if (total := self._plus(other)) is not None:
            return total
        number = as_number(other)
        if number is None:
            return NotImplemented  # a damping answers by its own __radd__
        return self.shifted(number)

    __radd__ = __add__

    def __mul__(self, factor: float) -> Matrix:
        number = as_number(factor)
        if number is None:
            return NotImplemented
        return self.scaled(number)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Matrix:
        number = as_number(divisor)
        if number is None:
            return NotImplemented
        return self.scaled(1 / nonnegative(number, "the divisor"))
