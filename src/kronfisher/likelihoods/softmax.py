"""Probabilities of classes as rows, some at a time."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kronfisher.linalg import promote

_CHUNK = 2**22  # probabilities that are in hand at a time
_NARROW = 16  # classes below which torch goes over rows number by number, which is far slower than across them


def without(outputs: Tensor, axis: int) -> tuple[int, ...]:
    """The shape of the outputs without the classes."""
    return (*outputs.shape[:axis], *outputs.shape[axis + 1 :])


def to_rows(tensor: Tensor, axis: int) -> Tensor:
    """`[R, C]`: positions of all examples, one after the other."""
    if tensor.dim() == 2 and axis in (1, -1):
        return tensor  # without operations that a backward pass would go through, too
    last = tensor.movedim(axis, -1)
    return last.reshape(math.prod(last.shape[:-1]), last.shape[-1])


def like(rows: Tensor, outputs: Tensor, axis: int) -> Tensor:
    """Rows in the layout and dtype of the outputs."""
    if rows.shape != outputs.shape or axis != outputs.dim() - 1:
        rows = rows.reshape(outputs.movedim(axis, -1).shape).movedim(-1, axis)
    return rows.to(outputs.dtype)


def parts(rows: Tensor) -> list[slice]:
    """Some rows at a time; at least one part, if an empty one."""
    step = max(1, _CHUNK // max(rows.shape[-1], 1))
    return [slice(low, low + step) for low in range(0, max(len(rows), 1), step)]


def softmax(rows: Tensor) -> Tensor:
    """Probabilities `[R, C]` of rows of logits, in float32 or better."""
    wide = promote(rows)
    return wide.T.softmax(0).T.contiguous() if _across(wide) else wide.softmax(-1)


def log_softmax(outputs: Tensor, axis: int) -> Tensor:
    """Their logarithms as rows, of outputs whose classes are along an axis, in float32 or better."""
    if axis != outputs.dim() - 1:
        return to_rows(promote(outputs).log_softmax(axis), axis)
    rows = promote(to_rows(outputs, axis))
    return rows.T.log_softmax(0).T if _across(rows) else rows.log_softmax(-1)


def _across(rows: Tensor) -> bool:
    return rows.shape[-1] < _NARROW <= len(rows)


def from_probabilities(outputs: Tensor, axis: int, vector: Callable[..., Tensor], *of_rows: Tensor) -> Tensor:
    """Vectors made of the softmax of some rows at a time: with a vocabulary, copies of all would add up.

    Args:
        outputs: of the model.
        axis: of the classes.
        vector: makes them of probabilities, in float32 or better, which it may overwrite, and of their `of_rows`.
        of_rows: tensors `[R, ...]`, of which it is given those rows.
    """
    rows = to_rows(outputs.detach(), axis)
    slices = parts(rows)
    if len(slices) == 1:
        return like(vector(softmax(rows), *of_rows), outputs, axis)
    vectors = torch.empty_like(rows)
    for part in slices:
        vectors[part] = vector(softmax(rows[part]), *(each[part] for each in of_rows))
    return like(vectors, outputs, axis)


def invert_distribution(p: Tensor, uniform: Tensor) -> Tensor:
    """Class indices `[R]` by inverting the distribution function at one uniform number each."""
    cumulative = p.cumsum(-1)
    return torch.searchsorted(cumulative, (uniform * cumulative.select(-1, -1)).unsqueeze(-1)).squeeze(-1)


def subtract_onehot_(p: Tensor, y: Tensor) -> Tensor:
    """`p - onehot(y)` in place, its entry at y from the others: `p_y - 1` would lose a confident model's digits."""
    index = y.unsqueeze(-1)
    p.scatter_(-1, index, 0)
    return p.scatter_(-1, index, -p.sum(-1, keepdim=True))
