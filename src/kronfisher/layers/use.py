"""A use: one call of an operator with a trainable weight, and the registry of operators that are understood.

A handler is registered for an operator of torch and takes the same arguments after ``view``, which returns the window
on a trainable parameter that a tensor represents (`Window`), or None. It yields the uses that the call makes, none if
it does not understand the call: then the walk over the graph finds the parameter unclaimed, and the fallback treats it.

Example:
    A handler for ``y = x Wᵀ`` in a file of its own. `Use` says what a new kind of use has to provide: `lead` and `rows`
    for the probe, `activations` and `gradients` for the fits. ::

        @handles(F.linear)
        def linear(view: Windows, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Use]:
            if (window := view(weight)) and bias is None and weight.dim() == 2:
                yield RowUse(window.reshaped(1, *window.size), None, input)
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from kronfisher.errors import UnsupportedError
from kronfisher.fisher.blocks import Window
from kronfisher.layers.activations import Activations
from kronfisher.layers.row_order import RowOrder

__all__ = ["OPERATORS", "REWRITES", "Recorder", "Use", "Windows", "handles", "rewrites"]


class Windows:
    """Answers a handler which of its arguments are trainable parameters.

    Args:
        views: id of a tensor → the window on a trainable parameter that it represents.
        lookups: id of a tensor → the use that made it, if it is a lookup that does not depend on the data.
        constants: ids of tensors that do not depend on the data.
        coupled: whether operators that couple the examples of a batch are taken as if they did not, as in training.
    """

    def __init__(
        self,
        views: Mapping[int, Window | None],
        lookups: "Mapping[int, Use]",
        constants: Container[int] = (),
        *,
        coupled: bool = False,
    ) -> None:
        self._views, self._lookups, self._constants, self.coupled = views, lookups, constants, coupled

    def __call__(self, value: Any) -> Window | None:
        return self._views.get(id(value))

    def lookup(self, value: Any) -> "Use | None":
        """The lookup that made a tensor."""
        return self._lookups.get(id(value))

    def constant(self, value: Any) -> bool:
        """Whether a tensor does not depend on the data."""
        return id(value) in self._constants


Handler = Callable[..., "Iterable[Use]"]

OPERATORS: dict[Callable, Handler] = {}
"""Operator of torch → handler."""


class Recorder(Protocol):
    """What the replacement of an operator needs of a capture; as a context it sees the operators called within."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *_: Any) -> Any: ...

    def view(self, tensor: Any) -> Window | None:
        """The window on a trainable parameter that the tensor represents, or None."""
        ...

    def understands(self, operands: Sequence[Tensor]) -> bool:
        """Whether operators with these operands can be treated: real, strided, without overlaps and transforms."""
        ...

    def record(
        self,
        operator: str,
        noted: Sequence[tuple[Tensor, tuple["Use", ...]]],
        operands: Sequence[Tensor],
        results: Sequence[Tensor],
    ) -> None:
        """Record operators that were called outside the context as one that led from operands to results.

        Args:
            operator: its name.
            noted: tensors in between, each with the uses whose output gradients arrive there; these have to account
                for all trainable operands.
            operands: all tensors that entered.
            results: those that others may use.
        """
        ...


REWRITES: dict[Callable, Callable] = {}
"""Operator of torch → an equivalent function of a `Recorder` and the same arguments, or NotImplemented."""


def rewrites(operator: Callable) -> Callable[[Callable], Callable]:
    """Register the replacement of an operator that hides its uses of weights."""

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

    dtype = torch.float32  # of the samples: the parameter's, at least float32
    onehot = False  # inputs are rows of the identity
    looked_up = False  # inputs are a few entries of a table, so that no product with all of it is made
    summing = False  # positions are summed out, so rows must be sorted by sample whatever the fit
    pads = False  # rows may be sorted by samples that have unequal numbers of them
    remakes = False  # inputs are asked for by way of `original_inputs` alone, so that they may be made again

    def __post_init__(self) -> None:
        self.reads_data = self.inputs is not None and self.inputs.grad_fn is None  # they depend on no parameter
        if self.inputs is not None:
            self.inputs = self.inputs.detach()  # shares storage and version counter, keeps no graph
        self._version = self.inputs._version if self.inputs is not None else 0
        self._make: Callable[[], Tensor] | None = None

    @property
    def lookup(self) -> "Use | None":
        """The lookup whose output is the operand, if that is not the weight itself; else None."""
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

    def same_gradients(self, other: "Use") -> bool:
        """Whether another use of the same call has the same output gradients, row by row."""
        return False

    def addition_uses(self, shape: tuple[int, ...], sign: float, onto: tuple[int, ...]) -> "Iterable[Use]":
        """The uses that arise when the output, of this shape, is added to tensors of shape `onto`."""
        return ()

    def entries_apart(self) -> "Use | None":
        """The same use with every entry of a bag as a position; None where inputs are no sums of entries of a table."""
        return None

    def positions_apart(self) -> "Use | None":
        """The same use with the positions that it sums out; None where it sums none out, or cannot tell them apart."""
        return None

    def mask(self, order: RowOrder) -> Tensor | None:
        """``[n, T]``: which positions exist, if not all do."""
        return None

    def with_windows(self, weight: Window | None, bias: Window | None) -> Self:
        """The same use of other windows."""
        other = copy(self)
        other.weight, other.bias = weight, bias
        other._widen()
        return other

    def _widen(self) -> None:
        """Let a window stand for more of its parameter."""

    def forget(self) -> None:
        """Release the inputs when they are no longer needed, as the backward pass releases its own tensors."""
        self.inputs = self._make = None

    def make_inputs(self, make: Callable[[], Tensor], shape: torch.Size) -> None:
        """Have the numbers of the inputs, of this shape, made when they are asked for, rather than keep them."""
        self.inputs, self._make = None, lambda: make().view(shape)

    def cast_inputs(self) -> Tensor:
        """The original inputs in the dtype of the samples; see `original_inputs`."""
        return self.original_inputs().to(self.dtype)

    def original_inputs(self) -> Tensor:
        """The inputs of the call.

        Raises:
            UnsupportedError: they have been modified in place since.
        """
        if self._make is not None:
            return self._make()
        assert self.inputs is not None
        if self.inputs._version != self._version:
            raise UnsupportedError(
                f"{self.name}: the input of this layer was modified in place after the layer had used it, so its "
                "values are gone. Replace that in-place operation by one that returns a new tensor."
            )
        return self.inputs
