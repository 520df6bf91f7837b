"""Influence functions from any Fisher matrix: which training data are behind a prediction."""

from kronfisher.influence import attribution
from kronfisher.influence.damping import Share
from kronfisher.influence.influence import Influence
from kronfisher.influence.scores import Scores

__all__ = ["Influence", "Scores", "Share", "attribution"]
