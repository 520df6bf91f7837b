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
from kronfisher.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from kronfisher.natural_gradient import IterateAverage, NaturalGradient, Refresh, batch_size_at
from kronfisher.operators import Fisher
from kronfisher.operators.storage import load
from kronfisher.preconditioner import Preconditioner
from kronfisher.trust import Constant, LevenbergMarquardt, Schedule

__version__ = "0.1.0"

__all__ = [
    "EKFAC",
    "KFAC",
    "Bernoulli",
    "Categorical",
    "Comparison",
    "Constant",
    "Coverage",
    "DataError",
    "Diagonal",
    "Distance",
    "FactoredTikhonov",
    "Fisher",
    "Fit",
    "Full",
    "Gaussian",
    "IterateAverage",
    "LevenbergMarquardt",
    "Likelihood",
    "MemoryBudgetError",
    "NaturalGradient",
    "NumericalError",
    "NumericalWarning",
    "Preconditioner",
    "Refresh",
    "Schedule",
    "SingularError",
    "Tikhonov",
    "UnsupportedError",
    "batch_size_at",
    "compare",
    "coverage",
    "estimate",
    "load",
]
