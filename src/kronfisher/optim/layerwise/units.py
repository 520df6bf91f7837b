"""Units: parameters that take one step together, at one rate."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from torch import Tensor

from kronfisher.fisher.blocks import Block, Window

__all__ = ["Unit", "find_units", "is_matrix", "seen"]


@dataclass(frozen=True)
class Unit:
    """Parameters that take one step together.

    Attributes:
        parameters: their names.
        natural: whether they follow the natural gradient; otherwise every element follows its own gradient over its
            root mean square (Adam).
        numel: the number of their elements.
        table: whether it is a table or another array of several axes, which moves at the full rate.
    """

    parameters: tuple[str, ...]
    natural: bool
    numel: int
    table: bool = False


def is_matrix(block: Block) -> bool:
    """Whether a block is a matrix that mixes inputs; scales, shifts and tables that are looked up are none."""
    return block.weight is not None and not block.onehot and block.shape[2] - (block.bias is not None) > 1


def find_units(blocks: Iterable[Block], tables: Set[str], parameters: Mapping[str, Tensor]) -> list[Unit]:
    """Natural units for these blocks, one for all that share a parameter; every other parameter is on its own."""
    joined: dict[str, list[str]] = {}
    for block in blocks:
        members = list(dict.fromkeys(n for name in block.parameters for n in joined.get(name, [name])))
        joined |= dict.fromkeys(members, members)
    units = []
    for name, parameter in parameters.items():
        members = joined.get(name)
        if members is None:
            units.append(Unit((name,), False, parameter.numel(), name in tables or parameter.dim() > 1))
        elif members[0] == name:
            units.append(Unit(tuple(members), True, sum(parameters[member].numel() for member in members)))
    return units


def seen(window: Window, tensor: Tensor) -> Tensor:
    """The elements ``[H, O, *]`` of a contiguous tensor that the window shows: a view, where there is one."""
    if window.row_major:
        return tensor.as_strided(window.size, window.stride, tensor.storage_offset() + window.offset)
    return window.gather(tensor[None])[0]
