"""Contractions of data with a weight: ``einsum``, products of batches of matrices, ``tensordot``.

An axis of the weight is an input where the data have it and the output does not, an output where only the output has
it, and counts groups where both have it. The output's other axes count rows. Outputs that lie in memory around other
axes (heads: ``ntd,hdk->nhtk``) are no single axis of a matrix: some of them count groups then, which all meet the same
data.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations
from math import prod

import torch
from torch import Tensor

from kronfisher.fisher.blocks import Window
from kronfisher.layers.activations import Activations, Dense
from kronfisher.layers.elementwise import ElementwiseUse, broadcast
from kronfisher.layers.row_order import RowOrder
from kronfisher.layers.use import Use, Windows, handles

__all__ = ["ContractionUse", "Labels", "axes_of", "contraction", "products"]


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


_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_MORE = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _parsed(equation: str, operands: Sequence[Tensor]) -> tuple[list[str], str] | None:
    """A letter for every axis of every operand and of the output; None where one occurs twice in a place."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    free = [c for c in _MORE + _LETTERS if c not in equation]
    if len(names) != len(operands):
        return None
    hidden = [
        t.dim() - len(name.replace("...", "")) if "..." in name else 0 for name, t in zip(names, operands, strict=True)
    ]
    dots = "".join(free[: max(hidden)])
    names = [name.replace("...", dots[len(dots) - n :]) for name, n in zip(names, hidden, strict=True)]
    if not arrow:
        joined = "".join(inputs.replace("...", "").replace(",", ""))
        output = dots + "".join(sorted(c for c in set(joined) if joined.count(c) == 1))
    output = output.replace("...", dots)
    places = [*names, output]
    if any(len(name) != t.dim() for name, t in zip(names, operands, strict=True)):
        return None
    return (names, output) if all(len(set(place)) == len(place) for place in places) else None


def _contract(view: Windows, equation: str, operands: Sequence[Tensor]) -> Iterator[Use]:
    """The use of the one operand that is a weight; the others are multiplied with each other first."""
    windows = [view(operand) for operand in operands]
    if sum(window is not None for window in windows) != 1 or (parsed := _parsed(equation, operands)) is None:
        return
    names, output = parsed
    (place,) = (k for k, window in enumerate(windows) if window is not None)
    window, weight = windows[place], names[place]
    assert window is not None
    sizes: dict[str, int] = {}
    for name, operand in zip(names, operands, strict=True):
        for c, n in zip(name, operand.shape, strict=True):
            sizes[c] = max(sizes.get(c, 1), n)
    repeated = [k for k, c in enumerate(weight) if sizes[c] > 1 and (window.size[k] == 1 or window.stride[k] == 0)]
    if repeated:
        kept = [k for k in range(len(weight)) if k not in repeated]
        window = window.permuted(*kept)  # where it is repeated an axis says nothing
        weight = "".join(weight[k] for k in kept)
    others = [k for k in range(len(operands)) if k != place]
    if not others:
        return
    data, own = operands[others[0]], names[others[0]]
    if len(others) > 1:
        own = "".join(dict.fromkeys(c for k in others for c in names[k] if c in weight + output))
        data = torch.einsum(",".join(names[k] for k in others) + "->" + own, *(operands[k].detach() for k in others))
    yield from contraction(window, data, Labels(own, weight, output), sizes)


@handles(torch.einsum)
def einsum(view: Windows, *args: object) -> Iterator[Use]:
    """``einsum("...", x, W)`` with one weight and any number of other operands."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if isinstance(equation, str) and all(isinstance(each, Tensor) for each in operands):
        yield from _contract(view, equation, operands)  # type: ignore[arg-type]


@handles(torch.bmm, Tensor.bmm)
def bmm(view: Windows, input: Tensor, mat2: Tensor) -> Iterator[Use]:
    """``x [B, n, I] @ W [B, I, O]``, or the other way round."""
    yield from _contract(view, "bij,bjk->bik", (input, mat2))


@handles(torch.baddbmm, Tensor.baddbmm)
def baddbmm(
    view: Windows, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Iterator[Use]:
    """``b + x [B, n, I] @ W [B, I, O]``."""
    if beta != 1 or alpha != 1:
        return
    if view(batch1) or view(batch2):
        uses = list(_contract(view, "bij,bjk->bik", (batch1, batch2)))
        if not uses:
            return
        yield from uses
    if shift := view(input):
        shared = broadcast(shift)
        yield ElementwiseUse(None, shared, None, shared.size[1:])


def products(view: Windows, input: Tensor, other: Tensor) -> Iterator[Use]:
    """``x @ W`` and ``W @ x`` with batches of matrices on either side."""
    if min(input.dim(), other.dim()) < 2:
        return
    count = max(input.dim(), other.dim()) - 2
    left, right = (_MORE[count - tensor.dim() + 2 : count] for tensor in (input, other))
    yield from _contract(view, f"{left}ij,{right}jk->{_MORE[:count]}ik", (input, other))


@handles(torch.tensordot)
def tensordot(view: Windows, a: Tensor, b: Tensor, dims: object = 2, out: None = None) -> Iterator[Use]:
    """Contracted over pairs of axes."""
    if isinstance(dims, int):
        pairs = [(a.dim() - dims + k, k) for k in range(dims)]
    elif isinstance(dims, list | tuple) and all(isinstance(each, list | tuple) for each in dims):
        pairs = [(i % a.dim(), j % b.dim()) for i, j in zip(*dims, strict=True)]
    else:
        return
    left, right = list(_LETTERS[: a.dim()]), list(_MORE[: b.dim()])
    for i, j in pairs:
        right[j] = left[i]
    output = [c for c in left if c not in right] + [c for c in right if c not in left]
    yield from _contract(view, f"{''.join(left)},{''.join(right)}->{''.join(output)}", (a, b))
