"""Each rank's part of the batches of a loader: dealt in turn, nothing repeated and nothing left out."""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from kronfisher.distributed.ranks import ProcessGroup, Ranks, ranks_of
from kronfisher.distributed.shard_pass import ShardPass
from kronfisher.errors import DataError, RankError

__all__ = ["OTHER_ORDERS", "Shard", "shard", "warn_of_padding"]

OTHER_ORDERS = (
    "the batches were dealt out in different orders, so that some are read twice and others never. Let the loader "
    "shuffle alike on all ranks: with a generator of its own of the same seed, DataLoader(..., "
    "generator=torch.Generator().manual_seed(0)). Torch's global generator, which shuffles else, goes apart where "
    "ranks draw other numbers from it, as dropout does for a batch of another size."
)


def shard(loader: Any, group: ProcessGroup = None, *, equal: bool = False) -> Any:
    """This rank's part of the batches of a loader: batch k goes to rank k modulo W, whole and once.

    Nothing is padded or repeated, so that ranks may get different numbers of batches, and with fewer batches than ranks
    some get none. All ranks have to be given the same loader. One that shuffles has to do so alike everywhere: with a
    generator of its own of the same seed, or with torch's global one, which `estimate` seeds, and which goes apart in
    training where ranks draw other numbers from it, as dropout does for a smaller last batch. `estimate` compares the
    orders, and so do ranks at the end of a pass in which they get equally many batches. Others are refused.

    Ranks that train meet at every step: where batches of a shard are trained on as they are read, by `NaturalGradient`
    or `Preconditioner` with a group, every rank gets equally many, and the last few of the loader are left out.

    A ``DataLoader`` of a map-style data set loads this rank's examples only; of whatever else is iterated
    all batches are read, and its own passed on when those of the other ranks were read, too.

    Args:
        loader: a ``DataLoader``, a list of batches, or another iterable of batches.
        group: a process group or a one-dimensional device mesh; None: the default group, or one process where none is
            initialised.
        equal: leave out the last batches, of which not every rank would get one, whoever reads them: for training by
            other optimisers, and of batches that are read before.

    Returns:
        An iterable of batches that can be read as often as the loader; with one process the loader itself.

    Raises:
        DataError: the loader is dealt out to ranks already, or is a single batch; in training, or at the end of a pass
            with `equal`, there are fewer batches than ranks; at the end of a pass there was no batch for any rank.

    Example:
        >>> import torch, kronfisher as kf
        >>> batches = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(5)]
        >>> kf.shard(batches) is batches  # one process
        True
        >>> [len(kf.distributed.Shard(batches, rank, 2)) for rank in range(2)]
        [3, 2]
    """
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    ranks = ranks_of(group)
    if ranks is None:
        return loader
    return Shard(loader, ranks.rank, ranks.size, equal, ranks if equal else None, ranks.members)


def warn_of_padding(data: Any) -> None:
    """Warn of a loader whose sampler repeats examples, so that all ranks get equally many."""
    sampler = getattr(data, "sampler", None)
    if isinstance(sampler, DistributedSampler) and sampler.total_size > len(sampler.dataset):  # pyright: ignore[reportArgumentType]
        more = sampler.total_size - len(sampler.dataset)  # pyright: ignore[reportArgumentType]
        warnings.warn(
            f"the loader's DistributedSampler repeats {more} examples, which count twice: give kf.shard(loader) a "
            "loader without it.",
            UserWarning,
            stacklevel=3,
        )


class Shard:
    """One rank's part of the batches of a loader.

    Args:
        loader: of all batches.
        rank: whose part it is.
        ranks: how many there are.
        equal: leave out the last batches, of which not every rank would get one.
        meets: the ranks, where they compare orders at the end of every pass; None: only of one that is trained on.
        members: their numbers among all that are initialised.

    Attributes:
        order: a digest of the order in which all batches were dealt in the last pass, as far as it is known.
    """

    def __init__(
        self,
        loader: Any,
        rank: int,
        ranks: int,
        equal: bool = False,
        meets: Ranks | None = None,
        members: Sequence[int] = (),
    ) -> None:
        if isinstance(getattr(loader, "sampler", None), DistributedSampler):
            raise DataError(
                "the loader has a DistributedSampler, which deals out examples itself and repeats some where they do "
                "not divide by the number of ranks. Give kf.shard a loader without it."
            )
        if not isinstance(loader, Iterable) or isinstance(loader, dict | tuple) or hasattr(loader, "shape"):
            raise DataError(f"data is {type(loader).__name__}, one batch; kf.shard deals out the batches of a loader.")
        self.loader: Any = loader
        self.rank, self.ranks = rank, ranks
        self.order, self._read = "", 0  # how many batches of all ranks the last pass saw
        self.equal, self._meets, self._members = equal, meets, members
        self._dealt = _dealt(loader, rank, ranks, equal)
        self._part = None if self._dealt is None else _loading(self.loader, self._dealt)

    def __iter__(self) -> Iterator[Any]:
        """This rank's batches.

        Raises:
            RankError: at the end, where ranks compare, they had other orders; on all of them.
            DataError: at the end, there was no batch at all; or all were to get equally many, and there were fewer
                batches than ranks.
        """
        own = ShardPass(self._members, self._total(), self.equal)
        yield from own.given(self._batches())
        if not self._read:  # before ranks meet: others may wait for this one in a step
            raise DataError(
                f"rank {self.rank} of {self.ranks} was given a loader without a batch, so that kf.shard(loader) has "
                "none to deal out. In training the others wait for this rank in their first step. Look at the data of "
                "this rank; a generator can be read only once."
            )
        meets = self._meets or own.trained
        if meets is not None and len(set(orders := meets.gather(self.order, _PASSES))) > 1:
            other = next(rank for rank, order in enumerate(orders) if order != orders[0])
            raise RankError(f"rank 0 read {orders[0]}, rank {other} {orders[other]}; {OTHER_ORDERS}")
        if self.equal and not own.rounds:
            raise DataError(
                f"the loader has fewer batches than there are ranks ({self.ranks}), so that kf.shard(loader, "
                "equal=True) leaves out all of them: make batches smaller."
            )

    def _batches(self) -> Iterator[tuple[Any, bool]]:
        """This rank's, and whether all ranks get one of the same round."""
        if self._part is not None and self._dealt is not None:
            for place, batch in enumerate(self._part):
                yield batch, place != self._dealt.partial
            self.order, self._read = self._dealt.order, self._dealt.read
            return
        self._read = 0

        def count() -> Iterator[Any]:
            for batch in self.loader:
                self._read += 1
                yield batch

        yield from deal(count(), self.rank, self.ranks)
        self.order = f"{self._read} batches"

    def _total(self) -> int | None:
        try:
            return len(self.loader)
        except TypeError:
            return None

    def __len__(self) -> int:
        """How many batches this rank gets.

        Raises:
            TypeError: the loader does not know how many there are.
        """
        total = len(self.loader)
        return total // self.ranks if self.equal else len(range(self.rank, total, self.ranks))


def deal(entries: Iterable[Any], rank: int, ranks: int) -> Iterator[tuple[Any, bool]]:
    """Every W-th entry, and whether all ranks get one of its round.

    Example:
        >>> list(deal("abcde", 0, 2)), list(deal("abcde", 1, 2))
        ([('a', True), ('c', True), ('e', False)], [('b', True), ('d', True)])
    """
    own: list[Any] = []
    for place, entry in enumerate(entries):
        if place % ranks == rank:
            own = [entry]
        if own and place % ranks == ranks - 1:
            yield own.pop(), True
    if own:
        yield own.pop(), False


_PASSES = "is at the end of a pass over kf.shard(loader)"


class _Dealt:
    """Every W-th entry of a sampler, a digest of all entries, and which own one others have no counterpart of."""

    def __init__(self, sampler: Iterable[Any], rank: int, ranks: int, equal: bool) -> None:
        self.sampler, self.rank, self.ranks, self.equal, self.order = sampler, rank, ranks, equal, ""
        self.partial: int | None = None
        self.read = 0

    def __iter__(self) -> Iterator[Any]:
        digest, self.partial, self.read = hashlib.sha256(), None, 0

        def seen() -> Iterator[Any]:
            for entry in self.sampler:
                digest.update(repr(entry).encode())
                self.read += 1
                yield entry

        for place, (entry, whole) in enumerate(deal(seen(), self.rank, self.ranks)):
            if whole or not self.equal:
                self.partial = None if whole else place
                yield entry
        self.order = digest.hexdigest()[:16]

    def __len__(self) -> int:
        assert isinstance(self.sampler, Sized)
        total = len(self.sampler)
        return total // self.ranks if self.equal else len(range(self.rank, total, self.ranks))


def _dealt(loader: Any, rank: int, ranks: int, equal: bool) -> _Dealt | None:
    """Which examples this rank loads; None where all batches have to be read."""
    plain = isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__
    if not plain or isinstance(loader.dataset, IterableDataset):
        return None
    return _Dealt(loader.sampler if loader.batch_sampler is None else loader.batch_sampler, rank, ranks, equal)


def _loading(loader: DataLoader[Any], dealt: _Dealt) -> DataLoader[Any]:
    """The same loader for some of its examples."""
    names = ["num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "generator"]
    names += ["multiprocessing_context", "prefetch_factor", "persistent_workers"] if loader.num_workers else []
    options: dict[str, Any] = {name: getattr(loader, name) for name in names}
    if loader.batch_sampler is None:  # the data set makes batches itself
        return DataLoader(loader.dataset, batch_size=None, sampler=dealt, **options)
    return DataLoader(loader.dataset, batch_sampler=dealt, **options)
