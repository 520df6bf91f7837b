"""What the ranks of a process group put together in a step in the space of samples: rows, losses, values."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kronfisher.distributed import Ranks, describe, raise_described, train_on_what_is_read
from kronfisher.errors import NumericalError, RankError
from kronfisher.optim.sample_steps import Rows

__all__ = ["RowsOfRanks"]


class RowsOfRanks:
    """All ranks get the rows of all, and make the same step of them; one process has its own.

    Every method is a collective where there are ranks, in which an error of one is raised on all.

    Args:
        ranks: of the process group; None: one process.
        model: as it was given, perhaps wrapped.
        device: of its parameters.
    """

    def __init__(self, ranks: Ranks | None, model: nn.Module, device: torch.device) -> None:
        self.ranks, self._device = ranks, device
        self._ddp = _ddp(model)
        self._shares: list[float] = [1.0]

    @property
    def size(self) -> int:
        """W."""
        return 1 if self.ranks is None else self.ranks.size

    def begin(self) -> None:
        """Before a step: a shard that is read has to give all ranks a batch.

        Raises:
            DataError: it does not.
        """
        if self.ranks is not None:
            train_on_what_is_read(self.ranks)

    @contextmanager
    def passes(self) -> Iterator[None]:
        """In which the model runs: DDP would wait for a ``backward()`` that never comes."""
        if self._ddp is None:
            yield
            return
        with self._ddp.no_sync():
            yield

    def together(self, facts: dict[str, Any], loss: float, rows: Rows) -> tuple[float, Rows]:
        """The loss and the rows of all ranks' batches as of one.

        Args:
            facts: what has to be the same on all ranks, by name.
            loss: of this rank's batch.
            rows: of this rank's batch.

        Raises:
            RankError: ranks differ; on all of them.
        """
        if self.ranks is None:
            return loss, rows
        own = (facts, loss, rows.count, rows.matrix, rows.vector, rows.values, rows.rest, rows.parts)
        everywhere = self._everywhere(lambda: own)
        for name, value in everywhere[0][0].items():
            for rank, (other, *_) in enumerate(everywhere):
                if other[name] != value:
                    raise RankError(f"{name}: rank 0 has {value}, rank {rank} {other[name]}.")
        _, losses, counts, matrices, vectors, values, rests, parts = zip(*everywhere, strict=True)
        self._shares = [count / sum(counts) for count in counts]
        rest = [each for each in rests if each is not None]
        further = torch.stack(rest).sum(0) if rest else None
        whole = Rows(
            torch.cat(matrices),
            torch.cat(vectors),
            sum(counts),
            None if None in values else [part for own in values for part in own],
            further,
            rows.thin,
            {f"{what} of rank {rank}": many for rank, own in enumerate(parts) for what, many in own.items()},
        )
        return self._mean(losses), whole

    def loss(self, read: Callable[[], float]) -> float:
        """Of all ranks' batches, by what each reads from its own; ∞ where it is not finite on any."""

        def finite() -> float:
            try:
                return read()
            except NumericalError:  # residuals overflow at the end of this step, and a shorter one may help
                return math.inf

        return finite() if self.ranks is None else self._mean(self._everywhere(finite))

    def values(self, read: Callable[[], list[Tensor]]) -> list[Tensor] | None:
        """What all ranks' rows are derivatives of, in their order; None where it is not finite on any."""

        def finite() -> list[Tensor] | None:
            try:
                return read()
            except NumericalError:
                return None

        if self.ranks is None:
            return finite()
        parts = self._everywhere(finite)
        return None if any(own is None for own in parts) else [part for own in parts for part in own]

    def _everywhere(self, read: Callable[[], Any]) -> list[Any]:
        """What each rank reads, in their order, to the same bits on all."""
        assert self.ranks is not None
        value, error = None, None
        try:
            value = read()
        except Exception as problem:
            error = problem
        answers = self.ranks.share((describe(error), value), "shares its rows", self._device, anew=True)
        raise_described([failure for failure, _ in answers], error)
        return [value for _, value in answers]

    def checked(self, read: Callable[[], Any], number: Callable[[], int]) -> tuple[Any, list[int]]:
        """What this rank reads, if all could read theirs, and a number of each rank afterwards.

        Raises:
            RankError: reading failed on another rank. Where it failed, its own error.
        """
        if self.ranks is None:
            return read(), [number()]
        found: list[Any] = []

        def counted() -> int:
            found.append(read())
            return number()

        numbers = self.ranks.gathered(counted, "evaluates the loss")
        return found[0], numbers

    def _mean(self, losses: Any) -> float:
        return sum(share * loss for share, loss in zip(self._shares, losses, strict=True) if share)


def _ddp(model: Any) -> DistributedDataParallel | None:
    """What averages the gradients of a ``backward()``, if anything does."""
    while not isinstance(model, DistributedDataParallel):
        model = getattr(model, "_orig_mod", None)
        if model is None:
            return None
    return model
