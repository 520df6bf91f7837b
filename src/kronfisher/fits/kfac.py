"""K-FAC: one Kronecker product per layer from the second moments of inputs and output gradients."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from kronfisher.fisher.blocks import Block
from kronfisher.fits.fit import Fit
from kronfisher.fits.plan import Plan
from kronfisher.fits.registry import register
from kronfisher.fits.shapes import MAX_DIM, Shapes, check_max_dim, elements, factor_shapes
from kronfisher.fits.state import FactorSums, reciprocal
from kronfisher.layers.samples import Samples
from kronfisher.linalg import unwritten_zeros
from kronfisher.operators import Factor, Kronecker

__all__ = ["KFAC"]


@dataclass(frozen=True)
class KFAC(Fit):
    """``F ≈ (Σ g gᵀ) ⊗ (Σ a aᵀ) / rows``, sums over examples, positions and label draws; a counts once per example.

    For convolutions this is KFC (Grosse & Martens 2016); for weights shared over positions it is K-FAC-expand. It is
    exact for one example with T = 1, and for deep linear networks with a Gaussian likelihood.

    Args:
        mode: ``"expand"`` treats positions as if they were independent examples; ``"reduce"`` sums them out first,
            ``a ← Σ_t a``, ``g ← (1/T) Σ_t g`` (Eschenhagen et al. 2023), exact where positions are summed or averaged
            at the end.
        max_dim: factors beyond this size (a vocabulary, a table of positions) are kept as their diagonals, which the
            report says; at 10,240 a matrix takes 400 MiB in float32. Where inputs are looked up in a table their
            factor is diagonal anyway, and that is exact under ``"expand"``.
        max_outputs: the same for output factors alone, if it is less. Those of many outputs cost much, and are nearly
            diagonal where the outputs are a model's own.

    Raises:
        ValueError: another mode, or a `max_dim` or `max_outputs` that is no size.

    Example:
        >>> import torch, kronfisher as kf
        >>> layer = torch.nn.Linear(2, 3)
        >>> fisher = kf.estimate(layer, torch.randn(50, 2), kf.Gaussian(), fit=kf.KFAC(), labels="exact")
        >>> fisher["weight"].structure
        'kronecker 3x3'
    """

    mode: Literal["expand", "reduce"] = "expand"
    max_dim: int = MAX_DIM
    max_outputs: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("expand", "reduce"):
            raise ValueError(f"KFAC(mode={self.mode!r}): use 'expand' or 'reduce'.")
        check_max_dim(self)

    def __repr__(self) -> str:
        own = f", max_dim={self.max_dim}" if self.max_dim != KFAC.max_dim else ""
        outputs = f", max_outputs={self.max_outputs}" if self.max_outputs is not None else ""
        return f"KFAC(mode={self.mode!r}{own}{outputs})"

    def sides(self, group: tuple[Block, ...]) -> Shapes:
        """Shapes of the input and of the output factor: ``[H, n, n]``, or ``[H, n]`` for a diagonal."""
        return factor_shapes(group, self.max_dim, max_outputs=self.max_outputs, summed=self.mode == "reduce")

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        inputs, outputs = self.sides(group)
        return Plan(2 * element * (elements(*inputs) + elements(*outputs)), by_example=self.mode == "reduce")

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> FactorSums:
        inputs, outputs = self.sides(group)
        zeros = partial(unwritten_zeros, like)
        return FactorSums(group, plan, inputs=zeros(inputs), outputs=zeros(outputs))

    def takes_columns(self, block: Block) -> bool:
        return self.mode == "expand"

    def update(self, state: FactorSums, samples: tuple[Samples, ...]) -> FactorSums:
        (use,) = samples
        if self.mode == "reduce":
            use = use.reduce()
        if use.first:
            use.add_input_covariance_(state.inputs)
            state.rows = state.rows + use.rows
        use.add_output_covariance_(state.outputs)
        return state

    def finish(self, state: FactorSums) -> Kronecker:
        state.check()
        inputs = Factor.of(state.inputs).mirror(reciprocal(state.rows))
        outputs = Factor.of(state.outputs).mirror(reciprocal(state.count))
        return Kronecker(inputs.tensor, outputs.tensor, name=state.name)


register("kfac", KFAC, "one Kronecker product a layer (K-FAC, KFC)", "K-FAC")
register("kfac-reduce", lambda: KFAC("reduce"), "the same, positions summed out first", "K-FAC-reduce")
