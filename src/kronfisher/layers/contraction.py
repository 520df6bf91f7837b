"""Contractions of data with a weight.

An axis of the weight is an input where the data have it and the output does not, an output where only the output has
it, and counts groups where both have it. The output's other axes count rows. Outputs that lie in memory around other
axes (heads: ``ntd,hdk->nhtk``) are no single axis of a matrix: some of them count groups then, which all meet the same
data.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations
from math import prod

from torch import Tensor

from kronfisher.fisher.blocks import Window
from kronfisher.layers.activations import Activations, Dense
from kronfisher.layers.elementwise import ElementwiseUse
from kronfisher.layers.row_order import RowOrder
from kronfisher.layers.use import Use

__all__ = ["ContractionUse", "Labels", "axes_of", "contraction"]


@dataclass(frozen=True)
class Labels:
    """The axes of the operands and the output of a contraction, a letter each, all different within one of them.

    Attributes:
        data: of the data.
        weight: of the weight.
        output: of the output.
    """

    data: str
    weight: str
    output: str

    @property
    def groups(self) -> str:
        return "".join(c for c in self.weight if c in self.data and c in self.output)

    @property
    def outputs(self) -> str:
        return "".join(c for c in self.weight if c not in self.data and c in self.output)

    @property
    def inputs(self) -> str:
        return "".join(c for c in self.weight if c in self.data and c not in self.output)

    @property
    def rows(self) -> str:
        return "".join(c for c in self.output if c not in self.weight)


@dataclass
class ContractionUse(Use):
    """``y = Σ x W`` over the axes that the output does not have.

    Attributes:
        labels: which axis is which.
        sizes: of the axes.
        picked: ``[*rows]`` where the weight is the one that these rows take, elsewhere it is another; None: everywhere.
        seen: the window on the weight with an axis for each of its letters.
    """

    labels: Labels = field(default_factory=lambda: Labels("", "", ""))
    sizes: dict[str, int] = field(default_factory=dict)
    picked: Tensor | None = None
    seen: Window | None = None
    pads = True

    def lead(self, output: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(n for n, c in zip(output, self.labels.output, strict=True) if c in self.labels.rows) or (1,)

    def _arranged(self, tensor: Tensor, own: str, last: str) -> Tensor:
        """``[*rows, H, last]`` from a tensor with the axes `own`: rows, groups and the last ones."""
        order = [own.index(c) for c in (*self.labels.rows, *self.labels.groups, *last)]
        lead, groups = (
            tuple(tensor.shape[own.index(c)] for c in axes) for axes in (self.labels.rows, self.labels.groups)
        )
        return tensor.permute(order).reshape(*(lead or (1,)), prod(groups), _count(last, self.sizes))

    def _grouped(self, rows: Tensor, order: RowOrder) -> Tensor:
        """``[H, n, T, *]`` from ``[*rows, H, *]``."""
        return order.group(rows, rows.dim() - 2).movedim(2, 0)

    def rows(self, gradient: Tensor) -> Tensor:
        return self._arranged(gradient, self.labels.output, self.labels.outputs).flatten(-2)

    def gradients(self, order: RowOrder, gradient: Tensor) -> Tensor:
        rows = self._arranged(gradient, self.labels.output, self.labels.outputs)
        if self.picked is not None:
            rows = rows * self.picked[..., None, None].to(rows)
        return self._grouped(rows, order)

    def activations(self, order: RowOrder, gradient: Tensor, weight: bool, bias: bool) -> Activations:
        labels, x = self.labels, self.cast_inputs()
        kept = labels.rows + labels.groups + labels.inputs
        sizes, axes = self.sizes, [labels.data.index(c) for c in labels.groups]
        if all(x.shape[axis] == 1 or x.stride(axis) == 0 for axis in axes):  # the same data for all groups
            sizes = {c: n for c, n in sizes.items() if c not in labels.groups}
            for axis in axes:
                x = x.narrow(axis, 0, 1)
        x = x.expand(*(sizes.get(c, n) if n == 1 else n for c, n in zip(labels.data, x.shape, strict=True)))
        if summed := [axis for axis, c in enumerate(labels.data) if c not in kept]:
            x = x.sum(summed)
        own = "".join(c for c in labels.data if c in kept)
        for c in set(labels.rows) - set(own):  # the same data for several rows
            x, own = x.expand(self.sizes[c], *x.shape), c + own
        inputs = self._grouped(self._arranged(x, own, labels.inputs), order)
        return Dense(inputs.expand(_count(labels.groups, self.sizes), -1, -1, -1))

    def mask(self, order: RowOrder) -> Tensor | None:
        return None if self.picked is None else order.group(self.picked, self.picked.dim())


def contraction(
    window: Window, data: Tensor, labels: Labels, sizes: dict[str, int], picked: Tensor | None = None
) -> Iterator[Use]:
    """The use of a weight by a contraction, none if memory does not allow to see the weight as groups of matrices.

    Args:
        window: on the weight, an axis for each of its letters.
        data: an axis for each of its letters; one where it is broadcast.
        labels: the axes.
        sizes: of all axes.
        picked: where the weight is this one; None: everywhere.
    """
    if any(c not in labels.data + labels.output for c in labels.weight):
        return  # summed over the weight alone
    for own in _groupings(labels, sizes):
        seen = data[(None,) * (len(own.data) - len(labels.data))]
        if not own.outputs and not own.inputs and picked is None:
            yield from _scale(window, seen, own, sizes)
            return
        if matrix := _matrix(window, own, sizes):
            yield ContractionUse(matrix, None, seen, own, sizes, picked, window)
            return


def axes_of(result: Tensor, seen: Window, letters: str) -> dict[str, int] | None:
    """Letter → axis of a tensor that a window shows; None unless the window shows each of its elements once."""
    axes: dict[str, int] = {}
    free = dict(enumerate(zip(result.shape, result.stride(), strict=True)))
    for c, n, step in zip(letters, seen.size, seen.stride, strict=True):
        found = [axis for axis, (m, own) in free.items() if m == n and (own == step or n == 1)]
        if not found:
            return None
        axes[c] = found[0]
        del free[found[0]]
    return axes if all(n == 1 for n, _ in free.values()) else None


def _groupings(labels: Labels, sizes: dict[str, int]) -> Iterator[Labels]:
    """The labels, then with some outputs as groups: fewest groups first, as between groups fits keep less."""
    outputs = labels.outputs
    subsets = chain.from_iterable(combinations(outputs, n) for n in range(len(outputs) + 1))
    for moved in sorted(subsets, key=lambda letters: _count(letters, sizes)):
        yield replace(labels, data="".join(moved) + labels.data)


def _matrix(window: Window, labels: Labels, sizes: dict[str, int]) -> Window | None:
    """``[H, O, *]``; None if memory does not allow it."""
    order = [labels.weight.index(c) for c in labels.groups + labels.outputs + labels.inputs]
    inputs = [sizes[c] for c in labels.inputs] or [1]
    try:
        return window.permuted(*order).reshaped(_count(labels.groups, sizes), _count(labels.outputs, sizes), *inputs)
    except RuntimeError:
        return None


def _count(letters: Sequence[str], sizes: dict[str, int]) -> int:
    return prod(sizes[c] for c in letters)


def _scale(window: Window, data: Tensor, labels: Labels, sizes: dict[str, int]) -> Iterator[Use]:
    """A factor for each element along some axes of the output, which no axis of the data is summed over."""
    order = [labels.weight.index(c) for c in labels.output if c in labels.weight]
    own = window.permuted(*order)
    aligned = tuple(sizes[c] if c in labels.weight else 1 for c in labels.output)
    own = own.reshaped(1, *aligned)

    def factor(x: Tensor) -> Tensor:
        x = x.sum([axis for axis, c in enumerate(labels.data) if c not in labels.output]) if summed else x
        return x.permute([kept.index(c) for c in labels.output if c in kept]).reshape(
            [x.shape[kept.index(c)] if c in kept else 1 for c in labels.output]
        )

    kept = "".join(c for c in labels.data if c in labels.output)
    summed = kept != labels.data
    yield ElementwiseUse(None, own, data, aligned, factor=factor)
