"""K-FAC and the best product for what it misses."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kronfisher.fisher.blocks import Block
from kronfisher.fits.fit import Plan, State, reciprocal, register
from kronfisher.fits.kronecker_sum import KroneckerSum
from kronfisher.fits.rearrangement import Terms
from kronfisher.fits.term_search import squares
from kronfisher.layers.samples import Samples
from kronfisher.operators import Factor, Operator

__all__ = ["KFACCorrected"]


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

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> State:
        state = super().init(group, plan, like)
        inputs, outputs = self.sides(group)
        state.sums |= {"kfac.inputs": like.new_zeros(inputs), "kfac.outputs": like.new_zeros(outputs)}
        return state

    def update(self, state: State, samples: tuple[Samples, ...]) -> State:
        (use,) = samples
        if use.first:
            use.add_input_covariance_(state.sums["kfac.inputs"])
        use.add_output_covariance_(state.sums["kfac.outputs"])
        return super().update(state, samples)

    def _product(self, state: State) -> tuple[Tensor, Tensor]:
        """K-FAC's factors ``[1, H, ...]``, in the scale of the sum over samples."""
        A, B = (Factor.of(state.sums[f"kfac.{side}"]).mirror().tensor for side in ("inputs", "outputs"))
        return A[None], B[None] * reciprocal(state.rows)

    def _merge_alone(self, state: State, piece: list[Samples]) -> None:
        state.facts["alone"] = "yes"  # all data are here: what is found is the exact correction
        self._merge(state, piece, 1, Terms(*self._product(state), sign=-1.0))

    def _terms(self, state: State) -> tuple[Tensor, Tensor, tuple[bool, ...]]:
        A, B = state.sums["even.inputs"], state.sums["even.outputs"]
        first = self._product(state)
        if "alone" not in state.facts:
            A, B = self.search.shortened(torch.cat([A, first[0]]), torch.cat([B, -first[1]]), 1)
        odd, other = False, (state.sums["odd.inputs"][:1], state.sums["odd.outputs"][:1])
        if len(other[0]) and squares(other[0][0], other[1][0]) > squares(A[0], B[0]):
            A, B, odd = *other, True
        return torch.cat([first[0], A[:1]]), torch.cat([first[1], B[:1]]), (False, odd)

    def error(self, state: State, operator: Operator) -> float | None:
        """Not from these sums: K-FAC and its correction are not orthogonal."""
        return None


register("kfac-corrected", KFACCorrected)
