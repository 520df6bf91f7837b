"""The marginal likelihood of the data under a posterior, and the hyper-parameters that maximise it."""

from collections.abc import Callable, Sequence
from math import log, pi
from typing import Any

import torch
from torch import Tensor

from kronfisher.capture.batches import as_batches
from kronfisher.capture.forward import run
from kronfisher.capture.isolation import isolate
from kronfisher.distributed import Ranks
from kronfisher.errors import DataError, NumericalError, SingularError, UnsupportedError, require_integer
from kronfisher.fisher.layout import gather
from kronfisher.fisher.owned_precision import determinant
from kronfisher.laplace.posterior import Posterior

__all__ = ["best_factors", "log_evidence", "mean_square", "require_residuals", "score_training_data"]


def log_evidence(
    posterior: Posterior,
    *,
    priors: Sequence[Tensor] | None = None,
    factors: Sequence[Tensor] | None = None,
    noise: float | Tensor | None = None,
) -> Tensor:
    """See `Laplace.log_marginal_likelihood`.

    Args:
        posterior: whose data and network are meant.
        priors: prior precisions of its blocks instead of its own.
        factors: on its own prior precisions, one for each block; cheaper where these vary within a block.
        noise: variance instead of its own.
    """
    log_likelihood, outputs = posterior.training_score()
    device = posterior.fisher.device

    def number(value: float | Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float64, device=device)

    total = number(log_likelihood)
    if posterior.noise is not None:
        sigma = number(posterior.noise if noise is None else noise)
        squares = mean_square(log_likelihood, outputs, posterior.own_noise) * outputs
        total = -0.5 * (squares / sigma + outputs * (2 * pi * sigma).log())
    total = total / posterior.temperature
    scale = number(posterior.scale(noise))
    residual = {name: (mean - posterior.prior_mean[name])[None] for name, mean in posterior.mean.items()}
    for k, (group, precision) in enumerate(posterior.precisions.items()):
        prior = (precision.prior if priors is None else priors[k]).double()
        if priors is not None:
            volume = determinant(precision.operator, scale, prior, precision.name)
        else:
            factor = number(1.0 if factors is None else factors[k])
            volume, prior = precision.logdet(scale, factor), prior * factor
        if bool((prior <= 0).any()):
            raise SingularError(
                f"{precision.name}: a prior precision of zero is no prior; evidence needs a positive one."
            )
        delta = gather(group, residual)[0].double()
        logs = prior.log().sum() * (1 if prior.dim() else len(delta))
        total = total - 0.5 * ((prior * delta.square()).sum() + volume - logs)
    return total


def best_factors(posterior: Posterior, *, per_block: bool, noise: bool, steps: int) -> tuple[list[float], float | None]:
    """Factors on the prior precisions of all blocks, and the noise, at which the marginal likelihood is largest."""
    steps = require_integer("steps", steps, 1, "the number of steps is an integer of at least 1")
    blocks = len(posterior.precisions)
    own = blocks if per_block else 1
    start = torch.zeros(own + noise, dtype=torch.float64, device=posterior.fisher.device)
    if noise:
        posterior.require_single_noise("optimize_prior(noise=True)", "leave out noise=True to tune the prior alone")
        require_residuals(*posterior.training_score(), posterior.own_noise)
        start[-1] = log(posterior.noise or posterior.own_noise)

    def value(logs: Tensor) -> Tensor:
        factors = logs[:own].exp().expand(blocks)
        return log_evidence(posterior, factors=list(factors), noise=logs[-1].exp() if noise else None)

    best = maximise(value, start, steps=steps).exp().tolist()
    return best[:own] * (1 if per_block else blocks), best[-1] if noise else None


def score_training_data(posterior: Posterior, data: Any, ranks: Ranks | None = None) -> tuple[float, int]:
    """The log likelihood of training data at the mean of the posterior, and how many outputs they have.

    Args:
        posterior: whose model and likelihood are meant.
        data: batches of inputs and targets.
        ranks: which read a part of the data each; None: this process reads all.

    Raises:
        DataError: there are no data, or a batch has no targets, or none that fit.
        UnsupportedError: the Fisher matrix was estimated with a mask.
    """
    if getattr(getattr(posterior.fisher.context, "recipe", None), "mask", None) is not None:
        raise UnsupportedError(
            "the Fisher matrix was estimated with a mask, which the likelihood of the targets does not know; mark "
            "ignored positions in the targets (ignore_index) for the marginal likelihood, or calibrate."
        )

    def read() -> tuple[float, int]:
        total, outputs = 0.0, 0
        with isolate(posterior.model, 0):  # with gradients: the forward pass may take derivatives of its own
            for k, batch in enumerate(as_batches(data)[0]):
                values, targets = run(posterior.model, batch, posterior.forward, posterior.fisher.device, f"batch {k}")
                values = values.detach()
                posterior.likelihood.check(values, targets, f"batch {k}", "observed")
                total += float(posterior.likelihood.log_likelihood(values, targets))
                outputs += values.numel()
        return total, outputs

    total, outputs = read() if ranks is None else ranks.added(read, "scores training data")
    if not outputs:
        raise DataError("the training data hold no batch.")
    return total, int(outputs)


def mean_square(log_likelihood: float, outputs: float, variance: float) -> float:
    """The mean squared residual behind the log likelihood of so many numbers under Gaussian noise of `variance`."""
    return max(0.0, -2 * variance * (log_likelihood / outputs + log(2 * pi * variance) / 2))


def require_residuals(log_likelihood: float, outputs: float, variance: float) -> float:
    """`mean_square`, where it is more than rounding.

    Raises:
        DataError: the residuals are zero, or so small beside `variance` that nothing is known of them.
    """
    square = mean_square(log_likelihood, outputs, variance)
    if not square > 1e-11 * variance * (1 + abs(log(2 * pi * variance))):
        raise DataError(
            f"the mean squared residual of the training data is below the rounding of their likelihood under a noise "
            f"variance of {variance:.3g}, so that the noise cannot be determined. If the network fits its training "
            "data exactly, set noise= yourself; if its targets are tiny, scale them, or estimate the Fisher matrix "
            "under a Gaussian likelihood with a variance of their size."
        )
    return square


def maximise(function: Callable[[Tensor], Tensor], start: Tensor, *, steps: int = 100, reach: float = 25.0) -> Tensor:
    """The logarithms at which a smooth function is largest, near `start`, by L-BFGS in float64.

    Args:
        function: of the logarithms; 0-dim, differentiable.
        start: ``[K]``.
        steps: at most.
        reach: no logarithm moves further; a prior that wants to be infinite ends there.

    Raises:
        NumericalError: the function is not finite where it starts.
    """
    start = start.detach().double()
    offset = torch.zeros_like(start).requires_grad_()
    optimiser = torch.optim.LBFGS([offset], max_iter=steps, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def value(x: Tensor) -> Tensor:
        return -function(start + reach * torch.tanh(x / reach))

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = value(offset)
        loss.backward()
        return loss

    with torch.enable_grad():
        first = value(offset)
        if not bool(torch.isfinite(first)):
            raise NumericalError("the marginal likelihood is not finite at the present hyper-parameters")
        optimiser.step(closure)
    best = offset.detach()
    with torch.no_grad():
        if not bool(torch.isfinite(best).all()) or float(value(best)) > float(first.detach()):
            best = torch.zeros_like(best)
    return start + reach * torch.tanh(best / reach)
