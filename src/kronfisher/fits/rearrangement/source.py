"""Samples of a block as a source of its leading singular pair."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kronfisher.fits.rearrangement.scales import times
from kronfisher.layers.samples import Samples

__all__ = ["Pair", "Source"]


@dataclass
class Pair:
    """A leading singular pair ``σ B ⊗ A``, where A and B have norm one (zero for a zero matrix).

    Attributes:
        A: ``[H, I, I]``.
        B: ``[H, O, O]``.
        sigma: σ ``[H]``, in the scale of ``Σ_k vec(G_k) vec(G_k)ᵀ``.
        steps: double steps taken, a 0-dim tensor.
        change: of A in another one, ``‖A − A'‖``, as far as the last ones tell, the largest over the groups.
    """

    A: Tensor
    B: Tensor
    sigma: Tensor
    steps: Tensor
    change: Tensor


class Source(ABC):
    """Base of all ways to find the leading pair of ℛ(F), or a few leading terms, from samples.

    Attributes:
        starts: the iteration for the pair can start from a given A.
        orthogonal: the terms of `leading_terms` are orthogonal to each other.
        shape: H, O, I.
        directions: of A ``[H, I, ρ]`` and of B ``[H, O, ρ]``, from which the next piece of the samples can start.
    """

    starts: ClassVar[bool] = True
    orthogonal: ClassVar[bool] = False

    shape: tuple[int, int, int]

    @property
    def directions(self) -> tuple[Tensor, Tensor] | None:
        return None

    @abstractmethod
    def leading(self, start: Tensor | None = None, tolerance: float = 1e-3, iterations: int = 50) -> Pair:
        """The leading pair.

        Args:
            start: A ``[H, I, I]``, positive semidefinite; None: the identity.
            tolerance: stop when A, of norm one, is expected to change by no more in another double step.
            iterations: double steps at most.
        """

    @abstractmethod
    def leading_terms(
        self, rank: int, before: Tensor | None = None, tolerance: float = 1e-3, iterations: int = 50
    ) -> tuple[Pair, Tensor, Tensor]:
        """The leading pair, and A ``[R, H, I, I]`` and B ``[R, H, O, O]`` of about the best sum ``Σ_r B_r ⊗ A_r``.

        Args:
            rank: R, terms at most.
            before: A of terms of other samples of the block, to start from; None: noise.
            tolerance: of the pair, see `leading`.
            iterations: for the pair.
        """

    def add_leading_(
        self,
        inputs: Tensor,
        outputs: Tensor,
        weight: float | None = None,
        start: Tensor | None = None,
        tolerance: float = 1e-3,
        iterations: int = 50,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add A and B of the leading pair to sums ``[H, I, I]`` and ``[H, O, O]``, of which upper triangles count.

        Args:
            inputs: the sum of A.
            outputs: the sum of B.
            weight: add σ B and so much of A, which has norm one; None: σ B and σ A.
            start: see `leading`.
            tolerance: see `leading`.
            iterations: see `leading`.

        Returns:
            σ, the double steps taken, and the change of A expected of another.
        """
        pair = self.leading(start, tolerance, iterations)
        inputs += times(pair.A, pair.sigma) if weight is None else pair.A * weight
        outputs += times(pair.B, pair.sigma)
        return pair.sigma, pair.steps, pair.change

    def squared_norm(self, samples: Sequence[Samples], limit: int) -> Tensor | None:
        """``‖F‖² = ‖Σ_k vec(G_k) vec(G_k)ᵀ‖²`` in float64; None where it is too expensive.

        Args:
            samples: those of the block.
            limit: multiplications it may take.
        """
        return None
