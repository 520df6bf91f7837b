"""From a Gaussian over the outputs of a network to a prediction of the targets."""

from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor

from kronfisher.errors import UnsupportedError
from kronfisher.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from kronfisher.likelihoods.likelihood import promote

__all__ = ["Prediction", "bridge", "closed_form", "gaussian_draws", "mixture", "predictors"]


@dataclass(frozen=True)
class Prediction:
    """What a posterior says about the targets of n data; ``variance = epistemic_variance + noise_variance``.

    Attributes:
        mean: ``[n, ...]`` expected targets; class probabilities for classes, where the outputs have the classes.
        variance: ``[n, ...]`` of the targets, entry by entry, in their squared units; for classes ``p(1 − p)``, the
            variance of the indicator of each class.
        epistemic_variance: the part that comes from not knowing the parameters: more data would remove it.
        noise_variance: the part that remains if they were known, averaged over the posterior.
    """

    mean: Tensor
    variance: Tensor
    epistemic_variance: Tensor
    noise_variance: Tensor


def predictors(likelihood: Likelihood) -> tuple[str, ...]:
    """The predictors that a likelihood has, the default first."""
    if isinstance(likelihood, Gaussian):
        return ("linearized", "mc", "sampled")
    if isinstance(likelihood, Categorical):
        return ("probit", "bridge", "mc", "sampled")
    return ("probit", "mc", "sampled") if isinstance(likelihood, Bernoulli) else ("mc", "sampled")


def closed_form(likelihood: Likelihood, outputs: Tensor, variance: Tensor, noise: float = 1.0) -> Prediction:
    """The prediction from outputs and their marginal variances: exact for Gaussian noise, else by the probit link.

    The probit link shrinks logits, ``f / √(1 + π σ²/8)`` (MacKay 1992; for classes as in Gibbs 1997). The part of the
    variance that the parameters are to blame for is that of the linearised probabilities, at most all of it.

    Args:
        likelihood: Gaussian, Bernoulli or categorical.
        outputs: ``[n, ...]``.
        variance: ``[n, ...]`` of the outputs.
        noise: factor on the likelihood's own noise variance (Gaussian only).
    """
    outputs = promote(outputs)
    if isinstance(likelihood, Gaussian):
        spread = likelihood.noise_variance(outputs).to(outputs.dtype) * noise
        return Prediction(outputs, variance + spread, variance, spread)
    mean = likelihood.mean(outputs / (1 + pi / 8 * variance).sqrt())
    p, total = likelihood.mean(outputs), mean * (1 - mean)
    if isinstance(likelihood, Categorical):
        axis = likelihood._axis(outputs, None)
        # Rows of the softmax's Jacobian p_i (δ_ij − p_j), squared, times the variances of the logits.
        linear = p.square() * ((1 - 2 * p) * variance + (p.square() * variance).sum(axis, keepdim=True))
    else:
        linear = (p * (1 - p)).square() * variance
    epistemic = torch.minimum(linear, total)
    return Prediction(mean, total, epistemic, total - epistemic)


def bridge(likelihood: Categorical, outputs: Tensor, covariance: Tensor) -> Prediction:
    """The Laplace bridge: a Dirichlet distribution that fits the Gaussian over the logits (Hobbhahn et al. 2022).

    Logits are first conditioned to sum to zero, as their softmax does not depend on the sum.

    Args:
        likelihood: says where the classes are.
        outputs: logits.
        covariance: ``[n, C, C]`` of all outputs of a datum; classes at other positions do not enter.
    """
    axis = likelihood._axis(outputs, None)
    last = promote(outputs).movedim(axis, -1)
    classes = last.shape[-1]
    places = torch.arange(outputs[0].numel(), device=outputs.device).reshape(outputs.shape[1:])
    places = places.movedim(axis - 1, -1).reshape(-1, classes)
    logits = last.reshape(len(outputs), -1, classes)
    cov = covariance[:, places[:, :, None], places[:, None, :]]  # [n, positions, classes, classes]
    rows, total = cov.sum(-1), cov.sum((-1, -2)).unsqueeze(-1)
    certain = total <= 0  # nothing to condition on
    inverse = torch.where(certain, 0.0, 1 / torch.where(certain, 1.0, total))
    logits = logits - rows * logits.sum(-1, keepdim=True) * inverse
    spread = cov.diagonal(dim1=-2, dim2=-1) - rows.square() * inverse
    spread = spread.clamp_min(torch.finfo(spread.dtype).tiny ** 0.5)
    shifted = logits.exp() * (-logits).exp().sum(-1, keepdim=True)
    alpha = (1 - 2 / classes + shifted / classes**2) / spread
    strength = alpha.sum(-1, keepdim=True)
    mean = alpha / strength

    def laid_out(tensor: Tensor) -> Tensor:
        return tensor.reshape(last.shape).movedim(-1, axis)

    variance = mean * (1 - mean)
    epistemic = variance / (strength + 1)
    return Prediction(laid_out(mean), laid_out(variance), laid_out(epistemic), laid_out(variance - epistemic))


def mixture(likelihood: Likelihood, outputs: Tensor, noise: float = 1.0) -> Prediction:
    """The prediction from S draws of the outputs ``[S, n, ...]``; any likelihood with a mean and a noise variance."""
    draws = [(likelihood.mean(one), likelihood.noise_variance(one)) for one in outputs]
    means = torch.stack([mean for mean, _ in draws])
    spread = torch.stack([variance for _, variance in draws]).mean(0).to(means.dtype)
    if isinstance(likelihood, Gaussian):
        spread = spread * noise
    mean = means.mean(0)
    epistemic = (means - mean).square().mean(0)
    return Prediction(mean, epistemic + spread, epistemic, spread)


def gaussian_draws(outputs: Tensor, covariance: Tensor, samples: int, seed: int) -> Tensor:
    """Draws ``[S, n, ...]`` from ``N(outputs, covariance)``, datum by datum; a singular covariance is fine."""
    generator = torch.Generator(outputs.device).manual_seed(seed)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    mean = promote(outputs).flatten(1) if outputs.dim() > 1 else promote(outputs).unsqueeze(1)
    noise = torch.randn(samples, *mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return (mean + (root @ noise.unsqueeze(-1)).squeeze(-1)).reshape(samples, *outputs.shape)


def log_density(likelihood: Likelihood, prediction: Prediction, targets: Tensor) -> Tensor:
    """``log p(targets)`` ``[n]`` under a prediction, as if entries were independent.

    Raises:
        UnsupportedError: mean and variance do not give the distribution.
    """
    mean = prediction.mean
    if isinstance(likelihood, Gaussian):
        variance = prediction.variance.reshape(mean.shape)
        terms = (targets - mean).square() / variance + (2 * pi * variance).log()
        return -0.5 * terms.unsqueeze(-1).flatten(1).sum(1)
    tiny = torch.finfo(mean.dtype).tiny
    if isinstance(likelihood, Categorical):  # logarithms of probabilities are logits of the same probabilities
        return likelihood.log_prob(mean.clamp_min(tiny).log(), targets)
    if isinstance(likelihood, Bernoulli):
        return likelihood.log_prob(torch.logit(mean, eps=torch.finfo(mean.dtype).eps), targets)
    raise UnsupportedError(f"{type(likelihood).__name__} has no closed form; use predictor='mc' or 'sampled'.")
