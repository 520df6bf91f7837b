"""The parameters that a step changes, with their options and last steps: writes a step, and takes it back."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.optim.direction import Descent
from kronfisher.optim.step_size import StepLength

__all__ = ["TrainedParameters"]


@dataclass(frozen=True)
class TrainedParameters:
    """All parameters of an optimiser, at one step.

    Attributes:
        named: name → parameter.
        rates: name → learning rate.
        decays: name → weight decay η, for which ``½ η ‖θ‖²`` is added to the loss.
        state: parameter → what torch's optimiser keeps for it: the last step δ₀.
    """

    named: Mapping[str, nn.Parameter]
    rates: Mapping[str, float]
    decays: Mapping[str, float]
    state: Mapping[Any, dict[str, Any]]

    def gradients(self) -> dict[str, Tensor]:
        """Name → ``.grad``, dense, where there is one."""
        gradients = {name: p.grad for name, p in self.named.items() if p.grad is not None}
        return {name: g if g.layout is torch.strided else g.to_dense() for name, g in gradients.items()}

    def add_decay(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradients with that of weight decay."""
        decays = self.decays
        return {n: g.add(self.named[n], alpha=decays[n]) if decays[n] else g for n, g in gradients.items()}

    def last_steps(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Name → last step δ₀, for those that made one."""
        states = {name: self.state[self.named[name]] for name in names}
        return {name: state["update"] for name, state in states.items() if "update" in state}

    def apply(self, descent: Descent, last: Mapping[str, Tensor], length: StepLength) -> None:
        """Add ``−along·natural + again·last``; `descent` and `last` are used up."""
        along = length.along
        for name, direction in descent.natural.items():
            if isinstance(along, Tensor):
                direction.mul_(along)
            step = last[name].mul_(length.again) if name in last else torch.zeros_like(direction)
            step.add_(direction, alpha=-1.0 if isinstance(along, Tensor) else -along)
            self.named[name].add_(step)
            self.state[self.named[name]]["update"] = step
        torch.clear_autocast_cache()  # it may hold the weights as they were

    def take_back(self) -> None:
        """Subtract the last step."""
        for parameter in self.named.values():
            if (update := self.state[parameter].pop("update", None)) is not None:
                parameter.sub_(update)

    def copies(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Name → a copy of the parameter."""
        return {name: self.named[name].clone() for name in names}

    def restore(self, copies: Mapping[str, Tensor]) -> None:
        """Undo a step bit for bit, with copies from before it."""
        for name, old in copies.items():
            self.named[name].copy_(old)
            self.state[self.named[name]].pop("update", None)

    def add_penalty(self, change: float, copies: Mapping[str, Tensor]) -> float:
        """A change of the loss, with that of weight decay's penalty since the copies were made."""
        for name, old in copies.items():
            if decay := self.decays[name]:
                squares = self.named[name].square().sum(dtype=torch.float64) - old.square().sum(dtype=torch.float64)
                change += decay / 2 * float(squares)
        return change
