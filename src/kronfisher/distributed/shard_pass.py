"""Passes over shards: a training tells the one that it reads that its ranks need equally many batches."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from kronfisher.distributed.ranks import Ranks
from kronfisher.errors import DataError

__all__ = ["ShardPass", "batches_trained_on", "train_on_what_is_read"]

_OPEN: list["ShardPass"] = []  # last the one that gave a batch last


class ShardPass:
    """One pass over a shard.

    Args:
        members: the numbers of the shard's ranks among all that are initialised.
        total: how many batches all of them get together; None: it is not known.
        equal: leave out rounds of which not every rank gets a batch.

    Attributes:
        trained: the ranks that train on the batches; None: none do, as far as is known.
        rounds: how many batches were given.
    """

    def __init__(self, members: Sequence[int], total: int | None, equal: bool) -> None:
        self.members, self.total, self.equal = members, total, equal
        self.trained: Ranks | None = None
        self.rounds = 0
        self._whole = True

    def given(self, entries: Iterable[tuple[Any, bool]]) -> Iterator[Any]:
        """This rank's batches; of a round that is not whole only where nobody trains on them.

        Args:
            entries: batches, and whether every rank gets one of the same round.
        """
        _OPEN.append(self)
        try:
            for batch, whole in entries:
                if whole or not (self.equal or self.trained):
                    self._whole, self.rounds = whole, self.rounds + 1
                    _OPEN.sort(key=lambda each: each is self)
                    yield batch
        finally:
            _OPEN.remove(self)

    def train(self, ranks: Ranks) -> None:
        """Ranks meet at every step from now on.

        Raises:
            DataError: the others have no batch in this round.
        """
        if not self._whole:
            some = "" if self.total is None else f" of {self.total} batches"
            raise DataError(
                f"kf.shard(loader){some} has given this rank a batch, and others none of the same round, while all "
                f"{ranks.size} ranks meet at every step and would wait for them. Make batches smaller, so that there "
                "are no fewer than ranks; where batches are read before they are trained on, or skipped as by a "
                "training that goes on, give kf.shard(loader, equal=True)."
            )
        self.trained = ranks


def train_on_what_is_read(ranks: Ranks) -> None:
    """Tell the shard that gave a batch last, if any is being read, that ranks train on it.

    A shard of more ranks, of which these are some, is meant as well.

    Raises:
        DataError: see `ShardPass.train`.
    """
    if _OPEN and _OPEN[-1].trained is None and set(ranks.members) <= set(_OPEN[-1].members):
        _OPEN[-1].train(ranks)


def batches_trained_on() -> str:
    """How many batches there are in the shard that is trained on, in words; nothing where that is not known."""
    last = _OPEN[-1] if _OPEN else None
    return "" if last is None or last.trained is None or last.total is None else f"{last.total} batches"
