"""Compare the error and the cost of fits on one network and one data set."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from torch import Tensor, nn

from kronfisher.capture.batches import as_batches
from kronfisher.distributed import ProcessGroup, ranks_of
from kronfisher.errors import DataError, MemoryBudgetError, NumericalError, RankError, UnsupportedError
from kronfisher.estimation.comparison import Comparison, Row
from kronfisher.estimation.estimate import estimate
from kronfisher.fits import FITS, Fit
from kronfisher.likelihoods import Likelihood

__all__ = ["compare", "measure", "parameters"]

SHOWN = 400  # the largest dimension of the block whose dense matrix is kept for the pictures


def compare(
    model: nn.Module,
    data: Iterable | tuple | Tensor,
    likelihood: Likelihood,
    *,
    fits: Sequence[str | Fit] | None = None,
    labels: str = "sampled",
    samples: int = 1,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = False,
    group: ProcessGroup = None,
) -> Comparison:
    """Estimate the Fisher of `model` with every fit and measure each against the exact blocks.

    The errors cost more than the estimates: they take the inner products of all pairs of per-example gradients, so a
    few hundred examples are enough.

    Args:
        model: as for `kronfisher.estimate`; put it in the desired mode first (usually eval).
        data: batches that can be iterated repeatedly and always come in the same order; or one batch.
        likelihood: what the outputs mean.
        fits: names or fit objects (default: every registered one).
        labels: "sampled", "exact" or "observed".
        samples: label draws per example, for sampled labels.
        seed: of the draws, the same for all fits.
        memory_budget: bytes; a fit that would take more is reported as refused.
        progress: print a line on standard error as each fit is done.
        group: the processes that read a part of the data each, as for `kronfisher.estimate`; all of them call this, and
            each gets the same errors, with seconds of its own.

    Returns:
        One row per fit. A fit that cannot be computed has its reason instead of numbers.

    Raises:
        DataError: the data cannot be iterated again, or a batch does not fit.
        UnsupportedError: the model cannot be treated by any fit.

    Example:
        >>> import torch, kronfisher as kf
        >>> layer = torch.nn.Linear(3, 2)
        >>> result = kf.compare(layer, torch.randn(20, 3), kf.Gaussian(), fits=["kfac", "full"], labels="exact")
        >>> [f"{row.fit} {row.error:.2f} {row.trace:.2f}" for row in result.rows]
        ['kfac 0.00 1.00', 'full 0.00 1.00']
    """
    options = {"labels": labels, "samples": samples, "seed": seed, "memory_budget": memory_budget}
    rows = []
    for row in measure(model, data, likelihood, fits, **options, group=group):
        rows.append(row)
        if progress:
            print(row, file=sys.stderr, flush=True)
    return Comparison(tuple(rows), {**options, "parameters": parameters(model)})


def measure(
    model: nn.Module,
    data: Iterable | tuple | Tensor,
    likelihood: Likelihood,
    fits: Sequence[str | Fit] | None = None,
    progress: Callable[[str], None] | bool = False,
    **options: Any,
) -> Iterator[Row]:
    """The rows of `compare`, each as soon as it is known; the other arguments are those of `kronfisher.estimate`."""
    if isinstance(data, Iterator):
        raise DataError(
            "compare reads the data once for every fit, and an iterator is empty after the first: give a list"
        )
    first = list(islice(as_batches(data)[0], 1))  # a batch in a list, as loaders make batches that are lists
    several = ranks_of(options.get("group")) is not None
    if not first and not several:
        raise DataError("compare was given no batches: the data are empty")
    options["progress"] = progress
    # The first estimate in a process pays for loading and allocating; it also raises early if the model is refused.
    estimate(model, data if several else first, likelihood, fit="diagonal", **options)
    exact = _time_estimate(model, data, likelihood, "diagonal", options)  # has the exact trace
    for fit in fits if fits is not None else tuple(name for name, fit in FITS.items() if fit.standard):
        try:
            fisher, seconds = exact if fit == "diagonal" else _time_estimate(model, data, likelihood, fit, options)
        except (UnsupportedError, MemoryBudgetError, NumericalError, RankError) as reason:
            yield Row(_label(fit), failure=str(reason))
            continue
        ratio = float(fisher.trace() / exact[0].trace())
        row = Row(_label(fit), int(fisher.count), seconds, fisher.bytes, trace=ratio, shown=_shown(fisher))
        try:
            error = fisher.error(data, progress=progress)
        except (MemoryBudgetError, NumericalError, RankError) as reason:
            yield replace(row, failure=f"its error could not be measured: {reason}")
            continue
        yield replace(row, error=float(error.relative), blocks=dict(error.blocks))


def parameters(model: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _time_estimate(model: nn.Module, data: Any, likelihood: Likelihood, fit: str | Fit, options: dict[str, Any]) -> Any:
    """The estimate and its wall time: the shortest of three for short ones, because a busy machine adds to it.

    Several ranks make one: they have to make the same calls.
    """
    best, began = math.inf, time.perf_counter()
    for _ in range(3):
        start = time.perf_counter()
        fisher = estimate(model, data, likelihood, fit=fit, **options)
        now = time.perf_counter()
        best = min(best, now - start)
        if now - began > 2 or options.get("group") is not None:
            break
    return fisher, best


def _label(fit: str | Fit) -> str:
    return fit if isinstance(fit, str) else repr(fit)


def _shown(fisher: Any) -> tuple[str, Tensor] | None:
    """The largest block that is small enough to be shown."""
    small = {name: block.dim for name, block in fisher.blocks.items() if block.dim <= SHOWN}
    if not small:
        return None
    name = max(small, key=lambda name: small[name])
    return name, fisher.blocks[name].to_dense().cpu()
