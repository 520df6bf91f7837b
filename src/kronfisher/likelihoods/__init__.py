"""Likelihoods: the vectors that are sent backwards through a network for its Fisher matrix, and its predictions."""

from kronfisher.likelihoods.bernoulli import Bernoulli
from kronfisher.likelihoods.categorical import Categorical
from kronfisher.likelihoods.draws import Draws
from kronfisher.likelihoods.gaussian import Gaussian
from kronfisher.likelihoods.heteroscedastic import HeteroscedasticGaussian
from kronfisher.likelihoods.likelihood import Likelihood
from kronfisher.likelihoods.poisson import Poisson
from kronfisher.likelihoods.positions import along_outputs, masked_positions
from kronfisher.likelihoods.prediction import Prediction
from kronfisher.likelihoods.registry import REGISTRY, Registered, register
from kronfisher.likelihoods.residuals import Residuals
from kronfisher.likelihoods.weighted import Weighted

__all__ = [
    "REGISTRY",
    "Bernoulli",
    "Categorical",
    "Draws",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Likelihood",
    "Poisson",
    "Prediction",
    "Registered",
    "Residuals",
    "Weighted",
    "along_outputs",
    "masked_positions",
    "register",
]
