"""Laplace posteriors from any Fisher matrix: evidence, predictions, samples, calibration."""

from kronfisher.laplace.laplace import Laplace
from kronfisher.laplace.laplace_torch import laplace_backend
from kronfisher.likelihoods import Prediction

__all__ = ["Laplace", "Prediction", "laplace_backend"]
