"""The average of the iterates, which takes the place of the weights while a model is evaluated."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.fisher.parameters import fingerprint
from kronfisher.optim.foreach import lerp_to_each_
from kronfisher.optim.layerwise.running import RunningStatistics

__all__ = ["Average"]

SPAN = 13.0  # the newest iterate's weight is 13 / (k + 12): the average looks back over a thirteenth of the steps


@dataclass
class Average:
    """``θ̄ ← θ̄ + min(1, 13/((k + 12) √u)) (θ − θ̄)`` of all trained parameters.

    u is the share that is left to fit (`Misfit`).

    Attributes:
        steps: k.
        averages: by name; while evaluating, the model holds the averages and this the iterates.
        evaluating: whether the model holds the averages.
        shown: fingerprint of the averages that it was given for that.
        running: the running statistics of batch normalisation that belong to the averages.
    """

    steps: int = 0
    averages: dict[str, Tensor] = field(default_factory=dict)
    evaluating: bool = False
    shown: str = ""
    running: RunningStatistics = field(default_factory=RunningStatistics)

    @torch.no_grad()
    def update(self, model: nn.Module, parameters: Mapping[str, Tensor], left: Tensor, *, look: bool = True) -> None:
        """Add the present iterate.

        Args:
            model: whose batch normalisation counts.
            parameters: of the model, by name.
            left: the share of the data that is left to fit, 0-dim: as it falls, older iterates are forgotten sooner.
            look: whether to look for batch normalisation, which those of the last time may have been joined by.
        """
        self.steps += 1
        share = (SPAN / ((self.steps + SPAN - 1) * left.sqrt())).clamp(max=1.0)
        for name in parameters.keys() - self.averages.keys():
            self.averages[name] = parameters[name].detach().clone()
        shares = {kind: share.to(kind) for kind in {one.dtype for one in parameters.values()}}
        weights = [shares[one.dtype] for one in parameters.values()]
        lerp_to_each_([self.averages[name] for name in parameters], list(parameters.values()), weights)
        self.running.update(model, share, look=look)

    @torch.no_grad()
    def swap(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> bool:
        """Exchange the averages and what the model holds, unless other weights took the place of the averages.

        Returns:
            Whether they were exchanged. Otherwise the model keeps what it holds, and the average begins anew.
        """
        tensors = {name: tensor for name, tensor in _tensors(parameters).items() if name in self.averages}
        self.evaluating = not self.evaluating
        if not self.evaluating and self.shown not in ("", fingerprint(tensors)):
            self.averages, self.shown, self.running = {}, "", RunningStatistics()
            return False
        for name, tensor in tensors.items():
            kept = tensor.clone()
            tensor.copy_(self.averages[name])
            self.averages[name].copy_(kept)
        self.running.swap(model)
        self.shown = fingerprint(tensors) if self.evaluating else ""
        return True

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs."""
        own = {"steps": self.steps, "averages": dict(self.averages)}
        return {**own, "evaluating": self.evaluating, "shown": self.shown, "running": self.running.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over what `state_dict` gave."""
        self.steps, self.evaluating = state["steps"], state["evaluating"]
        self.shown = state.get("shown", "")  # earlier versions did not say
        self.averages = {name: tensor.to(device) for name, tensor in state["averages"].items()}
        self.running.load_state_dict(state.get("running", {}), device)


def _tensors(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in parameters.items()}
