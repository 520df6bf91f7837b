"""A use: one call of an operator with a trainable weight, and the registry of operators that are understood.

A handler stands for an operator of torch and takes the same arguments after ``view``, which tells whether a tensor is a
window on a trainable parameter (`View`) or not (None). It answers with the uses that the call makes; none where it does
not understand the call, in which case coverage by the graph finds the parameter unclaimed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kronfisher.blocks import View
from kronfisher.errors import UnsupportedError
from kronfisher.samples import Activations
from kronfisher.uses.ownership import Ownership

__all__ = ["EXAMPLES", "OPERATORS", "Use", "handles"]

Viewer = Callable[[Any], View | None]
Handler = Callable[..., "Iterable[Use]"]

OPERATORS: dict[Callable, Handler] = {}
"""Operator of torch → handler."""

EXAMPLES: dict[str, Callable[[], tuple[Any, tuple[int, ...]]]] = {}
"""Name → builder of a small module and the shape of its input; the conformance tests run every one."""


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

    weight: View | None
    bias: View | None
    inputs: Tensor | None

    dtype = torch.float32  # of the samples: the parameter's, or better
    summing = False  # positions are summed out, so rows must be sorted by sample whatever the fit

    def __post_init__(self) -> None:
        if self.inputs is not None:
            self.inputs = self.inputs.detach()  # shares storage and version counter, keeps no graph
        self._version = self.inputs._version if self.inputs is not None else 0

    @property
    def name(self) -> str:
        return (self.weight or self.bias).parameter  # type: ignore[union-attr]

    def lead(self, output: tuple[int, ...]) -> tuple[int, ...]:
        """The axes of an output of that shape that may count samples."""
        raise NotImplementedError

    def rows(self, gradient: Tensor) -> Tensor:
        """The output gradient as ``[*lead, F]``, for the probe."""
        raise NotImplementedError

    def activations(self, owner: Ownership, gradient: Tensor, weight: bool, bias: bool) -> Activations:
        """The inputs of the weight, of the bias, or of both, grouped by sample; `gradient` tells dtype and shape."""
        raise NotImplementedError

    def gradients(self, owner: Ownership, gradient: Tensor) -> Tensor:
        """The output gradients ``[H, n, T, O]``."""
        raise NotImplementedError

    def checked_inputs(self) -> Tensor:
        """The inputs in the dtype of the samples, if nobody has written over them since."""
        assert self.inputs is not None
        if self.inputs._version != self._version:
            raise UnsupportedError(
                f"{self.name}: the input of this layer was modified in place after the layer had used it, so its "
                "values are gone. Replace that in-place operation by one that returns a new tensor."
            )
        return self.inputs.to(self.dtype)
