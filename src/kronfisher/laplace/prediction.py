"""Predictions of a posterior, for one or several candidates of its prior at once."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kronfisher.capture.batches import run
from kronfisher.capture.isolation import isolated
from kronfisher.laplace import predictive as links
from kronfisher.laplace.linearised import Group, covariances, variances
from kronfisher.laplace.precision import Precision
from kronfisher.laplace.predictive import Prediction
from kronfisher.likelihoods import Categorical

if TYPE_CHECKING:
    from kronfisher.laplace.laplace import Laplace

__all__ = ["predictions", "sampled_outputs"]

Candidates = Mapping[Group, Sequence[Precision]]


def predictions(
    posterior: "Laplace", batch: Any, candidates: Candidates, predictor: str, samples: int, seed: int
) -> list[Prediction]:
    """One prediction for every candidate, from one capture of the network where it is linearised."""
    likelihood, ratio = posterior.likelihood, posterior.noise_ratio
    if predictor == "sampled":
        count = len(next(iter(candidates.values())))
        chosen = [{group: several[k] for group, several in candidates.items()} for k in range(count)]
        draws = [sampled_outputs(posterior, batch, one, samples, seed) for one in chosen]
        return [links.mixture(likelihood, one, ratio) for one in draws]
    network = posterior.network()
    if predictor in ("linearized", "probit"):
        outputs, several = variances(network, batch, candidates)
        return [links.closed_form(likelihood, outputs, variance, ratio) for variance in several]
    outputs, several = covariances(network, batch, candidates)
    if predictor == "bridge":
        assert isinstance(likelihood, Categorical)
        return [links.bridge(likelihood, outputs, covariance) for covariance in several]
    draws = [links.gaussian_draws(outputs, covariance, samples, seed) for covariance in several]
    return [links.mixture(likelihood, one, ratio) for one in draws]


def sampled_outputs(
    posterior: "Laplace", batch: Any, precisions: Mapping[Group, Precision], samples: int, seed: int
) -> Tensor:
    """Outputs ``[S, n, ...]`` of networks with parameters drawn from the posterior; the model itself is not touched."""
    posterior.check_parameters()
    network = deepcopy(posterior.model)
    parameters = dict(network.named_parameters())
    found = []
    with isolated(network, seed), torch.no_grad():
        for k in range(samples):  # one after the other: a few thousand draws of a large network would not fit
            draw = posterior.by_name(posterior.draws(1, seed * 1_000_003 + k, precisions))
            for name, delta in draw.items():
                parameters[name].copy_(posterior.mean[name] + delta[0])
            found.append(run(network, batch, posterior.forward, posterior.fisher.device, "the batch to predict")[0])
    return torch.stack(found)
