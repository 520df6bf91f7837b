"""The diagonal of a block: one number per weight."""

from dataclasses import dataclass

from torch import Tensor

from kronfisher.fisher.blocks import Block
from kronfisher.fits.fit import Fit
from kronfisher.fits.plan import Plan
from kronfisher.fits.registry import register
from kronfisher.fits.shapes import elements, sizes
from kronfisher.fits.state import State, Total, reciprocal
from kronfisher.layers.samples import Samples
from kronfisher.operators import Diagonal as DiagonalOperator

__all__ = ["Diagonal"]


@dataclass(kw_only=True)
class Squares(State):
    """``Σ_k G_k∘²`` ``[H, O, I]``."""

    squares: Total


@dataclass(frozen=True)
class Diagonal(Fit):
    """The exact diagonal ``Σ_k G_k∘²`` of a block; everything beside it is dropped.

    Example:
        >>> import torch, kronfisher as kf
        >>> layer = torch.nn.Linear(2, 3)
        >>> fisher = kf.estimate(layer, torch.randn(50, 2), kf.Gaussian(), fit="diagonal", labels="exact")
        >>> fisher["bias"].structure
        'diagonal 9'
    """

    exact = True

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        return Plan(element * elements(*sizes(group)))

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> Squares:
        return Squares(group, plan, squares=like.new_zeros(sizes(group)))

    def takes_columns(self, block: Block) -> bool:
        return True

    def update(self, state: Squares, samples: tuple[Samples, ...]) -> Squares:
        (use,) = samples
        state.squares += use.squares()
        return state

    def finish(self, state: Squares) -> DiagonalOperator:
        state.check()
        return DiagonalOperator((state.squares * reciprocal(state.count)).flatten(), name=state.name)


register("diagonal", Diagonal, "the diagonal alone", "diagonal")
