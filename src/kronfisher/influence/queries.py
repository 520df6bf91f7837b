"""The gradients of queries, some at a time."""

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from kronfisher.errors import DataError, MemoryBudgetError
from kronfisher.estimation.progress import Progress
from kronfisher.fisher import Fisher
from kronfisher.fisher.layout import Blocks
from kronfisher.influence.preconditioned import Damped, written_out
from kronfisher.influence.readings import Network, Question, read, require_finite
from kronfisher.influence.vectors import Vectors
from kronfisher.layers.samples import Samples
from kronfisher.likelihoods import Likelihood
from kronfisher.linalg import plain_arithmetic
from kronfisher.operators.memory import available_memory

__all__ = ["query_gradients", "require_order"]

_DRAWING = RandomSampler, SubsetRandomSampler, WeightedRandomSampler


def query_gradients(
    network: Network,
    likelihood: Likelihood,
    fisher: Fisher,
    queries: Any,
    at_once: int | None = None,
    progress: Progress = False,
    damped: Damped | None = None,
    meet: Callable[[Any], None] | None = None,
) -> Iterator[Vectors]:
    """``∇m`` of some queries at a time, or ``(F + λ)⁻¹ ∇m``.

    Args:
        network: the model, and how batches go through it.
        likelihood: the loss or another measurement, see `kronfisher.influence.measurements`.
        fisher: in whose form they are.
        queries: batches in a fixed order.
        at_once: batches are put together until there are so many; None: all of them.
        progress: as for `kronfisher.estimate`.
        damped: F + λ, if they are to be solved; where it has a basis of factors, from inputs and output gradients.
        meet: as for `kronfisher.influence.readings.read`.

    Raises:
        DataError: the queries do not fit, or are shuffled.
        MemoryBudgetError: so many do not fit.
        NumericalError: a gradient is not finite.
    """
    require_order(queries, "queries")
    solved: set[Blocks] = set()

    def gradient(blocks: Blocks, samples: tuple[Samples, ...]) -> Tensor:
        if damped is not None and (found := damped.solved(blocks[0], samples[0])) is not None:
            solved.add(blocks)
            return found
        return written_out(samples[0])

    questions: dict[str, Question] = {"gradient": gradient}
    wide = torch.promote_types(fisher.dtype, torch.float32)
    each, size, limit = fisher.dim * wide.itemsize, 0, available_memory(fisher.device)
    waiting: list[Vectors] = []
    for reading in read(network, likelihood, queries, questions, what="query batch", progress=progress, meet=meet):
        size += reading.size
        if 2 * size * each > limit:
            raise MemoryBudgetError(
                f"{reading.where}: the gradients of {size} queries take {size * each:,} bytes twice, more than the "
                f"free {limit:,}. Give at_once={max(limit // (3 * each), 1)} with smaller batches."
            )
        for answer in (answers := dict(reading.answers["gradient"])).values():
            require_finite(answer, reading.where)
        with plain_arithmetic(fisher.device):
            done = {blocks[0]: answers.pop(blocks).to(wide) for blocks in solved}
            vectors = Vectors.of_answers(fisher, answers, reading.size, wide)
            if damped is not None:
                damped.solve_(vectors)
            waiting.append(vectors.plus(done))
        solved.clear()
        del answers, reading, vectors, done
        if at_once is not None and size >= at_once:
            joined, waiting, size = Vectors.join(waiting), [], 0
            yield joined
    if waiting:
        joined, waiting = Vectors.join(waiting), []
        yield joined


def require_order(data: Any, what: str) -> None:
    """DataError for loaders whose order is anybody's guess, or that never end."""
    for one in _samplers(data):
        if isinstance(one, _DRAWING) or getattr(one, "shuffle", False) is True:
            raise DataError(
                f"{what} comes from a loader that shuffles ({type(one).__name__}), so that nobody knows whose scores "
                "they are: make it with shuffle=False, or with a sampler that has a fixed order."
            )
    if isinstance(data, cycle):
        raise DataError(f"{what} never ends: pass a loader that reads every example once.")


def _samplers(data: Any) -> Iterator[Any]:
    """A loader, the one that it deals out (`kf.shard`), and the samplers of examples and of batches below them."""
    yield data
    for name in ("loader", "sampler", "batch_sampler"):
        if (inner := getattr(data, name, None)) is not None:
            yield from _samplers(inner)
