"""A process group of torch.distributed: the few collectives that are used, counted."""

import warnings
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kronfisher.distributed.parcel import Parcel
from kronfisher.errors import RankError

__all__ = ["ProcessGroup", "Ranks", "ranks_of", "warn_of_ranks"]

ProcessGroup = Any
"""A process group, a one-dimensional device mesh, or None for one process."""

_BUCKET = 25 * 2**20  # bytes that are reduced at once


class Ranks:
    """The ranks of a process group, seen from one of them.

    Every method is a collective: all ranks call it, in the same order.

    Args:
        group: of torch.distributed, with more than one rank.

    Attributes:
        size: W.
        rank: this one's number in the group.
        collectives: how many were run; a message from one rank to another counts as one.
        sent: bytes that all ranks gave into them, alike on all of them; those of small values that are gathered apart.
    """

    def __init__(self, group: "dist.ProcessGroup") -> None:
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        on_cuda = "nccl" in str(dist.get_backend(group))
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
        self._global = [dist.get_global_rank(group, rank) for rank in range(self.size)]
        self.collectives = self.sent = 0

    def __repr__(self) -> str:
        return f"Ranks({self.rank} of {self.size})"

    def __deepcopy__(self, memo: Any) -> "Ranks":
        return self  # a process group cannot be copied

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order; for small ones without tensors.

        Raises:
            RankError: another rank has ended, or does not come.
        """
        self.collectives += 1
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} could not meet the other ranks: one of them has ended, or did not come within the "
                f"group's timeout ({error}). Look at the messages of the others; every rank has to make the same calls."
            ) from error
        return values

    def reduce_(self, tensors: Iterable[tuple[Tensor, int]]) -> None:
        """Sum tensors over all ranks, each at its owner; elsewhere their numbers are lost afterwards.

        Args:
            tensors: with their owners; alike on all ranks but for their numbers.
        """
        tensors = sorted(tensors, key=lambda pair: (pair[1], str(pair[0].dtype)))
        for (owner, _), pairs in groupby(tensors, key=lambda pair: (pair[1], str(pair[0].dtype))):
            for bucket in _buckets([tensor for tensor, _ in pairs]):
                flat = torch.cat([tensor.flatten() for tensor in bucket]).to(self.device)
                self._count(flat.nbytes * self.size)
                dist.reduce(flat, self._global[owner], group=self.group)
                if owner != self.rank:
                    continue
                for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all ranks, at all of them, to the same bits everywhere."""
        for _, alike in groupby(sorted(tensors, key=lambda t: str(t.dtype)), key=lambda t: str(t.dtype)):
            for bucket in _buckets(list(alike)):
                flat = torch.cat([tensor.flatten() for tensor in bucket]).to(self.device)
                self._count(flat.nbytes * self.size)
                dist.all_reduce(flat, group=self.group)
                for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def collect(self, parcel: Parcel, frames: Sequence[bytes], owner: int, device: torch.device) -> list[Any]:
        """What all ranks have, at one of them, in the order of ranks; elsewhere nothing.

        Args:
            parcel: of this rank.
            frames: of the parcels of all ranks.
            owner: the rank that gets them.
            device: where tensors are wanted.
        """
        for rank, frame in enumerate(frames):
            if rank != owner and (size := Parcel.size(frame)):
                self._count(size)
        if self.rank != owner:
            if len(parcel.numbers):
                dist.send(parcel.numbers, self._global[owner], group=self.group)
            return []
        values = []
        for rank, frame in enumerate(frames):
            numbers = parcel.numbers
            if rank != owner:
                numbers = torch.empty(Parcel.size(frame), dtype=torch.uint8, device=self.device)
                if len(numbers):
                    dist.recv(numbers, self._global[rank], group=self.group)
            values.append(Parcel.open(frame, numbers, device))
        return values

    def share(self, value: Any, device: torch.device, *, anew: bool = False) -> list[Any]:
        """The values of all ranks, tensors included, at all of them.

        Args:
            value: of this rank.
            device: where tensors are wanted.
            anew: unpack this rank's own, too, so that nothing of it is changed with the answer.
        """
        parcel = Parcel.of(value, self.device)
        values = []
        for rank, frame in enumerate(self.gather(parcel.frame)):
            numbers = parcel.numbers
            if rank != self.rank:
                numbers = torch.empty(Parcel.size(frame), dtype=torch.uint8, device=self.device)
            if len(numbers):
                self._count(numbers.nbytes)
                dist.broadcast(numbers, self._global[rank], group=self.group)
            values.append(value if rank == self.rank and not anew else Parcel.open(frame, numbers, device))
        return values

    def _count(self, sent: int) -> None:
        self.collectives += 1
        self.sent += sent


def _buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Tensors of one dtype in their order, together as large as is sent at once; larger ones alone."""
    buckets, room = [], 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if not size:
            continue
        if not buckets or size > room:
            buckets.append([])
            room = _BUCKET
        buckets[-1].append(tensor)
        room -= size
    return buckets


def ranks_of(group: ProcessGroup) -> Ranks | None:
    """The ranks of a group; None for one process.

    Raises:
        RuntimeError: no process group is initialised.
        ValueError: a device mesh has several dimensions, or this process is not in the group.
        TypeError: it is no group.
    """
    if group is None:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "group= was given, but no process group is initialised: call torch.distributed.init_process_group() first, "
            "or leave group out for one process."
        )
    if hasattr(group, "get_group") and hasattr(group, "ndim"):  # a device mesh
        if group.ndim != 1:
            raise ValueError(
                f"group={group!r} is a mesh of {group.ndim} dimensions; name the one that the data are split over, as "
                "in mesh['dp']."
            )
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not in the group that was given; only its ranks may call.")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group={group!r} is of type {type(group).__name__}; give a process group or a device mesh.")
    return Ranks(group) if dist.get_world_size(group) > 1 else None


def warn_of_ranks() -> None:
    """Warn that several ranks are there, of which an estimate without a group sees one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(
            f"{dist.get_world_size()} ranks are initialised, and this estimate sees the data of one of them: give "
            "group=torch.distributed.group.WORLD, and kf.shard(loader) for the data, for all of them together.",
            UserWarning,
            stacklevel=3,
        )
