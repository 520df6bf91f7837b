"""Fits that build no operator: they observe the samples of every block."""

from dataclasses import dataclass

from torch import Tensor

from kronfisher.fisher.blocks import Block
from kronfisher.fits.fit import Fit
from kronfisher.fits.plan import Plan
from kronfisher.fits.state import State

__all__ = ["Visitor"]


@dataclass(frozen=True, eq=False)
class Visitor(Fit):
    """Base of fits that build no operator."""

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        """No bytes: only the subclass knows what it keeps."""
        return Plan(0)

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> State:
        """No sums."""
        return State(group, plan)
