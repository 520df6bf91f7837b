"""Building blocks of the networks: layers with names, and initial weights by a seed of their own."""

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def with_seed(build: Callable[..., Model]) -> Callable[..., Model]:
    """Give the builder of a network the keyword argument `seed` (default 0), which alone decides the initial weights.

    Example:
        >>> build = with_seed(lambda: nn.Linear(1, 1))
        >>> build(seed=3).weight.item() == build(seed=3).weight.item() != build(seed=4).weight.item()
        True
    """

    @wraps(build)
    def build_with_seed(*args: Any, seed: int = 0, **kwargs: Any) -> Model:
        # The networks are built on the CPU, so its generator is the only one to save.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(*args, **kwargs)

    return build_with_seed


def stack(**layers: list[nn.Module]) -> nn.Sequential:
    """The layers one after another: a module with parameters is called as its keyword, what follows it by its kind.

    Example:
        >>> stack(first=[nn.Linear(2, 3), nn.ReLU()], second=[nn.Linear(3, 1)])
        Sequential(
          (first): Linear(in_features=2, out_features=3, bias=True)
          (relu1): ReLU()
          (second): Linear(in_features=3, out_features=1, bias=True)
        )
    """
    named = OrderedDict[str, nn.Module]()
    for k, (name, (first, *rest)) in enumerate(layers.items(), start=1):
        named[name] = first
        named |= {f"{type(module).__name__.lower()}{k}": module for module in rest}
    return nn.Sequential(named)


def prepend(reshape: nn.Module, model: nn.Module) -> nn.Sequential:
    """The model behind `reshape`; the names of a sequence's layers stay as they are.

    Example:
        >>> prepend(nn.Flatten(), stack(first=[nn.Linear(2, 3)]))
        Sequential(
          (reshape): Flatten(start_dim=1, end_dim=-1)
          (first): Linear(in_features=2, out_features=3, bias=True)
        )
    """
    layers = model.named_children() if isinstance(model, nn.Sequential) else [("model", model)]
    return nn.Sequential(OrderedDict([("reshape", reshape), *layers]))
