"""A process group of torch.distributed: the few collectives that are used, counted."""

import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kronfisher.distributed.backends import device_of, is_of_collectives
from kronfisher.distributed.parcel import Parcel
from kronfisher.distributed.sums import Sum, buckets
from kronfisher.errors import RankError

__all__ = ["ProcessGroup", "Ranks", "describe", "raise_described", "ranks_of", "warn_of_ranks"]

ProcessGroup = Any
"""A process group, a one-dimensional device mesh, or None for one process."""


class Ranks:
    """The ranks of a process group, seen from one of them.

    Every method is a collective: all ranks call it, in the same order.

    Args:
        group: of torch.distributed, with more than one rank.

    Attributes:
        size: W.
        rank: this one's number in the group.
        device: where tensors lie while they are sent.
        members: the number of each rank among all that are initialised.
        collectives: how many were run; a message from one rank to another counts as one.
        sent: bytes that all ranks gave into them, alike on all of them; those of small values that are gathered apart.
    """

    def __init__(self, group: "dist.ProcessGroup") -> None:
        # Weakly: what outlives destroy_process_group() would keep gloo's threads, and end the process with an abort.
        self._group = weakref.ref(group)
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.device = device_of(group)
        self.members = [dist.get_global_rank(group, rank) for rank in range(self.size)]
        self._store = group.get_group_store() if hasattr(group, "get_group_store") else None  # torch 2.6 has no such
        self.collectives = self.sent = 0

    @property
    def group(self) -> "dist.ProcessGroup":
        """The process group.

        Raises:
            RankError: it was destroyed.
        """
        if (group := self._group()) is None:
            raise RankError("the process group was destroyed, and this needs its other ranks.")
        return group

    def __repr__(self) -> str:
        return f"Ranks({self.rank} of {self.size})"

    def __deepcopy__(self, memo: Any) -> "Ranks":
        return self  # a process group cannot be copied

    def gather(self, value: Any, call: str) -> list[Any]:
        """The values of all ranks, in their order; for small ones without tensors.

        Args:
            value: of this rank.
            call: what this rank does, in words: the others have to do the same.

        Raises:
            RankError: another rank has ended, or does not come, or does something else.
        """
        self.collectives += 1
        values: list[Any] = [None] * self.size
        with self._together(comes=True):
            dist.all_gather_object(values, (call, value), group=self.group)
        for rank, (other, _) in enumerate(values):
            if other != values[0][0]:
                raise RankError(
                    f"rank 0 {values[0][0]}, and rank {rank} {other}: every rank has to make the same calls."
                )
        return [value for _, value in values]

    def gathered(self, read: Callable[[], Any], call: str) -> list[Any]:
        """What each rank reads from its own data, in their order; small values without tensors.

        Raises:
            RankError: reading failed on another rank. Where it failed, its own error.
        """
        value, error = None, None
        try:
            value = read()
        except RankError:  # ranks have met while they read, and all know
            raise
        except Exception as problem:
            error = problem
        try:
            everywhere = self.gather((describe(error), value), call)
        except RankError as other:
            raise error or other from None
        raise_described([failure for failure, _ in everywhere], error)
        return [value for _, value in everywhere]

    def added(self, read: Callable[[], Sequence[float]], call: str) -> list[float]:
        """Numbers that each rank reads from its own data, added up in the order of ranks; raises as `gathered`."""
        return [sum(parts) for parts in zip(*self.gathered(lambda: list(read()), call), strict=True)]

    def summed(self, compute: Callable[[], Tensor], call: str) -> Tensor:
        """Tensors of one shape that each rank computes, added up at all of them to the same bits.

        Raises:
            RankError: it failed on another rank. Where it failed, its own error.
        """
        found: list[Tensor] = []
        self.gathered(lambda: found.append(compute()), call)
        self.sum_([Sum(found[0])])
        return found[0]

    def sum_(self, sums: Iterable[Sum]) -> None:
        """Sum tensors over all ranks, each at its owner; at all of them, to the same bits, where it has none.

        Args:
            sums: alike on all ranks but for their numbers; where another rank is the owner, these are lost.
        """
        for bucket in buckets(sums):
            flat, owner = bucket.packed(self.device), bucket.sums[0].owner
            self._count(flat.nbytes * self.size)
            with self._together():
                if owner < 0:
                    dist.all_reduce(flat, group=self.group)
                else:
                    dist.reduce(flat, self.members[owner], group=self.group)
            if owner in (-1, self.rank):
                bucket.take_(flat)

    def beside(self, own: Tensor) -> Tensor:
        """Numbers of all ranks ``[W, N]``, of `own` ``[N]`` of as many and one dtype on each; one collective."""
        numbers = own.to(self.device)
        found = numbers.new_empty(self.size, len(numbers))
        self._count(found.nbytes)
        with self._together():
            dist.all_gather(list(found), numbers, group=self.group)  # which every backend has
        return found.to(own.device)

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
                with self._together():
                    dist.send(parcel.numbers, self.members[owner], group=self.group)
            return []
        values = []
        for rank, frame in enumerate(frames):
            numbers = parcel.numbers
            if rank != owner:
                numbers = torch.empty(Parcel.size(frame), dtype=torch.uint8, device=self.device)
                if len(numbers):
                    with self._together():
                        dist.recv(numbers, self.members[rank], group=self.group)
            values.append(Parcel.open(frame, numbers, device))
        return values

    def share(self, value: Any, call: str, device: torch.device, *, anew: bool = False) -> list[Any]:
        """The values of all ranks, tensors included, at all of them.

        Args:
            value: of this rank.
            call: as in `gather`.
            device: where tensors are wanted.
            anew: unpack this rank's own, too, so that nothing of it is changed with the answer.
        """
        parcel = Parcel.of(value, self.device)
        values = []
        for rank, frame in enumerate(self.gather(parcel.frame, call)):
            numbers = parcel.numbers
            if rank != self.rank:
                numbers = torch.empty(Parcel.size(frame), dtype=torch.uint8, device=self.device)
            if len(numbers):
                self._broadcast(numbers, rank)
            values.append(value if rank == self.rank and not anew else Parcel.open(frame, numbers, device))
        return values

    def of(self, owner: int, function: Callable[[], Any], device: torch.device) -> Any:
        """A value that one rank computes, tensors included, at all of them.

        Args:
            owner: the rank.
            function: called there alone.
            device: where tensors are wanted.

        Raises:
            RankError: the function failed; on the other ranks. The owner gets its own error.
        """
        value, error, parcel = None, None, _NOTHING
        if self.rank == owner:
            try:
                parcel = Parcel.of(value := function(), self.device)
            except Exception as problem:
                error = problem
        box: list[Any] = [(describe(error), parcel.frame)]
        self.collectives += 1
        with self._together():
            dist.broadcast_object_list(box, self.members[owner], group=self.group)
        failure, frame = box[0]
        if failure:
            raise error or RankError(f"rank {owner}: {failure}")
        numbers = parcel.numbers
        if self.rank != owner:
            numbers = torch.empty(Parcel.size(frame), dtype=torch.uint8, device=self.device)
        if len(numbers):
            self._broadcast(numbers, owner)
        return value if self.rank == owner else Parcel.open(frame, numbers, device)

    def fill(self, like: Tensor, owner: int, function: Callable[[], Tensor]) -> Tensor:
        """A tensor that one rank computes, at all of them, by one broadcast unless it fails.

        Args:
            like: of its shape and dtype, on the device where it is wanted.
            owner: the rank.
            function: called there alone.

        Raises:
            RankError: as in `of`.
        """
        numbers, error = torch.zeros(like.numel() + 1, dtype=like.dtype, device=self.device), None
        if self.rank == owner:
            try:
                numbers[:-1] = function().flatten()
            except Exception as problem:
                numbers[-1], error = 1.0, problem
        self._broadcast(numbers, owner)
        if bool(numbers[-1]):

            def again() -> Any:
                assert error is not None
                raise error

            self.of(owner, again, like.device)
        return numbers[:-1].view(like.shape).to(like.device)

    def hand(self, value: Any, giver: int, taker: int, device: torch.device) -> Any:
        """A value of one rank, tensors included, at another; None elsewhere."""
        own = Parcel.of(value, self.device).frame if self.rank == giver else b""
        frame = self.gather(own, f"brings a block from rank {giver} to rank {taker}")[giver]
        parcel = Parcel.of(value, self.device) if self.rank == giver else _NOTHING
        frames = [frame if rank == giver else _NOTHING.frame for rank in range(self.size)]
        found = self.collect(parcel, frames, taker, device)
        return found[giver] if found else None

    def _broadcast(self, numbers: Tensor, owner: int) -> None:
        self._count(numbers.nbytes)
        with self._together():
            dist.broadcast(numbers, self.members[owner], group=self.group)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While collectives of others run, as of DDP: where one fails, the error names the ranks that have ended."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, RankError) or not is_of_collectives(error):
                raise
            raise RankError(f"rank {self.rank} lost the other ranks: {self._unanswered()} ({error}).") from error

    def _unanswered(self) -> str:
        """Who does not come to a roll call after a failure, which all others see as well, in words."""
        if self._store is None:
            return "one of them has ended"
        waiting, deadline = set(range(self.size)) - {self.rank}, time.monotonic() + _PATIENCE
        try:
            own = self._store.add(self._mark("failures", self.rank), 1)
            while waiting and time.monotonic() < deadline:
                waiting = {rank for rank in waiting if self._store.add(self._mark("failures", rank), 0) < own}
                time.sleep(0.05)
        except RuntimeError:
            return _NO_STORE
        missing = ", ".join(f"rank {rank}" for rank in sorted(waiting))
        return f"{missing or 'one of them'} has ended, or does not answer"

    @contextmanager
    def _together(self, *, comes: bool = False) -> Iterator[None]:
        """What the others take part in; if it fails, the error names those that have not come.

        Args:
            comes: whether a meeting begins, of which each rank leaves a mark in the group's store.
        """
        try:
            if comes and self._store is not None:
                self._store.add(self._mark("meetings", self.rank), 1)
            yield
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} could not meet the other ranks: {self._missing()} ({error}). Look at the messages "
                "of the others; every rank has to make the same calls."
            ) from error

    def _missing(self) -> str:
        """Who has not come to a meeting that failed, in words."""
        missing = []
        if self._store is not None:
            try:
                met = [self._store.add(self._mark("meetings", rank), 0) for rank in range(self.size)]
            except RuntimeError:
                return _NO_STORE
            missing = [f"rank {rank}" for rank, times in enumerate(met) if times < met[self.rank]]
        return f"{', '.join(missing) or 'one of them'} has ended, or did not come within the group's timeout"

    @staticmethod
    def _mark(what: str, rank: int) -> str:
        """A key of the group's store, which torchrun may keep when it starts ranks again: of this start alone."""
        return f"kronfisher {what} of {rank} at start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    def _count(self, sent: int) -> None:
        self.collectives += 1
        self.sent += sent


_NOTHING = Parcel.of(None)
_NO_STORE = "the process that holds the group's store, rank 0 unless torchrun does, has ended"
_PATIENCE = 5.0  # seconds in which a rank that is there sees that a collective failed


def describe(error: BaseException | None) -> str:
    """An error, for other ranks."""
    return "" if error is None else f"{type(error).__name__}: {error}"


def raise_described(failures: Iterable[str], error: Exception | None) -> None:
    """Raise the first failure that ranks have described, here this rank's own error, if any."""
    for rank, failure in enumerate(failures):
        if failure:
            raise error or RankError(f"rank {rank}: {failure}")


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
