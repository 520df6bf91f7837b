"""Per-example gradients, as far as operators have to know them."""

from collections.abc import Iterator
from typing import Protocol, Self

from torch import Tensor

__all__ = ["Gradients"]


class Gradients(Protocol):
    """Gradients ``G_k [H, O, I]`` of n samples, which may be kept as factors ``G_k = g_kᵀ a_k``."""

    @property
    def gradients(self) -> Tensor:
        """Some tensor of their dtype and device."""
        ...

    def per_sample(self) -> Iterator[Tensor]:
        """``G_k [H, n', O, I]``, some samples at a time."""
        ...

    def squares(self) -> Tensor:
        """``Σ_k G_k∘² [H, O, I]``."""
        ...

    def pieces(self) -> Iterator[Self]:
        """Some samples at a time."""
        ...

    def rotate(self, inputs: Tensor | None, outputs: Tensor | None) -> Iterator[Self]:
        """``U_Bᵀ G_k U_A`` in the pieces of `pieces`, or all at once where U_A is a diagonal."""
        ...

    def inner(self, other: Self) -> Tensor:
        """``Σ_k ⟨G_k, G'_k⟩``, in float64."""
        ...
