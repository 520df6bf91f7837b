"""The factor on the prior precision that predicts validation data best."""

from typing import Any

import torch
from torch import Tensor

from kronfisher.capture.batches import as_batches
from kronfisher.distributed import Joined, Ranks
from kronfisher.errors import DataError
from kronfisher.laplace.posterior import Posterior
from kronfisher.laplace.predictions import log_densities
from kronfisher.laplace.targets import read_targets

__all__ = ["best_scale"]


def best_scale(
    posterior: Posterior, data: Any, predictor: str, samples: int, seed: int, ranks: Ranks | None = None
) -> float:
    """The factor with the largest log density of validation data: nine decades at once, then finer around the best.

    Args:
        posterior: whose prior precision is to be multiplied.
        data: batches of inputs and targets.
        predictor: a name in ``posterior.likelihood.predictors``.
        samples: draws, for predictors that need them.
        seed: of the draws.
        ranks: which read a part of the data each; None: this process reads all.

    Raises:
        DataError: there are no validation data, or a batch has no targets, or none that fit.
    """
    batches, again = as_batches(data)
    batches = batches if again else list(batches)
    if ranks is not None and posterior.owned:  # owners and the others predict every batch together
        batches, ranks = Joined(batches, ranks), None

    def best_of(factors: Tensor) -> Tensor:
        def read() -> list[float]:
            return _log_densities(posterior, batches, factors.tolist(), predictor, samples, seed)

        *sums, number = read() if ranks is None else ranks.added(read, "calibrates a posterior")
        if not number:
            raise DataError("the validation data hold no batch.")
        total = torch.tensor(sums, dtype=torch.float64)
        if not bool(torch.isfinite(total).any()):
            raise DataError(
                "no prior precision gives a finite log density of the validation data; look at their targets."
            )
        return factors[torch.where(torch.isfinite(total), total, -torch.inf).argmax()]

    best = best_of(torch.logspace(-4, 4, 17, dtype=torch.float64))
    return float(best_of(best * torch.logspace(-0.5, 0.5, 9, dtype=torch.float64)))


def _log_densities(
    posterior: Posterior, batches: Any, factors: list[float], predictor: str, samples: int, seed: int
) -> list[float]:
    """The log density of the data under every factor, and the number of batches."""
    candidates = {group: [p.times(factor) for factor in factors] for group, p in posterior.precisions.items()}
    total, read = [0.0] * len(factors), 0
    for read, batch in enumerate(batches, 1):
        inputs, labels = read_targets(posterior, batch, f"validation batch {read - 1}")
        densities = log_densities(posterior, inputs, labels, candidates, predictor, samples, seed)
        for k, density in enumerate(densities):
            total[k] += float(density.sum(dtype=torch.float64))
    return [*total, read]
