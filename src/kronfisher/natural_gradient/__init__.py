"""Training by natural gradient: curvature that is renewed from time to time, and steps chosen by a quadratic model."""

from kronfisher.natural_gradient.averaging import IterateAverage, batch_size_at
from kronfisher.natural_gradient.curvature import Curvature
from kronfisher.natural_gradient.optimizer import NaturalGradient
from kronfisher.natural_gradient.refresh import Refresh
from kronfisher.natural_gradient.report import TrainingReport

__all__ = ["Curvature", "IterateAverage", "NaturalGradient", "Refresh", "TrainingReport", "batch_size_at"]
