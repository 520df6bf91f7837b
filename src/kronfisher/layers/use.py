"""A use: one call of an operator with a trainable weight, and the registry of operators that are understood.

A handler stands for an operator of torch and takes the same arguments after ``view``, which tells whether a tensor is a
window on a trainable parameter (`Window`) or not (None). It answers with the uses that the call makes; none where it
does not understand the call, in which case coverage by the graph finds the parameter unclaimed.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kronfisher.errors import UnsupportedError
from kronfisher.fisher.blocks import Window
from kronfisher.layers.activations import Activations
from kronfisher.layers.row_order import RowOrder

__all__ = ["OPERATORS", "REWRITES", "Use", "Windows", "handles", "rewrites"]


class Windows:
    """Tells a handler what its arguments are.

    Args:
        views: id of a tensor → the window on a trainable parameter that it is.
        lookups: id of a tensor → the use that made it, where it is a lookup that is the same for all data.
    """

    def __init__(self, views: Mapping[int, Window | None], lookups: "Mapping[int, Use]") -> None:
        self._views, self._lookups = views, lookups

    def __call__(self, value: Any) -> Window | None:
        return self._views.get(id(value))

    def lookup(self, value: Any) -> "Use | None":
        """The lookup that made a tensor."""
        return self._lookups.get(id(value))


Handler = Callable[..., "Iterable[Use]"]

OPERATORS: dict[Callable, Handler] = {}
"""Operator of torch → handler."""


REWRITES: dict[Callable, Callable] = {}
"""Operator of torch → the same made of operators that have handlers."""


def rewrites(operator: Callable) -> Callable[[Callable], Callable]:
    """Register what is run in place of an operator that hides its uses of weights."""

    def register(function: Callable) -> Callable:
        REWRITES[operator] = function
        return function

    return register


def handles(*operators: Callable) -> Callable[[Handler], Handler]:
    """Register the handler of some operators."""

    def register(handler: Handler) -> Handler:
        OPERATORS.update(dict.fromkeys(operators, handler))
        return handler

    return register


@dataclass
class Use:
    """One use of a weight, a bias or both; subclasses say how inputs and output gradients become samples.

    Attributes:
        weight: window ``[H, O, *]`` on a trainable weight, or None.
        bias: window ``[H, *]`` on a trainable bias, or None.
        inputs: the tensor that the activations are made of, or None where none are needed.
    """

    weight: Window | None
    bias: Window | None
    inputs: Tensor | None

    dtype = torch.float32  # of the samples: the parameter's, or better
    onehot = False  # inputs are rows of the identity
    summing = False  # positions are summed out, so rows must be sorted by sample whatever the fit

    def __post_init__(self) -> None:
        if self.inputs is not None:
            self.inputs = self.inputs.detach()  # shares storage and version counter, keeps no graph
        self._version = self.inputs._version if self.inputs is not None else 0

    @property
    def lookup(self) -> "Use | None":
        """The use whose output went in, where the weight itself did not."""
        return None

    @property
    def name(self) -> str:
        return (self.weight or self.bias).parameter  # type: ignore[union-attr]

    def lead(self, output: tuple[int, ...]) -> tuple[int, ...]:
        """The axes of an output of that shape that may count samples."""
        raise NotImplementedError

    def rows(self, gradient: Tensor) -> Tensor:
        """The output gradient as ``[*lead, F]``, for the probe."""
        raise NotImplementedError

    def activations(self, order: RowOrder, gradient: Tensor, weight: bool, bias: bool) -> Activations:
        """The inputs of the weight, of the bias, or of both, grouped by sample; `gradient` tells dtype and shape."""
        raise NotImplementedError

    def gradients(self, order: RowOrder, gradient: Tensor) -> Tensor:
        """The output gradients ``[H, n, T, O]``."""
        raise NotImplementedError

    def addition_uses(self, shape: tuple[int, ...], sign: float, onto: tuple[int, ...]) -> "Iterable[Use]":
        """The use of its output by adding it onto tensors of a shape; none where nothing is known of that."""
        return ()

    def forget(self) -> None:
        """Let go of the inputs once nobody asks for them again: the backward pass frees what it has done with too."""
        self.inputs = None

    def cast_inputs(self) -> Tensor:
        """The inputs in the dtype of the samples, if nobody has written over them since."""
        return self.original_inputs().to(self.dtype)

    def original_inputs(self) -> Tensor:
        """The inputs as they were, if nobody has written over them since."""
        assert self.inputs is not None
        if self.inputs._version != self._version:
            raise UnsupportedError(
                f"{self.name}: the input of this layer was modified in place after the layer had used it, so its "
                "values are gone. Replace that in-place operation by one that returns a new tensor."
            )
        return self.inputs
