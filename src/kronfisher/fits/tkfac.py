"""TKFAC: the Kronecker product of the two half sums at the identity, with the trace of the block."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kronfisher.blocks import Block
from kronfisher.fits.fit import Fit, Plan, State, elements, reciprocal, register, sizes
from kronfisher.linalg import mirror
from kronfisher.operators import Kronecker
from kronfisher.samples import Samples

__all__ = ["TKFAC"]


@dataclass(frozen=True)
class TKFAC(Fit):
    """``F ≈ (Σ G_k G_kᵀ) ⊗ (Σ G_kᵀ G_k) / tr F``, whose trace is that of the block.

    For T = 1 this is TKFAC (Gao et al. 2020): ``B ∝ Σ ‖a_k‖² g gᵀ`` and ``A ∝ Σ ‖g_k‖² a aᵀ``, at K-FAC's cost. For
    shared weights it keeps the cross terms between the positions of a sample, which TKFAC drops; these sums over the
    gradients of single data are what Shampoo takes of mini-batch gradients, without its square root. Exact wherever the
    block is one Kronecker product. Each group of a convolution keeps its own trace.

    Example:
        >>> import torch, kronfisher as kf
        >>> layer, x = torch.nn.Linear(2, 3), torch.randn(50, 2)
        >>> fisher, exact = (kf.estimate(layer, x, kf.Gaussian(), fit=f, labels="exact") for f in ("tkfac", "full"))
        >>> fisher["weight"].structure, bool((fisher.trace() / exact.trace() - 1).abs() < 1e-5)
        ('kronecker 3x3', True)
    """

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        heads, outputs, inputs = sizes(group)
        return Plan(2 * element * elements(heads, inputs**2 + outputs**2))

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> State:
        heads, outputs, inputs = sizes(group)
        sums = {"inputs": like.new_zeros(heads, inputs, inputs), "outputs": like.new_zeros(heads, outputs, outputs)}
        return State(group, plan, sums)

    def update(self, state: State, samples: tuple[Samples, ...]) -> State:
        (use,) = samples
        if use.first:
            state.rows = state.rows + use.rows
        use.add_input_products_(state.sums["inputs"])
        use.add_output_products_(state.sums["outputs"])
        return state

    def finish(self, state: State) -> Kronecker:
        state.checked()
        inputs, outputs = mirror(state.sums["inputs"]), mirror(state.sums["outputs"], reciprocal(state.count))
        trace = inputs.diagonal(dim1=1, dim2=2).sum(1)
        scale = torch.where(trace > 0, 1 / trace, torch.zeros_like(trace))
        return Kronecker(inputs * scale[:, None, None], outputs, name=state.name)


register("tkfac", TKFAC)
