"""The place of blocks among the parameters of a model: the change of basis before and after every operator."""

from collections.abc import Iterable, Mapping
from math import prod

import torch
from torch import Tensor

from kronfisher.errors import DataError
from kronfisher.fisher.blocks import Block
from kronfisher.fisher.vectors import Shapes
from kronfisher.operators.operator import Operator

__all__ = ["Blocks", "block_name", "gather", "require_cover", "scatter"]

Blocks = tuple[Block, ...]


def require_cover(entries: Iterable[tuple[Blocks, Operator]], shapes: Shapes) -> None:
    """DataError unless operators fit their blocks, and blocks together show every element exactly once."""
    seen: dict[str, int] = {}
    for blocks, operator in entries:
        label = block_name(blocks)
        if sum(b.dim for b in blocks) != operator.dim:
            rows = sum(b.dim for b in blocks)
            raise DataError(f"{label}: the blocks have {rows} rows, {operator!r} has {operator.dim}")
        for view in (view for block in blocks for view in block.views):
            if shapes.get(view.parameter) != torch.Size(view.shape):
                raise DataError(f"{label}: {view.parameter} {list(view.shape)} is not among the shapes given")
            seen[view.parameter] = seen.get(view.parameter, 0) + view.numel
    if wrong := [name for name, shape in shapes.items() if seen.get(name, 0) != prod(shape)]:
        raise DataError(f"the blocks do not cover each element exactly once of {', '.join(wrong)}")


def block_name(blocks: Blocks) -> str:
    """The name of the blocks under one operator, for reports."""
    names = [block.name for block in blocks]
    return " + ".join(names) if len(names) <= 3 else f"{names[0]} ... {names[-1]} ({len(names)} blocks)"


def gather(blocks: Blocks, rows: Mapping[str, Tensor]) -> Tensor:
    """Canonical rows ``[K, D]`` of all the blocks, one after the other."""
    parts = [block.gather(rows) for block in blocks]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def scatter(blocks: Blocks, rows: Tensor, out: Mapping[str, Tensor]) -> None:
    """Write what `gather` read."""
    for block, part in zip(blocks, rows.split([block.dim for block in blocks], dim=1), strict=True):
        block.scatter(part, out)
