"""Sums that travel: of symmetric matrices the upper triangles alone, and many small ones as one run of numbers."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

__all__ = ["Bucket", "Sum", "buckets", "folded", "unfold_"]

_BUCKET = 25 * 2**20  # bytes that are reduced at once


@dataclass(frozen=True, eq=False)
class Sum:
    """A tensor that is to be summed over ranks.

    Attributes:
        tensor: of this rank; its shape and dtype are the same on all of them.
        owner: the rank that needs it; a number that no rank has where all do.
        triangle: of its last two axes only the upper triangle counts.
    """

    tensor: Tensor
    owner: int = -1
    triangle: bool = False

    @property
    def numel(self) -> int:
        """How many numbers travel."""
        size = self.tensor.shape[-1] if self.triangle else 0
        return self.tensor.numel() // size**2 * ((size + 1) // 2) * (size + 1) if size else self.tensor.numel()

    def packed(self) -> Tensor:
        """These numbers, flat."""
        return (folded(self.tensor) if self.triangle else self.tensor).flatten()

    def take_(self, flat: Tensor) -> None:
        """Put what `packed` made of the total in the tensor's place."""
        if self.triangle:
            unfold_(flat.to(self.tensor.device), self.tensor)
        else:
            self.tensor.copy_(flat.view_as(self.tensor))


@dataclass(frozen=True, eq=False)
class Bucket:
    """Sums of one dtype for one owner that travel together."""

    sums: list[Sum]

    @property
    def nbytes(self) -> int:
        """What one rank gives."""
        return sum(one.numel for one in self.sums) * self.sums[0].tensor.element_size()

    def packed(self, device: torch.device) -> Tensor:
        """All numbers, flat, on a device."""
        return torch.cat([one.packed() for one in self.sums]).to(device)

    def take_(self, flat: Tensor) -> None:
        """Hand out the total."""
        for one, part in zip(self.sums, flat.split([one.numel for one in self.sums]), strict=True):
            one.take_(part)


def buckets(sums: Iterable[Sum]) -> list[Bucket]:
    """Sums of one owner and dtype in their order, together as large as is sent at once; larger ones alone.

    Example:
        >>> sums = [Sum(torch.zeros(3, 3), triangle=True), Sum(torch.zeros(4)), Sum(torch.zeros(2).double())]
        >>> [bucket.nbytes for bucket in buckets(sums)]
        [48, 16]
    """

    def kind(one: Sum) -> tuple[int, str]:
        return one.owner, str(one.tensor.dtype)

    found: list[Bucket] = []
    for _, alike in groupby(sorted(sums, key=kind), key=kind):
        room = -1
        for one in alike:
            size = one.numel * one.tensor.element_size()
            if not size:
                continue
            if size > room:
                found.append(Bucket([]))
                room = _BUCKET
            found[-1].sums.append(one)
            room -= size
    return found


def folded(upper: Tensor) -> Tensor:
    """The upper triangles of ``[..., D, D]`` as rectangles ``[..., ⌈D/2⌉, D + 1]``: late rows beside early ones.

    Example:
        >>> folded(torch.tensor([[1, 2, 3], [0, 4, 5], [0, 0, 6]]))
        tensor([[6, 1, 2, 3],
                [0, 0, 4, 5]])
    """
    size = upper.shape[-1]
    half = (size + 1) // 2
    rows = upper.new_zeros(*upper.shape[:-2], half, size + 1)
    rows[..., 1:] = upper[..., :half, :].triu()
    rows[..., : size - half, :-1] += upper[..., half:, :].flip(-2, -1).tril()
    return rows


def unfold_(rows: Tensor, upper: Tensor) -> Tensor:
    """The matrices whose upper triangles `folded` put into rectangles, zero below, written to `upper`.

    Example:
        >>> upper = torch.ones(5, 5).triu()
        >>> bool((unfold_(folded(upper), torch.empty(5, 5)) == upper).all())
        True
    """
    size = upper.shape[-1]
    half = (size + 1) // 2
    rows = rows.view(*upper.shape[:-2], half, size + 1)
    upper[..., :half, :] = rows[..., 1:].triu()
    upper[..., half:, :] = rows[..., : size - half, :-1].tril().flip(-2, -1)
    return upper
