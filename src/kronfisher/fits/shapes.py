"""Shapes of the factors of a block, by its sizes and the largest factor that is kept as a matrix."""

from math import prod
from typing import Any

from kronfisher.errors import keep_integer
from kronfisher.fisher.blocks import Block
from kronfisher.operators import Factor

__all__ = ["MAX_DIM", "Shapes", "check_max_dim", "elements", "factor_shapes", "has_diagonal", "sizes"]

MAX_DIM = 10240  # of a factor that is a matrix: 400 MiB in float32

Shapes = tuple[tuple[int, ...], tuple[int, ...]]


def sizes(group: tuple[Block, ...]) -> tuple[int, int, int]:
    """H, O, I of a group of one block."""
    (block,) = group
    return block.shape


def check_max_dim(fit: Any) -> None:
    """ValueError unless its `max_dim` is a size, and its `max_outputs`, if there is one."""
    keep_integer(fit, "max_dim", 0, "the largest factor that is a matrix is an integer of at least 0")
    if getattr(fit, "max_outputs", None) is not None:
        keep_integer(fit, "max_outputs", 0, "the largest output factor that is a matrix is an integer of at least 0")


def factor_shapes(
    group: tuple[Block, ...], max_dim: int = MAX_DIM, *, max_outputs: int | None = None, summed: bool = False
) -> Shapes:
    """Shapes of the factors A and B of a group of one block: ``[H, D, D]``, or ``[H, D]`` for a diagonal.

    Args:
        group: one block.
        max_dim: factors beyond it are diagonals, as are those of inputs that are looked up in a table.
        max_outputs: the same for B alone; None: as `max_dim`.
        summed: rows of a table are summed before they are multiplied, so that their moments are no diagonal.
    """
    groups, outputs, inputs = sizes(group)
    onehot = group[0].onehot and not summed

    def shape(size: int, diagonal: bool) -> tuple[int, ...]:
        return (groups, size) if diagonal or size > max_dim else (groups, size, size)

    return shape(inputs, onehot), shape(outputs, max_outputs is not None and outputs > max_outputs)


def has_diagonal(shapes: Shapes) -> bool:
    """Whether a factor is kept as its diagonal."""
    return any(Factor.type_of(shape).is_diagonal for shape in shapes)


def elements(*shape: int) -> int:
    """The number of entries of a tensor of that shape."""
    return prod(shape)
