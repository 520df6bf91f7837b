"""Steps of a drawn network: a function of torch in one form, with parameters that are seen through functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.drawn.batches import Batch
from tests.helpers.drawn.seen import SEEN, Shape

__all__ = ["WAYS", "Branch", "Built", "Decided", "Parameter", "Step"]


@dataclass(frozen=True)
class Parameter:
    """An argument that is the step's parameter of this name, seen in some way as a weight of this shape.

    Attributes:
        picked: the batch's ids pick rows of it.
    """

    name: str
    seen: str
    shape: Shape
    picked: bool = False


def _view_in_place(h: Tensor) -> Tensor:
    h.flatten(1)[:, :1].mul_(2)
    return h


def _part(f: Callable, h: Tensor) -> Tensor:
    with torch.no_grad():
        constant = f(h.sin())
    return f(h) * (1 + constant.tanh())


def _some_rows(f: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    """As of an expert, which gets the rows that are routed to it: examples have unequal numbers of them."""
    rows = h.flatten(0, -2)
    chosen = (rows[:, 0] > rows[:, 0].mean() - 1e-9).nonzero()[:, 0]
    answer = f(rows[chosen])
    return answer.new_zeros(len(rows), *answer.shape[1:]).index_put((chosen,), answer).unflatten(0, h.shape[:-1])


# What is done with a step.
WAYS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "once": lambda f, h: f(h),
    "residual": lambda f, h: h + f(h),
    "in place after": lambda f, h: f(h).tanh_(),
    "view in place": lambda f, h: _view_in_place(f(h)),
    "input in place after": lambda f, h: f(y := h.clone()) + y.sin_(),
    "twice": lambda f, h: f(f(h)),
    "two branches": lambda f, h: f(h) + f(h.sin()),
    "sequence first": lambda f, h: f(h.transpose(0, 1)).transpose(0, 1),
    "flat": lambda f, h: f(h.flatten(0, 1)).unflatten(0, h.shape[:2]),
    "examples last": lambda f, h: f(h.movedim(0, -1)).movedim(-1, 0),
    "checkpoint": lambda f, h: checkpoint(f, h, use_reentrant=False),
    "partly without gradient": lambda f, h: _part(f, h),
    "with images": lambda f, h: f(h.unsqueeze(1)).flatten(1, 2),
    "one by one": lambda f, h: torch.cat([f(row) for row in h.split(1)]),
    "some rows": lambda f, h: _some_rows(f, h),
    "last half": lambda f, h: torch.cat([h[:, :1], f(h)[:, :1]], 1),
}


class Step(nn.Module):
    """One function in one form."""

    def __init__(
        self,
        name: str,
        function: Callable,
        arguments: tuple,
        options: dict[str, Any],
        parameters: dict[str, Tensor],
        way: str = "once",
    ) -> None:
        super().__init__()
        self.name, self.function, self.arguments, self.options, self.way = name, function, arguments, options, way
        for key, value in parameters.items():
            self.register_parameter(key, value)  # type: ignore[arg-type]

    def _fill(self, value: Any, h: Tensor, batch: Batch) -> Any:
        if isinstance(value, Parameter):
            shown = SEEN[value.seen].shown(getattr(self, value.name), value.shape)
            return shown[batch.ids[:, 0]] if value.picked else shown
        if isinstance(value, list):
            return [self._fill(each, h, batch) for each in value]
        if not isinstance(value, str):
            return value
        known = {"h": lambda: h, "h'": lambda: h.tanh(), "ids": lambda: batch.ids, "id": lambda: batch.ids[:, 0]}
        return known[value]() if value in known else value

    def _call(self, h: Tensor, batch: Batch) -> Tensor:
        result = self.function(*(self._fill(value, h, batch) for value in self.arguments), **self.options)
        return result if isinstance(result, Tensor) else result[0]

    def forward(self, h: Tensor, batch: Batch) -> Tensor:
        return WAYS[self.way](lambda h: self._call(h, batch), h)


class Built(Step):
    """A module of torch."""

    def __init__(self, name: str, module: nn.Module, arguments: tuple, way: str = "once") -> None:
        super().__init__(name, module, arguments, {}, {}, way)


class Decided(Step):
    """Settings of the batch decide."""

    def __init__(self, name: str, function: Callable) -> None:
        super().__init__(name, function, (), {}, {})

    def _call(self, h: Tensor, batch: Batch) -> Tensor:
        return self.function(h, batch.settings)


class Branch(nn.Module):
    """One of two steps, as the batch says."""

    way = "once"

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.name = f"branch [{first.name} | {second.name}]"

    def forward(self, h: Tensor, batch: Batch) -> Tensor:
        return (self.second if batch.settings.cut % 2 else self.first)(h, batch)
