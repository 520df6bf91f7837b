"""Weights that are put together from several, by ``stack`` or ``cat``: each is a layer with its share of the output."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from kronfisher.fisher.blocks import Window
from kronfisher.layers.computed import MappedUse
from kronfisher.layers.contraction import ContractionUse, Labels, axes_of, contraction
from kronfisher.layers.expressions import Expressions, Term, computes, depends
from kronfisher.layers.use import Use

__all__ = ["Joined", "PartUse"]

_CAT = torch.cat, torch.concat, torch.concatenate


@dataclass
class PartUse(MappedUse):
    """A use whose output is a range of another's along an axis, or all of it.

    Attributes:
        axis: of the whole output; None: the parts are summed, and all have all of it.
        start: where the range begins.
        length: of it; None: one place, without the axis.
    """

    axis: int | None
    start: int
    length: int | None

    def _mapped(self, gradient: Tensor) -> Tensor:
        if self.axis is None:
            return gradient
        if self.length is None:
            return gradient.select(self.axis, self.start)
        return gradient.narrow(self.axis, self.start, self.length)

    def lead(self, output: tuple[int, ...]) -> tuple[int, ...]:
        if self.axis is None:
            return self.inner.lead(output)
        own = () if self.length is None else (self.length,)
        return self.inner.lead((*output[: self.axis], *own, *output[self.axis + 1 :]))


@dataclass(frozen=True)
class Joined:
    """A stack of weights, or weights one after the other.

    Attributes:
        result: all of them.
        parts: the weights.
        dim: the axis of the result along which they lie.
        stacked: whether that is an axis which they do not have.
    """

    result: Tensor
    parts: Sequence[Tensor]
    dim: int
    stacked: bool

    @classmethod
    def of(cls, function: Callable, args: tuple, kwargs: dict[str, Any], result: Tensor) -> Self | None:
        """What a call has joined; None if it joined nothing."""
        if function is not torch.stack and function not in _CAT:
            return None
        tensors, dim, *_ = (*args, kwargs.get("dim", 0), None)
        if not isinstance(tensors, list | tuple) or not isinstance(dim, int):
            return None
        return cls(result, tensors, dim % result.dim(), function is torch.stack)

    def uses(
        self,
        use: Use,
        window: Callable[[Tensor], Window | None],
        translate: Callable[[Use], Iterator[Use | Term]],
    ) -> list[Use | Term] | None:
        """The use of the result as a use of every part that is trained; None if it is none.

        Args:
            use: of the result, all of which it shows.
            window: on a part, which may be computed again.
            translate: a use of such a window to uses of parameters.
        """
        if not isinstance(use, ContractionUse) or use.seen is None or use.picked is not None or use.inputs is None:
            return None
        axes = axes_of(self.result, use.seen, use.labels.weight)
        if axes is None or self.dim not in axes.values() or use.seen.offset:
            return None
        (letter,) = (c for c, axis in axes.items() if axis == self.dim)
        output, found, start = use.labels.output.find(letter), [], 0
        for part in self.parts:
            length = 1 if self.stacked else part.shape[self.dim]
            if depends(part):
                own = window(part)
                inner = None if own is None or own.overlaps else self._inner(use, axes, letter, own, start, length)
                if inner is None:
                    return None
                for one in translate(inner):
                    if isinstance(one, Use):
                        cut = (None if output < 0 else output), start, (None if self.stacked else length)
                        one = PartUse(one.weight, one.bias, one.inputs, one, *cut)
                    found.append(one)
            start += length
        return found

    def _inner(
        self, use: ContractionUse, axes: dict[str, int], letter: str, window: Window, start: int, length: int
    ) -> Use | None:
        """The use of one part by its share of the data and of the output."""
        labels, data, sizes = use.labels, use.inputs, use.sizes
        assert data is not None
        if (place := labels.data.find(letter)) >= 0 and data.shape[place] > 1:
            data = data.narrow(place, start, length)
        if self.stacked:
            data = data.squeeze(place) if place >= 0 else data
            labels = Labels(*(own.replace(letter, "") for own in (labels.data, labels.weight, labels.output)))
        else:
            sizes = {**sizes, letter: length}
        own = window.permuted(*(axes[c] - (self.stacked and axes[c] > self.dim) for c in labels.weight))
        return next(contraction(own, data, labels, sizes), None)


@computes(*_CAT)
def joined(record: Expressions, result: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> list[Term] | None:
    """Rows or columns of several matrices."""
    if result.dim() < 2 or dim % result.dim() > 0 < result.dim() - 2:
        return None
    terms, start, rows = [], 0, dim % result.dim() == 0
    one = torch.eye(result.shape[dim], dtype=result.dtype, device=result.device)
    for part in tensors:
        place = one[start : start + part.shape[dim]]
        if depends(part):
            factors = {"left": (place.mT,)} if rows else {"right": (place,)}
            terms += [term.within(**factors) for term in record.terms(part)]
        start += part.shape[dim]
    return terms
