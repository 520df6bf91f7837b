"""Which factor on the prior precision predicts validation data best."""

from typing import TYPE_CHECKING, Any

import torch

from kronfisher.capture.batches import passes_over, split
from kronfisher.errors import DataError
from kronfisher.laplace import predictive as links
from kronfisher.laplace.prediction import predictions

if TYPE_CHECKING:
    from kronfisher.laplace.laplace import Laplace

__all__ = ["best_scale"]


def best_scale(posterior: "Laplace", data: Any, predictor: str, samples: int, seed: int) -> float:
    """The factor with the largest log density of validation data: nine decades at once, then finer around the best.

    Raises:
        DataError: there are no validation data, a batch has no targets, or they cannot be read twice.
    """
    batches, again = passes_over(data)
    batches = batches if again else list(batches)
    coarse = torch.logspace(-4, 4, 17, dtype=torch.float64)
    best = coarse[_scores(posterior, batches, coarse.tolist(), predictor, samples, seed).argmax()]
    fine = best * torch.logspace(-0.5, 0.5, 9, dtype=torch.float64)
    return float(fine[_scores(posterior, batches, fine.tolist(), predictor, samples, seed).argmax()])


def _scores(
    posterior: "Laplace", batches: Any, factors: list[float], predictor: str, samples: int, seed: int
) -> torch.Tensor:
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
        found = predictions(posterior, batch, candidates, predictor, samples, seed)
        for k, prediction in enumerate(found):
            total[k] += float(links.log_density(posterior.likelihood, prediction, targets).sum(dtype=torch.float64))
    if not read:
        raise DataError("the validation data hold no batch.")
    if not bool(torch.isfinite(total).any()):
        raise DataError("no prior precision gives a finite log density of the validation data; look at their targets.")
    return torch.where(torch.isfinite(total), total, -torch.inf)
