"""K-FAC: one Kronecker product per layer from the second moments of inputs and output gradients."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kronfisher.blocks import Block
from kronfisher.fits.fit import Fit, Plan, State, elements, reciprocal, register, sizes
from kronfisher.linalg import mirror
from kronfisher.operators import Kronecker
from kronfisher.samples import Samples

__all__ = ["KFAC"]


@dataclass(frozen=True)
class KFAC(Fit):
    """``F ≈ (Σ g gᵀ) ⊗ (Σ a aᵀ) / rows``, sums over data, positions and label draws; a counts once per datum.

    For convolutions this is KFC (Grosse & Martens 2016); for weights shared over positions it is K-FAC-expand. It is
    exact for one datum with T = 1, and for deep linear networks with a Gaussian likelihood.

    Args:
        mode: ``"expand"`` treats positions as if they were independent data; ``"reduce"`` sums them out first,
            ``a ← Σ_t a``, ``g ← (1/T) Σ_t g`` (Eschenhagen et al. 2023), exact where positions are summed or averaged
            at the end.

    Raises:
        ValueError: another mode.

    Example:
        >>> import torch, kronfisher as kf
        >>> layer = torch.nn.Linear(2, 3)
        >>> fisher = kf.estimate(layer, torch.randn(50, 2), kf.Gaussian(), fit=kf.KFAC(), labels="exact")
        >>> fisher["weight"].structure
        'kronecker 3x3'
    """

    mode: Literal["expand", "reduce"] = "expand"

    def __post_init__(self) -> None:
        if self.mode not in ("expand", "reduce"):
            raise ValueError(f"KFAC(mode={self.mode!r}): use 'expand' or 'reduce'.")

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        heads, outputs, inputs = sizes(group)
        return Plan(2 * element * elements(heads, inputs**2 + outputs**2), owned=self.mode == "reduce")

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> State:
        heads, outputs, inputs = sizes(group)
        sums = {"inputs": like.new_zeros(heads, inputs, inputs), "outputs": like.new_zeros(heads, outputs, outputs)}
        return State(group, plan, sums)

    def update(self, state: State, samples: tuple[Samples, ...]) -> State:
        (use,) = samples
        if self.mode == "reduce":
            use = use.reduced()
        if use.first:
            use.add_input_covariance_(state.sums["inputs"])
            state.rows = state.rows + use.rows
        use.add_output_covariance_(state.sums["outputs"])
        return state

    def finish(self, state: State) -> Kronecker:
        state.checked()
        inputs = mirror(state.sums["inputs"], reciprocal(state.rows))
        outputs = mirror(state.sums["outputs"], reciprocal(state.count))
        return Kronecker(inputs, outputs, name=state.name)


register("kfac", KFAC)
register("kfac-reduce", lambda: KFAC("reduce"))
