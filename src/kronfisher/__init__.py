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
from kronfisher.fits import (
    EKFAC,
    KFAC,
    KFOC,
    KL,
    KPSVD,
    TKFAC,
    Auto,
    BlockTridiagonal,
    Diagonal,
    Fit,
    Full,
    KFACCorrected,
    KroneckerSum,
    Prototypes,
)
from kronfisher.laplace import Laplace, Prediction, laplace_backend
from kronfisher.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    Poisson,
    Weighted,
)
from kronfisher.natural_gradient import IterateAverage, NaturalGradient, Refresh, batch_size_at
from kronfisher.operators import Fisher
from kronfisher.operators.storage import load
from kronfisher.preconditioner import Preconditioner
from kronfisher.rearrangement import nearest_kronecker
from kronfisher.trust import Constant, LevenbergMarquardt, Schedule

__version__ = "0.1.0"

__all__ = [
    "EKFAC",
    "KFAC",
    "KFOC",
    "KL",
    "KPSVD",
    "TKFAC",
    "Auto",
    "Bernoulli",
    "BlockTridiagonal",
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
    "HeteroscedasticGaussian",
    "IndefiniteError",
    "IterateAverage",
    "KFACCorrected",
    "KroneckerSum",
    "Laplace",
    "LevenbergMarquardt",
    "Likelihood",
    "MemoryBudgetError",
    "NaturalGradient",
    "NumericalError",
    "NumericalWarning",
    "Poisson",
    "Preconditioner",
    "Prediction",
    "Prototypes",
    "Refresh",
    "Schedule",
    "SingularError",
    "Tikhonov",
    "UnsupportedError",
    "Weighted",
    "batch_size_at",
    "compare",
    "coverage",
    "estimate",
    "laplace_backend",
    "load",
    "nearest_kronecker",
]
