"""TKFAC: the Kronecker product of the two half sums at the identity, with the trace of the block."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kronfisher.fisher.blocks import Block
from kronfisher.fits.fit import Fit
from kronfisher.fits.plan import Plan
from kronfisher.fits.registry import register
from kronfisher.fits.shapes import MAX_DIM, check_max_dim, elements, factor_shapes
from kronfisher.fits.state import FactorSums, reciprocal
from kronfisher.layers.samples import Samples
from kronfisher.linalg import unwritten_zeros
from kronfisher.operators import Kronecker
from kronfisher.operators.factors import Factor

__all__ = ["TKFAC"]


@dataclass(frozen=True)
class TKFAC(Fit):
    """``F ≈ (Σ G_k G_kᵀ) ⊗ (Σ G_kᵀ G_k) / tr F``, whose trace is that of the block.

    For T = 1 this is TKFAC (Gao et al. 2020): ``B ∝ Σ ‖a_k‖² g gᵀ`` and ``A ∝ Σ ‖g_k‖² a aᵀ``, at K-FAC's cost. For
    shared weights it keeps the cross terms between the positions of a sample, which TKFAC drops; these sums over the
    per-example gradients are what Shampoo takes of mini-batch gradients, without its square root. Exact wherever the
    block is one Kronecker product. Each group of a convolution keeps its own trace.

    Args:
        max_dim: factors beyond this size are kept as their diagonals, as those of lookups in a table are; the trace is
            the same.

    Raises:
        ValueError: `max_dim` is no size.

    Example:
        >>> import torch, kronfisher as kf
        >>> layer, x = torch.nn.Linear(2, 3), torch.randn(50, 2)
        >>> fisher, exact = (kf.estimate(layer, x, kf.Gaussian(), fit=f, labels="exact") for f in ("tkfac", "full"))
        >>> fisher["weight"].structure, bool((fisher.trace() / exact.trace() - 1).abs() < 1e-5)
        ('kronecker 3x3', True)
    """

    max_dim: int = MAX_DIM

    def __post_init__(self) -> None:
        check_max_dim(self)

    @property
    def of_gradients(self) -> bool:
        return True

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        return Plan(2 * element * sum(elements(*shape) for shape in factor_shapes(group, self.max_dim)))

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> FactorSums:
        inputs, outputs = factor_shapes(group, self.max_dim)
        zeros = partial(unwritten_zeros, like)
        return FactorSums(group, plan, inputs=zeros(inputs), outputs=zeros(outputs))

    def update(self, state: FactorSums, samples: tuple[Samples, ...]) -> FactorSums:
        (use,) = samples
        if use.first:
            state.rows = state.rows + use.rows
        use.add_input_products_(state.inputs)
        use.add_output_products_(state.outputs)
        return state

    def finish(self, state: FactorSums) -> Kronecker:
        state.check()
        inputs = Factor.of(state.inputs).mirror()
        outputs = Factor.of(state.outputs).mirror(reciprocal(state.count))
        trace = inputs.diagonal().sum(1).view(-1, *[1] * (inputs.tensor.dim() - 1))
        share = torch.where(trace > 0, inputs.tensor / trace, 0)  # not times 1/tr F, which overflows for tiny ones
        return Kronecker(share, outputs.tensor, name=state.name)


register("tkfac", TKFAC, "one Kronecker product with the right trace", "TKFAC")
