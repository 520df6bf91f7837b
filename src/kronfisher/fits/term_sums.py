"""The state of `KroneckerSum`: a sum of Kronecker products that goes from piece to piece of the samples."""

from dataclasses import dataclass

from torch import Tensor

from kronfisher.fits.state import Stack, Total, WaitingState

__all__ = ["Factors", "TermSums"]

Factors = tuple[Tensor, Tensor]
"""A ``[R, H, ...]`` and B ``[R, H, ...]`` of some terms."""


@dataclass(kw_only=True)
class TermSums(WaitingState):
    """A sum of Kronecker products over the pieces so far.

    Attributes:
        inputs: A of the symmetric terms ``[R, H, I, I]``, or diagonals.
        outputs: B of the same.
        odd_inputs: A of the antisymmetric terms.
        odd_outputs: B of the same.
        norm: ``‖F‖²`` of what was summed, as far as it is known.
        pieces: how many pieces were merged.
        steps: how many steps they took.
        accuracy: the worst of all pieces.
        uncertain: whether `norm` misses something.
    """

    inputs: Stack
    outputs: Stack
    odd_inputs: Stack
    odd_outputs: Stack
    norm: Total
    pieces: Total
    steps: Total
    accuracy: float = 0.0
    uncertain: bool = False

    @property
    def even(self) -> Factors:
        """A and B of the symmetric terms."""
        return self.inputs, self.outputs

    @even.setter
    def even(self, pair: Factors) -> None:
        self.inputs, self.outputs = pair

    @property
    def odd(self) -> Factors:
        """A and B of the antisymmetric terms."""
        return self.odd_inputs, self.odd_outputs

    @odd.setter
    def odd(self, pair: Factors) -> None:
        self.odd_inputs, self.odd_outputs = pair
