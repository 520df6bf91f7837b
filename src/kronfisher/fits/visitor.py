"""Fits that make no operator: they are shown the samples of every block and do with them what they like."""

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
        """No bytes: what is kept, and how much, is known only to the subclass."""
        return Plan(0)

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> State:
        """No sums."""
        return State(group, plan)
