"""Running statistics of batch normalisation that belong to the average of the iterates."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from kronfisher.optim.normalisation import KINDS, normalisations

__all__ = ["RunningStatistics"]


@dataclass
class RunningStatistics:
    """Averages of the batches' means and variances, with the shares that the iterates have in theirs.

    A model's own running statistics look back over a fixed number of batches, ten by default. Early in training they
    are those of a network of before, and the loss in evaluation mode rises while that of training falls; late they are
    of fewer iterates than the average. What the batches of a step had follows from how far the running statistics
    moved: ``s = R + (R' − R)/w`` with ``w = 1 − (1 − momentum)^n`` after n batches.

    Attributes:
        averages: of s, by the name of the buffer; while evaluating, the model holds them and this its own.
        before: R, and how many batches are in it, by the name of the buffer.
    """

    averages: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)
    _found: list[tuple[str, _BatchNorm]] | None = field(default=None, init=False, repr=False)

    @torch.no_grad()
    def update(self, model: nn.Module, share: Tensor, *, look: bool = True) -> None:
        """Add the batches since the last call.

        Args:
            model: whose layers of batch normalisation count; those that have seen no batch since are as before.
            share: of the present iterate in the average of the iterates, 0-dim.
            look: whether the model may have others than the last time: to go over all modules takes long.
        """
        if look or self._found is None:
            self._found = list(normalisations(model))
        for prefix, module in self._found:
            tracked = module.num_batches_tracked
            assert tracked is not None
            counted = tracked - self.before.get(f"{prefix}num_batches_tracked", torch.zeros_like(tracked))
            kept = 1 - counted / tracked if module.momentum is None else (1 - module.momentum) ** counted
            weight = 1 - kept
            moved = (counted > 0) & (weight > 0)
            gain = torch.where(moved, share.to(weight) / weight, 0.0)
            part = torch.where(moved, share.to(weight), 0.0)
            for kind in KINDS:
                name, values = prefix + kind, getattr(module, kind)
                before = self.before.get(name)
                if before is None:
                    self.averages[name] = values.clone()
                else:
                    own = self.averages[name]
                    own.add_(part.to(own) * (before - own)).add_(gain.to(own) * (values - before))
                    if kind == "running_var":
                        own.clamp_min_(0)
                self.before[name] = values.clone()
            self.before[f"{prefix}num_batches_tracked"] = tracked.clone()

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the averages and what the model holds."""
        for prefix, module in normalisations(model):
            for kind in KINDS:
                if (average := self.averages.get(prefix + kind)) is not None:
                    values = getattr(module, kind)
                    kept = values.clone()
                    values.copy_(average)
                    average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs."""
        return {"averages": dict(self.averages), "before": dict(self.before)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over what `state_dict` gave."""
        self.averages, self.before = (
            {name: tensor.to(device) for name, tensor in state.get(key, {}).items()} for key in ("averages", "before")
        )
