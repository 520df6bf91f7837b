"""Running statistics of batch normalisation that belong to the average of the iterates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from kronfisher.optim.foreach import add_, clamp_min_, copy_, differences, mul_
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
        places: dict[object, list[tuple[str, _BatchNorm]]] = {}
        for prefix, module in self._found:
            assert module.running_mean is not None
            alike = module.running_mean.device, module.running_mean.dtype, module.momentum
            places.setdefault(alike, []).append((prefix, module))
        for together in places.values():
            self._add(together, share)

    def _add(self, found: Sequence[tuple[str, _BatchNorm]], share: Tensor) -> None:
        """Add the batches of layers of one dtype, device and momentum, all at once: they are many and small."""
        counts = [f"{prefix}num_batches_tracked" for prefix, _ in found]
        tracked = torch.stack([module.num_batches_tracked for _, module in found])  # pyright: ignore[reportArgumentType]
        none = torch.zeros_like(tracked[0])
        counted = tracked - torch.stack([self.before.get(name, none) for name in counts])
        for kind in KINDS:
            for prefix, module in found:
                if (name := prefix + kind) not in self.before:
                    values = getattr(module, kind)
                    self.averages[name], self.before[name] = values.clone(), values.clone()
        momentum = found[0][1].momentum
        weight = 1 - (1 - counted / tracked if momentum is None else (1 - momentum) ** counted)
        moved = (counted > 0) & (weight > 0)
        share, like = share.to(weight), getattr(found[0][1], KINDS[0])
        gains = torch.where(moved, share / weight, 0.0).to(like).unbind()
        parts = torch.where(moved, share, 0.0).to(like).unbind()
        for kind in KINDS:
            names, values = [prefix + kind for prefix, _ in found], [getattr(module, kind) for _, module in found]
            own, before = [self.averages[name] for name in names], [self.before[name] for name in names]
            steps = differences(before, own), differences(values, before)
            for step, factors in zip(steps, (parts, gains), strict=True):
                mul_(step, factors)
                add_(own, step)
            if kind == "running_var":
                clamp_min_(own, 0.0)
            copy_(before, values)
        self.before |= zip(counts, tracked.unbind(), strict=True)

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
