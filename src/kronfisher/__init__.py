"""Kronecker-factored Fisher matrices for PyTorch.

A matrix comes from ``kf.estimate(model, loader, kf.Categorical())`` and is a linear operator over the parameters.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kronfisher.capture.derivatives import Derivatives, derivatives
from kronfisher.distributed import shard
from kronfisher.errors import (
    DataError,
    IndefiniteError,
    MemoryBudgetError,
    NumericalError,
    NumericalWarning,
    RankError,
    SingularError,
    UnsupportedError,
)
from kronfisher.estimation.compare import Comparison, compare
from kronfisher.estimation.coverage import Coverage, coverage
from kronfisher.estimation.error import Distance
from kronfisher.estimation.estimate import estimate
from kronfisher.estimation.kernel import kernel
from kronfisher.fisher import Fisher
from kronfisher.fisher.damping import FactoredTikhonov, Tikhonov
from kronfisher.fisher.files import load
from kronfisher.fisher.merge import merge
from kronfisher.fisher.penalty import Penalty
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
    Gram,
    KFACCorrected,
    KroneckerSum,
    Prototypes,
)
from kronfisher.fits.rearrangement import nearest_kronecker
from kronfisher.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    Poisson,
    Residuals,
    Weighted,
)

if TYPE_CHECKING:
    from kronfisher.influence import Influence, Scores, Share, attribution
    from kronfisher.laplace import Laplace, Prediction, laplace_backend
    from kronfisher.optim import IterateAverage, LayerwiseStep, NaturalGradient, QuadraticModel, Refresh, batch_size_at
    from kronfisher.optim.checkpoint import load_named_state, named_state
    from kronfisher.optim.damping_schedule import Constant, LevenbergMarquardt, Schedule
    from kronfisher.optim.preconditioner import Preconditioner

__version__ = "0.2.0"

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
    "Derivatives",
    "Diagonal",
    "Distance",
    "FactoredTikhonov",
    "Fisher",
    "Fit",
    "Full",
    "Gaussian",
    "Gram",
    "HeteroscedasticGaussian",
    "IndefiniteError",
    "Influence",
    "IterateAverage",
    "KFACCorrected",
    "KroneckerSum",
    "Laplace",
    "LayerwiseStep",
    "LevenbergMarquardt",
    "Likelihood",
    "MemoryBudgetError",
    "NaturalGradient",
    "NumericalError",
    "NumericalWarning",
    "Penalty",
    "Poisson",
    "Preconditioner",
    "Prediction",
    "Prototypes",
    "QuadraticModel",
    "RankError",
    "Refresh",
    "Residuals",
    "Schedule",
    "Scores",
    "Share",
    "SingularError",
    "Tikhonov",
    "UnsupportedError",
    "Weighted",
    "attribution",
    "batch_size_at",
    "compare",
    "coverage",
    "derivatives",
    "estimate",
    "kernel",
    "laplace_backend",
    "load",
    "load_named_state",
    "merge",
    "named_state",
    "nearest_kronecker",
    "shard",
]

# Rooms that an estimate needs nothing of: a third of the time that importing takes. One is loaded when it, or one of
# these names, is first asked for.
_LATER = {
    "kronfisher.influence": ("Influence", "Scores", "Share", "attribution"),
    "kronfisher.laplace": ("Laplace", "Prediction", "laplace_backend"),
    "kronfisher.optim": (
        "IterateAverage",
        "LayerwiseStep",
        "NaturalGradient",
        "QuadraticModel",
        "Refresh",
        "batch_size_at",
    ),
    "kronfisher.optim.checkpoint": ("load_named_state", "named_state"),
    "kronfisher.optim.damping_schedule": ("Constant", "LevenbergMarquardt", "Schedule"),
    "kronfisher.optim.preconditioner": ("Preconditioner",),
}
_ROOM = {name: room for room, names in _LATER.items() for name in names}


def __getattr__(name: str) -> Any:
    if f"{__name__}.{name}" in _LATER:
        return import_module(f"{__name__}.{name}")
    if name not in _ROOM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_ROOM[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
