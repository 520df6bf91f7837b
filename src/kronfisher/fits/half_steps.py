"""Half steps of K-FOC over all data: one factor is summed around the other, which is fixed."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from kronfisher.fits.rearrangement import Rearranged, norm, over
from kronfisher.fits.shapes import Shapes
from kronfisher.fits.state import Fixed, State, Total

__all__ = ["HalfStep", "InputsStep", "OutputsStep"]


@dataclass(kw_only=True)
class HalfStep(State):
    """Base of both.

    Attributes:
        inputs: A ``[H, I, I]``, or a diagonal: a sum over samples, or fixed and of norm one.
        outputs: B ``[H, O, O]``, or a diagonal, likewise.
        route: of the pieces before.
        change: of A in the last double step; None before the first has ended.
    """

    inputs: Tensor
    outputs: Tensor
    route: str | None = None
    change: float | None = None

    def add_(self, source: Rearranged) -> None:
        """Add the half step over some samples."""
        raise NotImplementedError

    def following(self, shapes: Shapes, tolerance: float, last: bool) -> "HalfStep | None":
        """The next half step; None when A has changed by no more than the tolerance.

        Args:
            shapes: of A and B.
            tolerance: of A, of norm one, in a double step.
            last: no double step is to follow.
        """
        raise NotImplementedError

    def plus(self, other: State, wx: float = 1.0, wy: float = 1.0) -> Self:
        both = super().plus(other, wx, wy)
        assert isinstance(other, HalfStep)
        both.route = other.route or self.route
        both.change = self.change if other.change is None else other.change
        return both

    @property
    def notes(self) -> str:
        """For the report."""
        text = f"by {self.route}, then {self.phase} half steps over all data"
        return text if self.change is None else f"{text}; the last changed A by {self.change:.0e}"


@dataclass(kw_only=True)
class OutputsStep(HalfStep):
    """B around a fixed A of norm one: ``Σ_k G_k A G_kᵀ``."""

    inputs: Fixed
    outputs: Total

    @classmethod
    def around(cls, before: State, A: Tensor, shapes: Shapes, route: str | None, change: float | None = None) -> Self:
        """An empty one after another state."""
        outputs, phase = A.new_zeros(shapes[1]), before.phase + 1
        return cls(before.blocks, before.plan, phase=phase, inputs=A, outputs=outputs, route=route, change=change)

    def add_(self, source: Rearranged) -> None:
        self.outputs += source.outputs(self.inputs)

    def following(self, shapes: Shapes, tolerance: float, last: bool) -> "InputsStep":
        B = over(self.outputs, norm(self.outputs))
        return InputsStep(
            self.blocks,
            self.plan,
            phase=self.phase + 1,
            inputs=B.new_zeros(shapes[0]),
            outputs=B,
            before=self.inputs,
            route=self.route,
            change=self.change,
        )


@dataclass(kw_only=True)
class InputsStep(HalfStep):
    """A around a fixed B of norm one: ``Σ_k G_kᵀ B G_k``.

    Attributes:
        before: A, of norm one, that B was made around.
    """

    inputs: Total
    outputs: Fixed
    before: Fixed

    def add_(self, source: Rearranged) -> None:
        self.inputs += source.inputs(self.outputs)

    def following(self, shapes: Shapes, tolerance: float, last: bool) -> OutputsStep | None:
        A = over(self.inputs, norm(self.inputs))
        self.change = float(norm(A - self.before).max())
        if last or self.change <= tolerance:
            return None
        return OutputsStep.around(self, A, shapes, self.route, self.change)
