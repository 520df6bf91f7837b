"""What an accurate Fisher matrix is worth in attribution: ``kronfisher influence --study``."""

from kronfisher.experiments.influence.logistic import LogisticStudy
from kronfisher.experiments.influence.wrong_labels import WrongLabelsStudy

__all__ = ["STUDIES", "LogisticStudy", "WrongLabelsStudy"]

STUDIES: dict[str, type[LogisticStudy] | type[WrongLabelsStudy]] = {
    "logistic": LogisticStudy,
    "wrong-labels": WrongLabelsStudy,
}
"""Name on the command line → the study with its default protocol; ``.quick()`` is the same in seconds."""
