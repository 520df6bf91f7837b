"""Parameters multiplied or added elementwise, with broadcasting: a scale, a shift, a table of positions, a lone bias.

Their gradient is a vector per sample, ``Σ over broadcast axes of g`` (times the other factor), so the canonical weight
is ``W [O, 1]`` with an input of one, and every position is summed out first, unless positions are asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from kronfisher.fisher.blocks import Window
from kronfisher.layers.activations import Activations, Ones
from kronfisher.layers.onehot import Indices
from kronfisher.layers.row_order import RowOrder
from kronfisher.layers.use import Use, Windows, handles

__all__ = ["ElementwiseUse", "broadcast", "expansion"]


@dataclass
class ElementwiseUse(Use):
    """``y = p ∘ x`` or ``y = x ± p`` with p broadcast; rows are the axes of y that p does not have.

    Attributes:
        aligned: p's shape with its axes at those of y (counted from the last), one where it is broadcast.
        factor: what the output gradient is multiplied by, computed from the inputs when needed; None: one.
        sign: of p in the output.
        part: the window on p that was used, where the rest of p is not; the canonical weight is all of p.
        slab: (axis, start, length) of the only part of the output that p enters.
        apart: whether positions are kept.
    """

    aligned: tuple[int, ...]
    factor: Callable[[Tensor], Tensor] | None = None
    sign: float = 1.0
    part: Window | None = None
    slab: tuple[int, int, int] | None = None
    apart: bool = False
    summing = True
    pads = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._widen()

    def _widen(self) -> None:
        if self.bias is not None and self.bias.numel < prod(self.bias.shape):
            # Tables are cut to the length of a batch; the next batch may be longer.
            self.part, self.bias = self.bias, self.bias.all

    def _axes(self, dimensions: int) -> tuple[list[int], list[int]]:
        """The axes of an output of so many dimensions that p does not have, and those that it has."""
        aligned = [1] * (dimensions - len(self.aligned)) + list(self.aligned)
        return [k for k, size in enumerate(aligned) if size == 1], [k for k, size in enumerate(aligned) if size != 1]

    def lead(self, output: tuple[int, ...]) -> tuple[int, ...]:
        sizes = list(output)
        if self.slab is not None:
            sizes[self.slab[0]] = self.slab[2]
        return tuple(sizes[axis] for axis in self._axes(len(output))[0])

    def rows(self, gradient: Tensor) -> Tensor:
        lead, features = self._axes(gradient.dim())
        if self.slab is not None:
            gradient = gradient.narrow(*self.slab)
        return gradient.permute(*lead, *features).unsqueeze(-1).flatten(len(lead))

    def gradients(self, order: RowOrder, gradient: Tensor) -> Tensor:
        gradient = gradient if self.sign == 1 else gradient * self.sign
        if self.factor is not None:
            gradient = gradient * self.factor(self.cast_inputs())
        rows = self.rows(gradient)
        grouped = order.group(rows, rows.dim() - 1)  # [n, T, O]
        summed = grouped.flatten(0, 1) if self.apart else grouped.sum(dim=1)
        if self.part is not None:
            values, summed = summed, summed.new_zeros(len(summed), *self.part.shape)
            self.part.scatter(values, summed)
            summed = summed.flatten(1)
        return summed.unflatten(0, (order.samples, -1))[None]

    def activations(self, order: RowOrder, gradient: Tensor, weight: bool, bias: bool) -> Activations:
        positions = prod(self.lead(tuple(gradient.shape))) // order.samples if self.apart else 1
        return Ones(gradient, (1, order.samples, positions))

    def positions_apart(self) -> "Use | None":
        if (table := self._table()) is not None:
            return table
        other = copy(self)
        other.apart = True
        return other

    def _table(self) -> "TableUse | None":
        """The same use of a table that has a row for each position; None where the parameter is none."""
        if self.bias is None or len(self.aligned) < 2 or 1 in self.aligned[-2:] or max((1, *self.aligned[:-2])) > 1:
            return None
        rows, (*_, length, width) = self.part or self.bias, self.bias.size
        steps, first = self.bias.stride[-2:], rows.offset - self.bias.offset
        if rows.stride[-2:] != steps or rows.size[-1] != width or not steps[0] or first % steps[0]:
            return None
        window = replace(self.bias, size=(1, width, length), stride=(0, steps[1], steps[0]))
        use = TableUse(window, None, self.inputs, self.aligned, self.factor, self.sign, slab=self.slab)
        use.first, use.dtype = first // steps[0], self.dtype
        return use


@dataclass
class TableUse(ElementwiseUse):
    """A table ``[length, O]`` of which every position has a row of its own: a lookup of rows, one after the other.

    Attributes:
        first: the row of the first position.
    """

    first: int = 0
    onehot = True

    def gradients(self, order: RowOrder, gradient: Tensor) -> Tensor:
        summed = super().gradients(order, gradient)  # [1, n, 1, T·O]
        return summed.reshape(1, order.samples, -1, self.aligned[-1])

    def activations(self, order: RowOrder, gradient: Tensor, weight: bool, bias: bool) -> Activations:
        assert self.weight is not None
        rows = torch.arange(self.first, self.first + self.aligned[-2], device=gradient.device)
        places = rows.view(1, -1, 1).expand(order.samples, -1, -1)
        return Indices(places, torch.ones_like(places, dtype=gradient.dtype), self.weight.size[-1])


def broadcast(view: Window) -> Window:
    """The window with one instead of repeated elements (``expand`` has stride 0), and a leading axis for H."""
    size = (1, *(1 if step == 0 else n for n, step in zip(view.size, view.stride, strict=True)))
    stride, following = [], 1
    for n, step in zip(reversed(size), (*reversed(view.stride), 0), strict=True):
        # The stride along a single element means nothing, and differs between a batch of one example and a larger one.
        stride.append(following if n == 1 else step)
        following = stride[-1] * n
    return replace(view, size=size, stride=tuple(reversed(stride)))


def expansion(window: Window, shape: tuple[int, ...]) -> ElementwiseUse | None:
    """The use of a parameter by a copy of what it was expanded to, of this shape; None if it was not expanded."""
    shared = broadcast(window)
    if not window.overlaps or shared.overlaps:
        return None
    use = ElementwiseUse(None, shared, None, shared.size[1:])
    return use if prod(use.lead(shape)) * shared.numel == prod(shape) else None


def _uses(view: Windows, x: object, p: object, multiply: bool, sign: float = 1.0) -> Iterator[Use]:
    left, right = view(x), view(p)
    if not multiply and isinstance(x, Tensor) and isinstance(p, Tensor) and not (left or right):
        for value, onto, signed in ((x, p, 1.0), (p, x, sign)):
            if lookup := view.lookup(value):
                yield from lookup.addition_uses(value.shape, signed, torch.broadcast_shapes(value.shape, onto.shape))
    if bool(left) == bool(right):
        return
    other, window = (x, right) if right else (p, left)
    assert window is not None
    shared = broadcast(window)
    if not multiply:
        yield ElementwiseUse(None, shared, None, shared.size[1:], sign=sign if right else 1.0)
    elif isinstance(other, Tensor):
        yield ElementwiseUse(None, shared, other, shared.size[1:], factor=lambda inputs: inputs)
    # a parameter times a number involves no data


@handles(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply)
def multiply(view: Windows, input: Tensor, other: Tensor) -> Iterator[Use]:
    """``p * x`` and ``x * p``."""
    return _uses(view, input, other, multiply=True)


@handles(Tensor.mul_, Tensor.__imul__)
def multiply_(view: Windows, input: Tensor, other: Tensor) -> Iterator[Use]:
    """``x *= p``: x is about to be overwritten, so keep a copy."""
    return _uses(view, input.detach().clone() if view(other) else input, other, multiply=True)


@handles(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__)
def add(view: Windows, input: Tensor, other: Tensor, *, alpha: float = 1) -> Iterator[Use]:
    """``p + x`` and ``x + p``."""
    return _uses(view, input, other, multiply=False) if alpha == 1 else iter(())


@handles(torch.sub, Tensor.sub, Tensor.__sub__, Tensor.sub_, Tensor.__isub__)
def subtract(view: Windows, input: Tensor, other: Tensor, *, alpha: float = 1) -> Iterator[Use]:
    """``x − p`` and ``p − x``."""
    return _uses(view, input, other, multiply=False, sign=-1.0) if alpha == 1 else iter(())


@handles(torch.prelu)
def prelu(view: Windows, input: Tensor, weight: Tensor) -> Iterator[Use]:
    """``x`` where it is positive, else ``p x``; p is one number or one for each channel."""
    slope = view(weight)
    if slope:
        aligned = (-1,) if input.dim() < 2 or weight.numel() == 1 else (-1, *[1] * (input.dim() - 2))
        slope = slope.reshaped(1, *(weight.numel() if n == -1 else n for n in aligned))
        yield ElementwiseUse(None, slope, input, slope.size[1:], factor=lambda x: x.clamp_max(0))


@handles(torch.cat, torch.concat, torch.concatenate)
def cat(view: Windows, tensors: Sequence[Tensor], dim: int = 0) -> Iterator[Use]:
    """A class token in front of a sequence, say: a parameter, perhaps expanded, fills a slab of the output.

    Parts may be empty, as what a slice at the end of a parameter leaves over.
    """
    start = 0
    for tensor in tensors:
        axis = dim % max(tensor.dim(), 1)
        if (window := view(tensor)) and window.numel:
            shared = broadcast(window)
            yield ElementwiseUse(None, shared, None, shared.size[1:], slab=(axis, start, tensor.shape[axis]))
        start += tensor.shape[axis] if tensor.dim() else 1


@handles(Tensor.repeat)
def repeat(view: Windows, input: Tensor, *sizes: int | Sequence[int]) -> Iterator[Use]:
    """A parameter repeated along axes that it does not have, once for each example."""
    repeats = [n for size in sizes for n in ([size] if isinstance(size, int) else size)]
    window = view(input)
    if window and all(n == 1 or k == 1 for n, k in zip(window.size[::-1], repeats[::-1], strict=False)):
        shared = broadcast(window)
        yield ElementwiseUse(None, shared, None, shared.size[1:])
