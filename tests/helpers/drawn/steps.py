"""Steps of a drawn network: a function of torch in one form, with parameters that are seen through functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.drawn.batches import Batch

__all__ = ["SEEN", "WAYS", "Branch", "Built", "Decided", "Parameter", "Step"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Seen:
    """A way in which a weight comes out of a parameter: the parameter's shape from the weight's, and the way back."""

    stored: Callable[[Shape], Shape]
    shown: Callable[[Tensor, Shape], Tensor]


def _longer(shape: Shape, axis: int, by: int = 1) -> Shape:
    return tuple(n + by * (k == axis % len(shape)) for k, n in enumerate(shape))


def _flat(shape: Shape, columns: int, rows: int = 0) -> Shape:
    return shape[0] + rows, torch.Size(shape[1:]).numel() + columns


def _beside(shape: Shape, rank: int) -> Shape:
    return shape[0] + torch.Size(shape[1:]).numel(), rank


def _outer(p: Tensor, shape: Shape) -> Tensor:
    return p[: shape[0], :1] * p[shape[0] :, 1:].T


def _normed(v: Tensor, g: Tensor) -> Tensor:
    return torch._weight_norm(v, g, 0)  # pyright: ignore[reportPrivateImportUsage]


def _halved(p: Tensor) -> Tensor:
    p[:1].mul_(0.5)
    return p


SEEN: dict[str, Seen] = {
    "as it is": Seen(lambda s: s, lambda p, s: p),
    "transposed": Seen(lambda s: (*s[:-2], s[-1], s[-2]), lambda p, s: p.mT),
    "reversed axes": Seen(lambda s: s[::-1], lambda p, s: p.permute(*range(len(s))[::-1])),
    "sliced": Seen(lambda s: _longer(s, 0, 2), lambda p, s: p[1:-1]),
    "columns": Seen(lambda s: _longer(s, -1), lambda p, s: p[..., 1:]),
    "every other": Seen(lambda s: (2 * s[0], *s[1:]), lambda p, s: p[::2]),
    "flat": Seen(lambda s: (torch.Size(s).numel(),), lambda p, s: p.view(s)),
    "chunk": Seen(lambda s: (2 * s[0], *s[1:]), lambda p, s: p.chunk(2)[1]),
    "split": Seen(lambda s: _longer(s, -1, 2), lambda p, s: p.split([2, s[-1]], -1)[1]),
    "unbound": Seen(lambda s: (2, *s), lambda p, s: p.unbind()[1]),
    "narrowed": Seen(lambda s: _longer(s, -1), lambda p, s: p.narrow(-1, 1, s[-1])),
    "expanded": Seen(lambda s: (1, *s[1:]), lambda p, s: p.expand(s)),
    "one more": Seen(lambda s: s, lambda p, s: 1 + p),
    "doubled": Seen(lambda s: s, lambda p, s: p * 2),
    "exponential": Seen(lambda s: s, lambda p, s: p.exp()),
    "normalised": Seen(lambda s: s, lambda p, s: p / p.norm()),
    "twice": Seen(lambda s: (2, *s), lambda p, s: p[0] + p[1]),
    "detached": Seen(lambda s: s, lambda p, s: p.detach()),
    "partly detached": Seen(lambda s: s, lambda p, s: p + p.detach()),
    "picked": Seen(lambda s: s, lambda p, s: p[torch.arange(s[0]).flip(0)]),
    "flipped": Seen(lambda s: s, lambda p, s: p.flip(-1)),
    "joined": Seen(lambda s: s, lambda p, s: torch.cat([p[:1], p[1:]])),
    "cloned": Seen(lambda s: s, lambda p, s: p.clone()),
    "one less": Seen(lambda s: s, lambda p, s: 1 - p / 2),
    "low rank": Seen(lambda s: _beside(s, 2), lambda p, s: (p[: s[0]] @ p[s[0] :].T).view(s) * 0.5),
    "twice low rank": Seen(lambda s: _beside(s, 2), lambda p, s: (p[: s[0]] @ p[s[0] :].T + _outer(p, s)).view(s)),
    "rows scaled": Seen(lambda s: _flat(s, 1), lambda p, s: (p[:, 1:] * p[:, :1]).reshape(s)),
    "columns scaled": Seen(lambda s: _flat(s, 0, 1), lambda p, s: (p[:1].tanh() - p[1:] * p[:1]).reshape(s)),
    "weight norm": Seen(lambda s: _flat(s, 1), lambda p, s: _normed(p[:, 1:].clone(), p[:, :1]).view(s)),
    "doubled in place": Seen(lambda s: s, lambda p, s: p.clone().mul_(2)),
    "partly in place": Seen(lambda s: s, lambda p, s: _halved(1 + p)),
    "without gradient": Seen(lambda s: s, lambda p, s: torch.no_grad()(torch.Tensor.mul)(p, 2)),
}


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
