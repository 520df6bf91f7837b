"""Weights that are picked by a tensor index, as experts are: one for each row, out of a stack of them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kronfisher.fisher.blocks import Window
from kronfisher.layers.contraction import ContractionUse, Labels, axes_of, contraction
from kronfisher.layers.embedding import LookupUse
from kronfisher.layers.use import Use, Windows, handles

__all__ = ["PICKING", "Picked", "picked"]

PICKING = Tensor.__getitem__, torch.index_select, Tensor.index_select


@dataclass(frozen=True)
class Picked:
    """``stack[index]``.

    Attributes:
        stack: the window ``[E, *shape]`` on a parameter.
        index: which of the E, of any shape.
        result: ``[*index.shape, *shape]``.
        version: of the result, which tells whether it was changed in place since.
    """

    stack: Window
    index: Tensor
    result: Tensor
    version: int

    def uses(self, use: Use) -> Iterator[Use]:
        """The use of what was picked as a use of each of the stack, by the rows that picked it; none if unknown."""
        if not isinstance(use, ContractionUse) or use.seen is None or use.seen.offset:
            return
        axes = axes_of(self.result, use.seen, use.labels.weight)
        if axes is None or any(axis >= self.index.dim() for axis in set(range(self.result.dim())) - {*axes.values()}):
            return
        kept = [c for c in use.labels.weight if axes[c] >= self.index.dim()]
        labels = Labels(use.labels.data, "".join(kept), use.labels.output)
        chosen = {axis: c for c, axis in axes.items() if axis < self.index.dim()}
        if not set(chosen.values()) <= set(labels.rows):
            return  # the output is summed over what was picked
        index = self.index % self.stack.size[0]
        index = index.squeeze([axis for axis in range(index.dim()) if axis not in chosen])
        order = [c for _, c in sorted(chosen.items())]
        index = index.permute([order.index(c) for c in labels.rows if c in order])
        index = index.reshape([use.sizes[c] if c in order else 1 for c in labels.rows])
        index = index.expand([use.sizes[c] for c in labels.rows])
        assert use.inputs is not None
        for number in range(self.stack.size[0]):
            size, stride = self.stack.size[1:], self.stack.stride[1:]
            own = replace(
                self.stack, size=size, stride=stride, offset=self.stack.offset + number * self.stack.stride[0]
            ).permuted(*(axes[c] - self.index.dim() for c in kept))
            yield from contraction(own, use.inputs, labels, use.sizes, index == number)


def picked(window: Window | None, args: tuple, result: Any) -> Picked | None:
    """What ``stack[index]`` or ``index_select`` picked; None for any other way to index."""
    index = _index(args)
    if window is None or len(window.size) < 3 or index is None or not isinstance(result, Tensor):
        return None
    return Picked(window, index, result, result._version)


def _index(args: tuple) -> Tensor | None:
    """The index along the first axis of a call's arguments."""
    index = args[1] if len(args) == 2 else args[2] if len(args) == 3 and args[1] == 0 else None
    whole = isinstance(index, Tensor) and index.dim() > 0 and index.dtype in (torch.int64, torch.int32)
    return index if whole else None


@handles(*PICKING)
def rows(view: Windows, input: Tensor, *args: Any) -> Iterator[Use]:
    """Rows of a table ``[E, O]``, as of an embedding."""
    window, index = view(input), _index((input, *args))
    if window is not None and len(window.size) == 2 and index is not None:
        table = window.permuted(1, 0).reshaped(1, *window.size[::-1])
        yield LookupUse(table, None, (index % len(input)).unsqueeze(-1))
