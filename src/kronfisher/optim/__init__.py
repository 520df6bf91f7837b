"""Training by natural gradient: curvature renewed at intervals, and steps chosen by a quadratic model."""

from kronfisher.optim.averaging import IterateAverage, batch_size_at
from kronfisher.optim.intervals import Refresh
from kronfisher.optim.layerwise import LayerwiseStep
from kronfisher.optim.natural_gradient import NaturalGradient
from kronfisher.optim.quadratic_step import QuadraticModel
from kronfisher.optim.report import TrainingReport

__all__ = [
    "IterateAverage",
    "LayerwiseStep",
    "NaturalGradient",
    "QuadraticModel",
    "Refresh",
    "TrainingReport",
    "batch_size_at",
]
