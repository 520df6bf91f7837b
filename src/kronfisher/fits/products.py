"""The state of K-FOC: a sum of Kronecker products over pieces of the samples."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from kronfisher.fits.rearrangement import over
from kronfisher.fits.state import Total, WaitingState
from kronfisher.linalg import unwritten_zeros
from kronfisher.operators import Factor

__all__ = ["ProductSums"]


@dataclass(kw_only=True)
class ProductSums(WaitingState):
    """The sum of Kronecker products that K-FOC takes from piece to piece of the samples.

    Attributes:
        inputs: A of the terms ``[R, H, I, I]``, or a diagonal ``[1, H, I]``. A single term is the sum of the pieces'
            own A, by their weights, upper triangle.
        outputs: B, likewise.
        weight: of the pieces in a single term, ``[H]``; zero where there are more.
        norm: ``‖F‖²`` of what was summed, as far as it is known.
        pieces: how many pieces were merged.
        steps: how many double steps they took.
        change: the largest change of A that another double step was expected to make in one of them.
        route: how half steps were taken in the last piece; None before the first one.
        directions: the last piece's directions of A and of B, where they were projected, to start from.
        uncertain: whether `norm` misses something.
        single: the state of one term that `finish` made of samples that still wait, which the report describes.
    """

    inputs: Total
    outputs: Total
    weight: Total
    norm: Total
    pieces: Total
    steps: Total
    change: Total
    route: str | None = None
    directions: tuple[Tensor, Tensor] | None = None
    uncertain: bool = False
    single: "ProductSums | None" = None

    @property
    def begun(self) -> bool:
        """Whether a piece was merged."""
        return self.route is not None

    def release(self) -> None:
        """Let go of the state made of one piece, too."""
        super().release()
        self.single = None

    def terms(self) -> tuple[Tensor, Tensor]:
        """A ``[R, H, I, I]`` and B ``[R, H, O, O]`` of the sum over samples, whole matrices."""
        if len(self.inputs) > 1 or not bool((self.weight > 0).any()):
            return self.inputs, self.outputs
        A, B = Factor.of(self.inputs[0]), Factor.of(over(self.outputs[0], self.weight))
        return A.mirror().tensor[None], B.mirror().tensor[None]

    def narrow(self) -> None:
        """Leave room for one term, in a state that holds nothing yet."""
        one = (unwritten_zeros(terms, terms[:1].shape) for terms in (self.inputs, self.outputs))
        self.inputs, self.outputs = one  # a part of the others would keep their memory

    def widen(self, terms: int) -> Self:
        """One term, as the first of several."""
        if len(self.inputs) >= terms:
            return self
        inputs, outputs = (
            torch.cat([factor, factor.new_zeros(terms - len(factor), *factor.shape[1:])]) for factor in self.terms()
        )
        weight = torch.zeros_like(self.weight)
        return replace(self, inputs=inputs, outputs=outputs, weight=weight, uncertain=True)
