"""Predictions of a posterior, for one or several candidates of its prior at once."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from kronfisher.capture.forward import run
from kronfisher.capture.isolation import isolate
from kronfisher.laplace.linearised import covariances, variances
from kronfisher.laplace.posterior import Posterior
from kronfisher.laplace.precision import Group, Precision
from kronfisher.likelihoods import Prediction
from kronfisher.linalg import promote

__all__ = ["choose_predictor", "draw_outputs", "predict", "run_drawn_networks"]


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


def predict(
    posterior: Posterior,
    batch: Any,
    candidates: Mapping[Group, Sequence[Precision]],
    predictor: str,
    samples: int,
    seed: int,
) -> list[Prediction]:
    """One prediction for every candidate, from one capture of the network where it is linearised.

    Args:
        posterior: whose network and likelihood are meant.
        batch: as its `forward` takes it.
        candidates: blocks → K candidates of their precision.
        predictor: a name in ``posterior.likelihood.predictors``.
        samples: draws, for predictors that need them.
        seed: of the draws.

    Returns:
        K predictions.
    """
    likelihood, factor = posterior.likelihood, posterior.noise_ratio
    basis = likelihood.predictors[predictor]
    if basis == "networks":
        count = len(next(iter(candidates.values())))
        chosen = [{group: options[k] for group, options in candidates.items()} for k in range(count)]
        return [
            likelihood.predict_from_draws(run_drawn_networks(posterior, batch, one, samples, seed), factor)
            for one in chosen
        ]
    network = posterior.network()
    if basis == "variances":
        outputs, each = variances(network, batch, candidates)
        return [likelihood.predict_from_variances(outputs, variance, factor) for variance in each]
    outputs, each = covariances(network, batch, candidates)
    if basis == "covariances":
        return [likelihood.predict_from_covariances(outputs, covariance) for covariance in each]
    return [
        likelihood.predict_from_draws(draw_outputs(outputs, covariance, samples, seed), factor) for covariance in each
    ]


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
    network = deepcopy(posterior.model)
    parameters = dict(network.named_parameters())
    outputs = []
    with isolate(network, seed), torch.no_grad():
        for k in range(samples):  # one after the other: a few thousand draws of a large network would not fit
            draw = posterior.by_name(posterior.draws(1, seed * 1_000_003 + k, precisions))
            for name, delta in draw.items():
                parameters[name].copy_(posterior.mean[name] + delta[0])
            outputs.append(run(network, batch, posterior.forward, posterior.fisher.device, "the batch to predict")[0])
    return torch.stack(outputs)
