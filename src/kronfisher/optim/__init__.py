"""Training by natural gradient: curvature that is renewed from time to time, and steps chosen by a quadratic model."""

from kronfisher.optim.averaging import IterateAverage, batch_size_at
from kronfisher.optim.curvature import Curvature
from kronfisher.optim.intervals import Refresh
from kronfisher.optim.natural_gradient import NaturalGradient
from kronfisher.optim.report import TrainingReport

__all__ = ["Curvature", "IterateAverage", "NaturalGradient", "Refresh", "TrainingReport", "batch_size_at"]
