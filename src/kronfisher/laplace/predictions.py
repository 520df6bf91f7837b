"""Predictions of a posterior, for one or several candidates of its prior at once."""

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from kronfisher.capture.forward import run
from kronfisher.capture.isolation import isolate
from kronfisher.errors import require_integer
from kronfisher.fisher.precision import Group, Precision
from kronfisher.laplace.linearised import covariances, variances
from kronfisher.laplace.posterior import Posterior
from kronfisher.laplace.targets import Labelled
from kronfisher.likelihoods import Likelihood, Prediction
from kronfisher.linalg import promote

__all__ = [
    "choose_predictor",
    "draw",
    "draw_outputs",
    "is_drawn",
    "log_densities",
    "predict",
    "require_draws",
    "run_drawn_networks",
    "standard_error",
]

_GROUPS = 20  # of draws; the relative error of a standard error from them is 1/√40


def choose_predictor(posterior: Posterior, predictor: str | None) -> str:
    """The predictor asked for; else the one that was calibrated, else the likelihood's default.

    Raises:
        ValueError: the likelihood has no such predictor, or another one was calibrated.
    """
    known = tuple(posterior.likelihood.predictors)
    chosen = predictor or posterior.calibrated_for or known[0]
    if chosen not in known:
        raise ValueError(f"predictor={predictor!r}: {type(posterior.likelihood).__name__} has {', '.join(known)}.")
    if posterior.calibrated_for not in (None, chosen):
        raise ValueError(
            f"predictor={chosen!r}, but the prior precision was calibrated for {posterior.calibrated_for!r}: what "
            f"suits one does not suit the other. Call calibrate(loader, predictor={chosen!r}), or set prior_precision."
        )
    return chosen


def require_draws(samples: int, seed: int) -> tuple[int, int]:
    """The number and the seed of draws, as integers."""
    samples = require_integer("samples", samples, 1, "the number of draws is an integer of at least 1")
    return samples, require_integer("seed", seed, -math.inf, "give an integer")


def predict(
    posterior: Posterior,
    batch: Any,
    candidates: Mapping[Group, Sequence[Precision]],
    predictor: str,
    samples: int,
    seed: int,
    likelihood: Likelihood | None = None,
) -> Iterator[Prediction]:
    """One prediction for every candidate, from one capture of the network where it is linearised.

    Args:
        posterior: whose network and likelihood are meant.
        batch: as its `forward` takes it.
        candidates: blocks → K candidates of their precision.
        predictor: a name in ``posterior.likelihood.predictors``.
        samples: draws, for predictors that need them.
        seed: of the draws.
        likelihood: of the targets, in place of the posterior's.

    Yields:
        K predictions.
    """
    likelihood, factor = likelihood or posterior.likelihood, posterior.noise_ratio
    basis = posterior.likelihood.predictors[predictor]
    if basis == "variances":
        outputs, each = variances(posterior.network(), batch, candidates)
        yield from (likelihood.predict_from_variances(outputs, variance, factor) for variance in each)
    elif basis == "covariances":
        outputs, each = covariances(posterior.network(), batch, candidates)
        yield from (likelihood.predict_from_covariances(outputs, covariance) for covariance in each)
    else:
        for draws in draw(posterior, batch, candidates, predictor, samples, seed):
            yield likelihood.predict_from_draws(draws, factor)


def log_densities(
    posterior: Posterior,
    batch: Any,
    labels: Labelled,
    candidates: Mapping[Group, Sequence[Precision]],
    predictor: str,
    samples: int,
    seed: int,
) -> Iterator[Tensor]:
    """The log density of the targets of a batch under every candidate; see `predict`.

    Args:
        posterior: whose network is meant.
        batch: as its `forward` takes it.
        labels: targets, and the likelihood that reads them.
        candidates: blocks → K candidates of their precision.
        predictor: a name in ``posterior.likelihood.predictors``.
        samples: draws, for predictors that need them.
        seed: of the draws.

    Yields:
        K times ``[n]``.
    """
    if is_drawn(posterior, predictor):
        for draws in draw(posterior, batch, candidates, predictor, samples, seed):
            yield labels.likelihood.log_density_from_draws(draws, labels.targets, posterior.noise_ratio)
    else:
        for prediction in predict(posterior, batch, candidates, predictor, samples, seed, labels.likelihood):
            yield labels.likelihood.log_predictive_density(prediction, labels.targets)


def is_drawn(posterior: Posterior, predictor: str) -> bool:
    """Whether a predictor is computed from draws, and not in closed form."""
    return posterior.likelihood.predictors[predictor] in ("draws", "networks")


def draw(
    posterior: Posterior,
    batch: Any,
    candidates: Mapping[Group, Sequence[Precision]],
    predictor: str,
    samples: int,
    seed: int,
) -> Iterator[Tensor]:
    """Draws of the outputs ``[S, n, ...]`` for every candidate, one candidate at a time; see `predict`."""
    if posterior.likelihood.predictors[predictor] == "networks":
        for k in range(len(next(iter(candidates.values())))):
            chosen = {group: options[k] for group, options in candidates.items()}
            yield run_drawn_networks(posterior, batch, chosen, samples, seed)
    else:
        outputs, each = covariances(posterior.network(), batch, candidates)
        yield from (draw_outputs(outputs, covariance, samples, seed) for covariance in each)


def standard_error(likelihood: Likelihood, draws: Tensor, targets: Any, noise_factor: float) -> Tensor:
    """The standard error of `Likelihood.log_density_from_draws`, ``[n]``: the jackknife over (at most) 20 groups.

    Args:
        likelihood: that reads the targets.
        draws: of the outputs, ``[S, n, ...]``.
        targets: as the likelihood takes them.
        noise_factor: on the noise variance.

    Returns:
        Infinity where there is a single draw, or none of some group gives a density above zero.
    """
    count = min(len(draws), _GROUPS)
    groups = draws.tensor_split(count)
    if count < 2:
        return torch.full_like(likelihood.log_density_from_draws(draws, targets, noise_factor), torch.inf)
    rests = [torch.cat([*groups[:k], *groups[k + 1 :]]) for k in range(count)]
    left_out = torch.stack([likelihood.log_density_from_draws(rest, targets, noise_factor) for rest in rests])
    error = ((count - 1) * left_out.var(0, correction=0)).sqrt()
    return error.where(error.isfinite(), torch.inf)  # densities of zero leave it unknown


def draw_outputs(outputs: Tensor, covariances: Tensor, samples: int, seed: int) -> Tensor:
    """Draws ``[S, n, ...]`` from ``N(outputs, covariances)``, example by example; a singular covariance is fine.

    Args:
        outputs: means ``[n, ...]``.
        covariances: ``[n, C, C]`` of the C (flattened) outputs of each example.
        samples: S.
        seed: of the draws.
    """
    generator = torch.Generator(outputs.device).manual_seed(seed)
    values, vectors = torch.linalg.eigh(covariances)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    mean = promote(outputs).flatten(1) if outputs.dim() > 1 else promote(outputs).unsqueeze(1)
    noise = torch.randn(samples, *mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return (mean + (root @ noise.unsqueeze(-1)).squeeze(-1)).reshape(samples, *outputs.shape)


def run_drawn_networks(
    posterior: Posterior, batch: Any, precisions: Mapping[Group, Precision], samples: int, seed: int
) -> Tensor:
    """Outputs ``[S, n, ...]`` of networks with parameters drawn from the posterior; the model itself is not touched."""
    posterior.check_parameters()
    network = deepcopy(posterior.model).requires_grad_(False)
    parameters = dict(network.named_parameters())
    outputs = []
    with isolate(network, seed):  # with gradients: the forward pass may take derivatives of its own
        for k in range(samples):  # one after the other: a few thousand draws of a large network would not fit
            drawn = posterior.by_name(posterior.draws(1, seed * 1_000_003 + k, precisions))
            for name, delta in drawn.items():
                parameters[name].copy_(posterior.mean[name] + delta[0])
            output, _ = run(network, batch, posterior.forward, posterior.fisher.device, "the batch to predict")
            outputs.append(output.detach())
    return torch.stack(outputs)
