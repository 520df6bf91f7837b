"""Damping rules: the protocol."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, overload

from kronfisher.fisher.fisher import Fisher
from kronfisher.operators.algebra import nonnegative
from kronfisher.operators.operator import Operator

__all__ = ["Damping"]


@dataclass(frozen=True)
class Damping(ABC):
    """A rule by which λ enters an operator, block by block; call it on an operator or a Fisher, or add it to one.

    A subclass is registered by its `kind` (``class Mine(Damping, kind="mine")``).

    Attributes:
        value: λ, in the units of the matrix's own eigenvalues; None leaves it to be set with `at`.

    Raises:
        ValueError: λ is negative or not finite.
    """

    kinds: ClassVar[dict[str, type["Damping"]]] = {}
    value: float | None = None

    def __init_subclass__(cls, kind: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind:
            Damping.kinds[kind] = cls

    def __post_init__(self) -> None:
        if self.value is not None:
            object.__setattr__(self, "value", nonnegative(self.value, "the damping λ"))

    @abstractmethod
    def damp(self, operator: Operator, value: float) -> Operator:
        """One damped block, for ``value > 0``."""

    def at(self, value: float) -> Self:
        """The same rule with another λ."""
        return replace(self, value=value)

    @overload
    def __call__(self, operator: Operator) -> Operator: ...
    @overload
    def __call__(self, operator: Fisher) -> Fisher: ...
    def __call__(self, operator: Operator | Fisher) -> Operator | Fisher:
        """The damped operator, or the Fisher of the damped blocks; the same object for λ = 0.

        Raises:
            ValueError: no λ was given.
        """
        value = self.value
        if value is None:
            raise ValueError(f"{type(self).__name__} has no λ yet; give it one with .at(λ)")
        if value == 0:
            return operator
        if isinstance(operator, Fisher):
            return operator.mapped(lambda block: self.damp(block, value), f"+ {type(self).__name__}({value:g})")
        return self.damp(operator, value)

    @overload
    def __radd__(self, operator: Operator) -> Operator: ...
    @overload
    def __radd__(self, operator: Fisher) -> Fisher: ...
    def __radd__(self, operator: Operator | Fisher) -> Operator | Fisher:
        return self(operator) if isinstance(operator, (Operator, Fisher)) else NotImplemented

    __add__ = __radd__
