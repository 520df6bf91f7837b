"""Averages of the iterates and growing batches, for the end of training with noisy gradients."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.errors import DataError, require_integer

__all__ = ["IterateAverage", "batch_size_at"]


class IterateAverage:
    """The moving average ``θ̄ ← ξ θ̄ + (1 − ξ) θ`` of the parameters, with ``ξ = min(1 − 1/k, decay)``.

    Call `update` after every step, from some step on; compare the model's loss with and without `applied`.

    Args:
        model: whose trainable parameters are averaged.
        decay: the largest ξ.

    Raises:
        ValueError: the decay is not in [0, 1).

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> average = IterateAverage(model)
        >>> for value in (1.0, 3.0):
        ...     _ = torch.nn.init.constant_(model.weight, value)
        ...     average.update()
        >>> with average.applied():
        ...     print(model.weight.item())
        2.0
        >>> model.weight.item()
        3.0
    """

    def __init__(self, model: nn.Module, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: use a number in [0, 1).")
        self.decay, self.steps = decay, 0
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._averages = {name: torch.zeros_like(p) for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Add the present parameters to the average."""
        self.steps += 1
        share = 1 - min(1 - 1 / self.steps, self.decay)
        for name, average in self._averages.items():
            average.lerp_(self._parameters[name], share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with averaged parameters; its own are restored at the end.

        Raises:
            DataError: nothing was averaged yet.
        """
        if not self.steps:
            raise DataError("no iterate was averaged yet; call update() after steps first")
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._write(self._averages)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._parameters[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The averages and the number of iterates in them."""
        return {"steps": self.steps, "averages": dict(self._averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            DataError: it was saved for other parameters.
        """
        if state["averages"].keys() != self._averages.keys():
            raise DataError("the averages were saved for other parameters than these")
        self.steps = state["steps"]
        for name, average in self._averages.items():
            average.copy_(state["averages"][name])


def batch_size_at(step: int, first: int, last: int, steps: int) -> int:
    """A batch size that grows exponentially from `first` at step 0 to `last` at step `steps`, and stays there.

    Early on the gradient is large beside its noise, so that a small batch suffices; near the optimum it is not (Martens
    & Grosse 2015, section 13).

    Raises:
        ValueError: a size or the number of steps is not positive, or the batch would shrink.

    Example:
        >>> [batch_size_at(step, 1000, 8000, 300) for step in (0, 100, 200, 300, 400)]
        [1000, 2000, 4000, 8000, 8000]
    """
    given = {"step": step, "first": first, "last": last, "steps": steps}
    step, first, last, steps = (require_integer(name, n, -math.inf, "use an integer") for name, n in given.items())
    if not 0 < first <= last or steps < 1:
        raise ValueError(f"first={first}, last={last}, steps={steps}: 0 < first ≤ last and steps ≥ 1 are needed.")
    return min(last, round(first * (last / first) ** (step / steps))) if step < steps else last
