"""What the scatter of the iterates about their average costs: while it is little, noise is no reason to go slower."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kronfisher.optim.misfit import KNOWN

__all__ = ["Scatter"]

MEMORY = 0.9  # of the average of the cost
DEAR = 0.08  # the cost, over how far the loss can fall, from which on rates have no freedom
SETTLING = 100  # steps without a leap after which all is as before one


@dataclass
class Scatter:
    """``n = EMA(⟨g, θ − θ̄⟩)`` with the average θ̄ of the iterates: twice what a quadratic loss loses by its scatter.

    An average of iterates has little noise whatever the rate, as long as the loss is quadratic where they scatter
    (Polyak & Juditsky 1992). Where n is small beside the excess of the loss, it is; rates then may grow, and need not
    fall where noise alone has turned gradients against their path. A rule of this library's own.

    Attributes:
        cost: n, 0-dim.
        settled: how far training has settled since its last leap, 0-dim: 0 at one, 1 long after it. Losses that leap,
            as of rates that are exponentials, are not quadratic where iterates scatter.
    """

    cost: Tensor = field(default_factory=lambda: torch.zeros(()))
    settled: Tensor = field(default_factory=lambda: torch.ones(()))

    def settle(self, calm: Tensor) -> None:
        """Count one step; `calm` is below one after a leap (`Misfit`)."""
        self.settled = torch.where(calm < 1, 0.0, (self.settled.to(calm) + 1 / SETTLING).clamp(max=1.0))

    def update(self, product: Tensor, finite: Tensor) -> None:
        """Take over ``⟨g, θ − θ̄⟩`` of one step, 0-dim, unless its gradient is not finite."""
        cost = self.cost.to(product)
        self.cost = torch.where(finite & torch.isfinite(product), cost.lerp(product, 1 - MEMORY), cost)

    def room(self, excess: Tensor) -> Tensor:
        """The share of their freedom that rates have, 0-dim: one where the scatter costs nothing.

        Zero where it is dear, just after a leap, or if it is not known how far the loss can fall.

        Args:
            excess: by how much the mean loss exceeds the least that there could be, 0-dim.
        """
        share = self.settled * (1 - self.cost / (DEAR * excess)).clamp(0, 1)
        return torch.where((excess > 0) & (excess < KNOWN), share, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over what `state_dict` gave; earlier versions gave nothing."""
        self.cost = state.get("cost", torch.zeros(())).to(device)
        self.settled = state.get("settled", torch.ones(())).to(device)
