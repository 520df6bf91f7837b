"""K-FAC: one Kronecker product per layer from the second moments of inputs and output gradients."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kronfisher.fisher.blocks import Block
from kronfisher.fits.fit import (
    MAX_DIM,
    Fit,
    Plan,
    Shapes,
    State,
    checked_max_dim,
    elements,
    reciprocal,
    register,
    side_shapes,
)
from kronfisher.layers.samples import Samples
from kronfisher.operators import Factor, Kronecker

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
        max_dim: sides beyond this size (a vocabulary, a table of positions) are kept as their diagonals, which the
            report says; at 10,240 a matrix takes 400 MiB in float32. Where inputs are looked up in a table their side
            is diagonal anyway, and that is exact under ``"expand"``.

    Raises:
        ValueError: another mode, or a `max_dim` that is no size.

    Example:
        >>> import torch, kronfisher as kf
        >>> layer = torch.nn.Linear(2, 3)
        >>> fisher = kf.estimate(layer, torch.randn(50, 2), kf.Gaussian(), fit=kf.KFAC(), labels="exact")
        >>> fisher["weight"].structure
        'kronecker 3x3'
    """

    mode: Literal["expand", "reduce"] = "expand"
    max_dim: int = MAX_DIM

    def __post_init__(self) -> None:
        if self.mode not in ("expand", "reduce"):
            raise ValueError(f"KFAC(mode={self.mode!r}): use 'expand' or 'reduce'.")
        checked_max_dim(self)

    def __repr__(self) -> str:
        own = f", max_dim={self.max_dim}" if self.max_dim != KFAC.max_dim else ""
        return f"KFAC(mode={self.mode!r}{own})"

    def sides(self, group: tuple[Block, ...]) -> Shapes:
        """Shapes of the input and of the output side: ``[H, n, n]``, or ``[H, n]`` for a diagonal."""
        return side_shapes(group, self.max_dim, summed=self.mode == "reduce")

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        inputs, outputs = self.sides(group)
        return Plan(2 * element * (elements(*inputs) + elements(*outputs)), by_example=self.mode == "reduce")

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> State:
        inputs, outputs = self.sides(group)
        return State(group, plan, {"inputs": like.new_zeros(inputs), "outputs": like.new_zeros(outputs)})

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
        inputs = Factor.of(state.sums["inputs"]).mirror(reciprocal(state.rows))
        outputs = Factor.of(state.sums["outputs"]).mirror(reciprocal(state.count))
        return Kronecker(inputs.tensor, outputs.tensor, name=state.name)


register("kfac", KFAC)
register("kfac-reduce", lambda: KFAC("reduce"))
