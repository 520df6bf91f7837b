"""The factor on the prior precision that predicts validation data best."""

from typing import Any

import torch
from torch import Tensor

from kronfisher.capture.batches import as_batches, split
from kronfisher.errors import DataError
from kronfisher.laplace.posterior import Posterior
from kronfisher.laplace.predictions import predict

__all__ = ["best_scale"]


def best_scale(posterior: Posterior, data: Any, predictor: str, samples: int, seed: int) -> float:
    """The factor with the largest log density of validation data: nine decades at once, then finer around the best.

    Args:
        posterior: whose prior precision is to be multiplied.
        data: batches of inputs and targets.
        predictor: a name in ``posterior.likelihood.predictors``.
        samples: draws, for predictors that need them.
        seed: of the draws.

    Raises:
        DataError: there are no validation data, a batch has no targets, or they cannot be read twice.
    """
    batches, again = as_batches(data)
    batches = batches if again else list(batches)
    coarse = torch.logspace(-4, 4, 17, dtype=torch.float64)
    best = coarse[_log_densities(posterior, batches, coarse.tolist(), predictor, samples, seed).argmax()]
    fine = best * torch.logspace(-0.5, 0.5, 9, dtype=torch.float64)
    return float(fine[_log_densities(posterior, batches, fine.tolist(), predictor, samples, seed).argmax()])


def _log_densities(
    posterior: Posterior, batches: Any, factors: list[float], predictor: str, samples: int, seed: int
) -> Tensor:
    """The log density of the data under every factor, ``[K]`` in float64; minus infinity where it is not finite."""
    candidates = {group: [p.times(factor) for factor in factors] for group, p in posterior.precisions.items()}
    total = torch.zeros(len(factors), dtype=torch.float64)
    read = 0
    for read, batch in enumerate(batches, 1):
        where = f"validation batch {read - 1}"
        if posterior.forward is None:
            inputs, targets = split(batch, where)
            batch = (inputs, None)
        else:
            targets = posterior.forward(posterior.model, batch)[1]
        if targets is None:
            raise DataError(f"{where} has no targets; calibration needs (inputs, targets).")
        for k, prediction in enumerate(predict(posterior, batch, candidates, predictor, samples, seed)):
            density = posterior.likelihood.log_predictive_density(prediction, targets)
            total[k] += float(density.sum(dtype=torch.float64))
    if not read:
        raise DataError("the validation data hold no batch.")
    if not bool(torch.isfinite(total).any()):
        raise DataError("no prior precision gives a finite log density of the validation data; look at their targets.")
    return torch.where(torch.isfinite(total), total, -torch.inf)
