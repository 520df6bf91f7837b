"""What the scatter of the iterates about their average costs: while it is little, noise is no reason to go slower."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor

from kronfisher.optim.misfit import KNOWN

__all__ = ["Scatter"]

MEMORY = 0.9  # of the average of the cost
DEAR = 0.08  # the cost, over how far the loss can fall, from which on rates have no freedom
CHEAP = 0.2  # the cost, over how far the loss can fall, up to which steps that only overshoot are welcome
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
    _bounds: tuple[Tensor, Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    def settle(self, leaps: Tensor) -> None:
        """Count one step; whether it comes just after a leap, 0-dim (`Misfit`)."""
        self.settled = (self.settled.to(leaps.device) + 1 / SETTLING).clamp_(max=1.0).masked_fill_(leaps, 0.0)

    def update(self, product: Tensor, finite: Tensor) -> None:
        """Take over ``⟨g, θ − θ̄⟩`` of one step, 0-dim, unless its gradient is not finite."""
        cost = self.cost.to(product)
        self.cost = torch.where(finite & (product.abs() < inf), cost.lerp(product, 1 - MEMORY), cost)

    def room(self, excess: Tensor) -> Tensor:
        """The share of their freedom that rates have, 0-dim: one where the scatter costs nothing.

        Zero where it is dear, just after a leap, or if it is not known how far the loss can fall.

        Args:
            excess: by how much the mean loss exceeds the least that there could be, 0-dim.
        """
        known, dear = self._of(excess)
        return self.settled * (1 - self.cost / dear).clamp_(0, 1) * known

    def cheap(self, excess: Tensor, left: Tensor) -> Tensor:
        """How far the scatter is so cheap that steps may overshoot, 0-dim: the average takes that out.

        One up to a fifth of the excess, zero from two fifths, and where `room` is zero without any cost. Costs count
        for more where less is left to fit: the average forgets sooner there (`Average`), and shows less of the scatter.

        Args:
            excess: as in `room`.
            left: u, the share of the data that is left to fit, 0-dim.
        """
        known, dear = self._of(excess)
        bound = (dear * left.sqrt()).mul_(CHEAP / DEAR).clamp_min_(torch.finfo(dear.dtype).tiny)
        return self.settled * (2 - self.cost / bound).clamp_(0, 1) * known

    def _of(self, excess: Tensor) -> tuple[Tensor, Tensor]:
        """Whether an excess is known, and the cost that is dear; it is the same for many steps."""
        if self._bounds is None or self._bounds[0] is not excess:
            known = (excess > 0) & (excess < KNOWN)
            self._bounds = excess, known, torch.where(known, DEAR * excess, 1.0)
        return self._bounds[1:]

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs."""
        return {"cost": self.cost, "settled": self.settled}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over what `state_dict` gave; earlier versions gave nothing."""
        self.cost = state.get("cost", torch.zeros(())).to(device)
        self.settled = state.get("settled", torch.ones(())).to(device)
