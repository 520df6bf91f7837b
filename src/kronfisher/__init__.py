"""Kronecker-factored Fisher matrices for PyTorch.

A matrix comes from ``kf.estimate(model, loader, kf.Categorical())`` and is a linear operator over the parameters.
"""

from kronfisher.coverage import Coverage, coverage
from kronfisher.damping import FactoredTikhonov, Tikhonov
from kronfisher.error import Distance
from kronfisher.errors import (
    DataError,
    IndefiniteError,
    MemoryBudgetError,
    NumericalError,
    NumericalWarning,
    SingularError,
    UnsupportedError,
)
from kronfisher.estimate import estimate
from kronfisher.experiments.compare import Comparison, compare
from kronfisher.fits import EKFAC, KFAC, KFOC, KL, KPSVD, TKFAC, Diagonal, Fit, Full, KFACCorrected, KroneckerSum
from kronfisher.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    Poisson,
    Weighted,
)
from kronfisher.operators import Fisher
from kronfisher.operators.storage import load
from kronfisher.rearrangement import nearest_kronecker

__version__ = "0.1.0"

__all__ = [
    "EKFAC",
    "KFAC",
    "KFOC",
    "KL",
    "KPSVD",
    "TKFAC",
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
    "HeteroscedasticGaussian",
    "IndefiniteError",
    "KFACCorrected",
    "KroneckerSum",
    "Likelihood",
    "MemoryBudgetError",
    "NumericalError",
    "NumericalWarning",
    "Poisson",
    "SingularError",
    "Tikhonov",
    "UnsupportedError",
    "Weighted",
    "compare",
    "coverage",
    "estimate",
    "load",
    "nearest_kronecker",
]
