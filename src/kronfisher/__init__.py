"""Kronecker-factored Fisher matrices for PyTorch.

A matrix comes from ``kf.estimate(model, loader, kf.Categorical())`` and is a linear operator over the parameters.
"""

from kronfisher.coverage import Coverage, coverage
from kronfisher.damping import FactoredTikhonov, Tikhonov
from kronfisher.error import Distance
from kronfisher.errors import (
    DataError,
    MemoryBudgetError,
    NumericalError,
    NumericalWarning,
    SingularError,
    UnsupportedError,
)
from kronfisher.estimate import estimate
from kronfisher.experiments.compare import Comparison, compare
from kronfisher.fits import EKFAC, KFAC, Diagonal, Fit, Full
from kronfisher.laplace import Laplace, Prediction, laplace_backend
from kronfisher.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from kronfisher.operators import Fisher
from kronfisher.operators.storage import load

__version__ = "0.1.0"

__all__ = [
    "EKFAC",
    "KFAC",
    "Bernoulli",
    "Categorical",
    "Comparison",
    "Coverage",
    "DataError",
    "Diagonal",
    "Distance",
    "FactoredTikhonov",
    "Fisher",
    "Fit",
    "Full",
    "Gaussian",
    "Laplace",
    "Likelihood",
    "MemoryBudgetError",
    "NumericalError",
    "NumericalWarning",
    "Prediction",
    "SingularError",
    "Tikhonov",
    "UnsupportedError",
    "compare",
    "coverage",
    "estimate",
    "laplace_backend",
    "load",
]
