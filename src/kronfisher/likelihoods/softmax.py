"""Probabilities of classes as rows, some at a time."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kronfisher.linalg import promote

_CHUNK = 2**22  # probabilities that are in hand at a time


def without(outputs: Tensor, axis: int) -> tuple[int, ...]:
    """The shape of the outputs without the classes."""
    return (*outputs.shape[:axis], *outputs.shape[axis + 1 :])


def to_rows(tensor: Tensor, axis: int) -> Tensor:
    """`[R, C]`: positions of all examples, one after the other."""
    last = tensor.movedim(axis, -1)
    return last.reshape(math.prod(last.shape[:-1]), last.shape[-1])


def like(rows: Tensor, outputs: Tensor, axis: int) -> Tensor:
    """Rows in the layout and dtype of the outputs."""
    return rows.reshape(outputs.movedim(axis, -1).shape).movedim(-1, axis).to(outputs.dtype)


def parts(rows: Tensor) -> list[slice]:
    """Some rows at a time; at least one part, if an empty one."""
    step = max(1, _CHUNK // max(rows.shape[-1], 1))
    return [slice(low, low + step) for low in range(0, max(len(rows), 1), step)]


def from_probabilities(outputs: Tensor, axis: int, vector: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Vectors made of the softmax of some rows at a time: with a vocabulary, copies of all would add up.

    The probabilities are in float32 or better, and may be overwritten.
    """
    rows = to_rows(outputs.detach(), axis)
    slices = parts(rows)
    if len(slices) == 1:
        return like(vector(promote(rows).softmax(-1), slices[0]), outputs, axis)
    vectors = torch.empty_like(rows)
    for part in slices:
        vectors[part] = vector(promote(rows[part]).softmax(-1), part)
    return like(vectors, outputs, axis)


def invert_distribution(p: Tensor, uniform: Tensor) -> Tensor:
    """Class indices `[R]` by inverting the distribution function at one uniform number each."""
    cumulative = p.cumsum(-1)
    return torch.searchsorted(cumulative, (uniform * cumulative[..., -1]).unsqueeze(-1)).squeeze(-1)


def subtract_onehot_(p: Tensor, y: Tensor) -> Tensor:
    """`p - onehot(y)` in place, its entry at y from the others: `p_y - 1` would lose a confident model's digits."""
    index = y.unsqueeze(-1)
    p.scatter_(-1, index, 0)
    return p.scatter_(-1, index, -p.sum(-1, keepdim=True))
