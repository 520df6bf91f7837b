"""Vectors over the parameters in the canonical form of F's entries, so that queries are held once and never copied."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kronfisher.fisher import Fisher
from kronfisher.fisher.blocks import Block, Key
from kronfisher.fisher.layout import Blocks, gather, scatter

__all__ = ["Rows", "Vectors", "add_gradients_"]

Rows = dict[str, Tensor]
"""Parameter → ``[K, *shape]``."""


@dataclass(frozen=True, eq=False)
class Vectors:
    """K vectors over the parameters of F.

    Attributes:
        fisher: F.
        parts: of every entry, the canonical rows of its blocks, one after the other ``[K, D]``.
    """

    fisher: Fisher
    parts: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.parts[0])

    @classmethod
    def of_rows(cls, fisher: Fisher, rows: Mapping[str, Tensor]) -> "Vectors":
        """Those of parameter vectors ``{name: [K, *shape]}``; parts may share their memory."""
        return cls(fisher, tuple(gather(blocks, rows) for blocks, _ in fisher.entries))

    @classmethod
    def of_answers(cls, fisher: Fisher, answers: dict[Blocks, Tensor], size: int, dtype: torch.dtype) -> "Vectors":
        """Those of gradients of single blocks ``[K, D]``, whichever blocks a batch used; `answers` is emptied."""
        places = _places(fisher)
        parts: dict[int, Tensor] = {}
        left: Rows = {}

        def part(number: int) -> Tensor:
            if number not in parts:
                dim = fisher.entries[number][1].dim
                parts[number] = torch.zeros(size, dim, dtype=dtype, device=fisher.device)
            return parts[number]

        while answers:
            (block,), values = answers.popitem()
            if (place := places.get(block.key)) is None:
                for name in _tied(fisher, block.parameters) - left.keys():
                    left[name] = values.new_zeros(size, *fisher.shapes[name], dtype=dtype)
                add_gradients_(left, block, values)
                continue
            number, low, high = place
            if high - low == fisher.entries[number][1].dim:
                parts[number] = values.to(dtype)
            else:
                part(number)[:, low:high] = values
        for number, (blocks, _) in enumerate(fisher.entries):
            if any(name in left for block in blocks for name in block.parameters):
                part(number).add_(gather(blocks, left))
        none = torch.zeros(1, 1, dtype=dtype, device=fisher.device)  # zeros of a batch's other blocks take no memory
        entries = enumerate(fisher.entries)
        return cls(fisher, tuple(parts.get(number, none.expand(size, own.dim)) for number, (_, own) in entries))

    @classmethod
    def join(cls, several: Sequence["Vectors"]) -> "Vectors":
        """All of them, one after the other."""
        if len(several) == 1:
            return several[0]
        return cls(several[0].fisher, tuple(map(torch.cat, zip(*(one.parts for one in several), strict=True))))

    def plus(self, blocks: Mapping[Block, Tensor]) -> "Vectors":
        """With canonical rows ``[K, D]`` of entries of a single block added."""
        parts, places = list(self.parts), _places(self.fisher)
        for block, values in blocks.items():
            number, _, _ = places[block.key]
            parts[number] = parts[number] + values if bool(parts[number].any()) else values
        return replace(self, parts=tuple(parts))

    def rows(self) -> Rows:
        """Parameter vectors ``{name: [K, *shape]}``."""
        return self._some_rows(set(self.fisher.shapes))

    def of(self, block: Block) -> Tensor:
        """Canonical matrices ``[K, H, O, I]`` of any block, without a copy where it is one of F's."""
        place = _places(self.fisher).get(block.key)
        if place is None:
            values = block.gather(self._some_rows(_tied(self.fisher, block.parameters)))
        else:
            number, low, high = place
            values = self.parts[number][:, low:high]
        return values.unflatten(1, block.shape)

    def holds(self, block: Block) -> bool:
        """Whether a block is one of F's."""
        return block.key in _places(self.fisher)

    def place(self, block: Block) -> Tensor | None:
        """Canonical rows ``[K, D]`` of a block in the memory where they are; None if that holds other numbers, too."""
        if (found := _places(self.fisher).get(block.key)) is None:
            return None
        number, low, high = found
        part, memory = self.parts[number], [part.untyped_storage().data_ptr() for part in self.parts]
        if memory.count(memory[number]) > 1 or part.stride() != (part.shape[1], 1):
            return None
        return part[:, low:high]

    def inner(self, other: "Vectors") -> Tensor:
        """``⟨x_k, y_k⟩`` ``[K]``."""
        return torch.stack([(x * y).sum(1) for x, y in zip(self.parts, other.parts, strict=True)]).sum(0)

    def _some_rows(self, names: set[str]) -> Rows:
        found = {name: self.parts[0].new_zeros(len(self), *self.fisher.shapes[name]) for name in names}
        for (blocks, _), part in zip(self.fisher.entries, self.parts, strict=True):
            if any(name in names for block in blocks for name in block.parameters):
                scatter(blocks, part, found)
        return found


def add_gradients_(rows: Rows, block: Block, vectors: Tensor) -> None:
    """Add canonical rows ``[K, D]`` of a block to parameter vectors; a weight in two roles has two blocks."""
    own = {name: torch.zeros_like(rows[name]) for name in block.parameters}
    block.scatter(vectors.to(next(iter(own.values())).dtype), own)
    for name, values in own.items():
        rows[name] += values


def _places(fisher: Fisher) -> dict[Key, tuple[int, int, int]]:
    """Block's key → the number of its entry, and its first and last row there."""
    found = {}
    for number, (blocks, _) in enumerate(fisher.entries):
        low = 0
        for block in blocks:
            found[block.key] = number, low, low + block.dim
            low += block.dim
    return found


def _tied(fisher: Fisher, names: Sequence[str]) -> set[str]:
    """These parameters, and all that an entry has together with one of them, or of those."""
    found = set(names)
    each = [{name for block in blocks for name in block.parameters} for blocks, _ in fisher.entries]
    while more := set().union(*(some for some in each if some & found)) - found:
        found |= more
    return found
