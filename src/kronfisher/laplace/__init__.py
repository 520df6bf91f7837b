"""Laplace posteriors from any Fisher matrix: evidence, predictions, samples, calibration."""

from kronfisher.laplace.backend import laplace_backend
from kronfisher.laplace.laplace import Laplace
from kronfisher.laplace.links import Prediction

__all__ = ["Laplace", "Prediction", "laplace_backend"]
