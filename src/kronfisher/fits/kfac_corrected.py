"""K-FAC and the best product for what it misses."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kronfisher.fisher.blocks import Block
from kronfisher.fits.kronecker_sum import KroneckerSum
from kronfisher.fits.plan import Plan
from kronfisher.fits.rearrangement import Terms
from kronfisher.fits.registry import register
from kronfisher.fits.state import Total, reciprocal
from kronfisher.fits.term_search import squares
from kronfisher.fits.term_sums import TermSums
from kronfisher.layers.samples import Samples
from kronfisher.operators import Factor, Operator

__all__ = ["KFACCorrected"]


@dataclass(kw_only=True)
class CorrectedSums(TermSums):
    """K-FAC's sums beside terms.

    Attributes:
        input_covariance: ``Σ a aᵀ``, the upper triangle, or its diagonal.
        output_covariance: ``Σ g gᵀ``, likewise.
        exact: whether all data came in one piece, so that the terms are the exact correction.
    """

    input_covariance: Total
    output_covariance: Total
    exact: bool = False


@dataclass(frozen=True)
class KFACCorrected(KroneckerSum):
    """K-FAC plus the best product for what it misses, ``F − B ⊗ A`` (Koroko et al. 2022, KFAC-corrected).

    Over more than 512 samples the block itself is represented by the `memory` leading terms that are carried.

    Example:
        >>> import torch, kronfisher as kf
        >>> data, layer = torch.randn(50, 2), torch.nn.Linear(2, 3)
        >>> fisher = kf.estimate(layer, data, kf.Gaussian(), fit=kf.KFACCorrected(), labels="exact")
        >>> fisher["weight"].structure
        'sum of 2 kronecker 3x3'
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank != 2 or self.method not in ("lanczos", "deflation"):
            raise ValueError(f"{self!r}: K-FAC and one correction are two terms, by 'lanczos' or 'deflation'.")

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> CorrectedSums:
        inputs, outputs = (like.new_zeros(shape) for shape in self.sides(group))
        nothing = self._nothing(group, like)
        return CorrectedSums(group, plan, input_covariance=inputs, output_covariance=outputs, **nothing)

    def update(self, state: CorrectedSums, samples: tuple[Samples, ...]) -> TermSums:
        (use,) = samples
        if use.first:
            use.add_input_covariance_(state.input_covariance)
        use.add_output_covariance_(state.output_covariance)
        return super().update(state, samples)

    def combine(self, x: CorrectedSums, y: CorrectedSums, wx: float = 1.0, wy: float = 1.0) -> TermSums:
        both = super().combine(x, y, wx, wy)
        assert isinstance(both, CorrectedSums)
        both.exact = x.exact or y.exact
        return both

    def _product(self, state: CorrectedSums) -> tuple[Tensor, Tensor]:
        """K-FAC's factors ``[1, H, ...]``, in the scale of the sum over samples."""
        A, B = (Factor.of(total).mirror().tensor for total in (state.input_covariance, state.output_covariance))
        return A[None], B[None] * reciprocal(state.rows)

    def _vanished(self, state: CorrectedSums) -> bool:
        """The terms correct K-FAC: they are zero where K-FAC is exact."""
        return not bool(state.input_covariance.any() & state.output_covariance.any())

    def _merge_alone(self, state: CorrectedSums, piece: list[Samples]) -> None:
        state.exact = True
        self._merge(state, piece, 1, Terms(*self._product(state), sign=-1.0))

    def _terms(self, state: CorrectedSums) -> tuple[Tensor, Tensor, tuple[bool, ...]]:
        A, B = state.even
        first = self._product(state)
        if not state.exact:
            A, B = self.search.shorten(torch.cat([A, first[0]]), torch.cat([B, -first[1]]), 1)
        odd, other = False, (state.odd_inputs[:1], state.odd_outputs[:1])
        if len(other[0]) and squares(other[0][0], other[1][0]) > squares(A[0], B[0]):
            A, B, odd = *other, True
        return torch.cat([first[0], A[:1]]), torch.cat([first[1], B[:1]]), (False, odd)

    def error(self, state: CorrectedSums, operator: Operator) -> float | None:
        """Not from these sums: K-FAC and its correction are not orthogonal."""
        return None


register("kfac-corrected", KFACCorrected, "K-FAC and a product for what it misses", "K-FAC, corrected")
