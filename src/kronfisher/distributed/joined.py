"""The batches of all ranks, at all of them."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from kronfisher.distributed.ranks import Ranks, describe, raise_described
from kronfisher.errors import RankError

__all__ = ["Joined"]

_END = object()


class Joined:
    """The first batch of every rank, then the second of each, and so on: all ranks see the same, in the same order.

    Reading them is a collective. Ranks may have different numbers of batches; those that have no more still take part.

    Args:
        batches: of this rank; they can be read as often as these.
        ranks: that read together.
    """

    def __init__(self, batches: Iterable[Any], ranks: Ranks) -> None:
        self.batches, self.ranks = batches, ranks

    def __iter__(self) -> Iterator[Any]:
        """One batch after the other.

        Raises:
            RankError: a batch could not be read on another rank. Where it failed, its own error.
        """
        own = iter(self.batches)
        while True:
            error, batch = None, None
            try:
                part = (batch,) if (batch := next(own, _END)) is not _END else ()
            except RankError:  # ranks have met while they read, and all know
                raise
            except Exception as problem:
                error, part = problem, ()
            everywhere = self.ranks.share((describe(error), part), "reads batches for all", torch.device("cpu"))
            raise_described([failure for failure, _ in everywhere], error)
            if not any(part for _, part in everywhere):
                return
            yield from (batch for _, part in everywhere for batch in part)
