"""Each unit's rate, moved by evidence: does the gradient of a new batch still point along the unit's path?"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Rates"]

MEMORY = 0.9  # of the averages of the evidence
SPEED = 0.02  # by how much full agreement lengthens a step, and full contradiction shortens it
SPAN = 100.0  # steps after which the least rate begins to fall
POWER = 0.75  # with which it falls: below every 1/k, so that convex problems converge, and above the square root


@dataclass
class Rates:
    """Factors on the rates of all units, in ``[(1 + k/100)^−3/4, 1]`` at step k.

    ``r = EMA(⟨g, p⟩) / EMA(|⟨g, p⟩|)`` of a new gradient g and the path p of the last steps, taken as gradients point:
    near 1, the path still leads down; near −1, it has gone too far. ``f ← f exp(.02 r)``.

    Attributes:
        factors: f ``[U]``.
        signed: the average of ``⟨g, p⟩``, ``[U]``.
        absolute: the average of its absolute value, ``[U]``.
        steps: k.
    """

    factors: Tensor = field(default_factory=lambda: torch.ones(0))
    signed: Tensor = field(default_factory=lambda: torch.zeros(0))
    absolute: Tensor = field(default_factory=lambda: torch.zeros(0))
    steps: int = 0

    def resize(self, places: list[int | None], device: torch.device) -> None:
        """Reorder the units: for each its place before, or None for a new one."""
        index = [0 if place is None else 1 + place for place in places]

        def chosen(values: Tensor, new: float) -> Tensor:
            return torch.cat([values.new_full((1,), new).to(device), values.to(device)])[index]

        self.factors = chosen(self.factors, 1.0)
        self.signed, self.absolute = chosen(self.signed, 0.0), chosen(self.absolute, 0.0)

    def update(self, products: Tensor, finite: Tensor) -> Tensor:
        """Take over the evidence ``⟨g, p⟩ [U]`` of one step, unless that is not finite; the new factors."""
        signed = self.signed.lerp(products, 1 - MEMORY)
        absolute = self.absolute.lerp(products.abs(), 1 - MEMORY)
        agreement = signed / torch.where(absolute > 0, absolute, 1)
        least = (1 + self.steps / SPAN) ** -POWER
        factors = (self.factors * (SPEED * agreement).exp()).clamp(least, 1.0)
        self.signed = torch.where(finite, signed, self.signed)
        self.absolute = torch.where(finite, absolute, self.absolute)
        self.factors = torch.where(finite, factors, self.factors)
        self.steps += 1
        return self.factors

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over what `state_dict` gave."""
        for key, value in state.items():
            setattr(self, key, value.to(device) if isinstance(value, Tensor) else value)
