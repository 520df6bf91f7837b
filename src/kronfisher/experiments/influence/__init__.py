"""What an accurate Fisher matrix is worth in attribution: ``kronfisher influence --study``."""

from kronfisher.experiments.influence.concrete import ConcreteStudy
from kronfisher.experiments.influence.language import LanguageStudy
from kronfisher.experiments.influence.logistic import LogisticStudy
from kronfisher.experiments.influence.perceptron import PerceptronStudy
from kronfisher.experiments.influence.wrong_labels import WrongLabelsStudy

__all__ = ["STUDIES", "ConcreteStudy", "LanguageStudy", "LogisticStudy", "PerceptronStudy", "WrongLabelsStudy"]

Study = LogisticStudy | PerceptronStudy | ConcreteStudy | WrongLabelsStudy | LanguageStudy
STUDIES: dict[str, type[Study]] = {
    "logistic": LogisticStudy,
    "perceptron": PerceptronStudy,
    "concrete": ConcreteStudy,
    "wrong-labels": WrongLabelsStudy,
    "language": LanguageStudy,
}
"""Name on the command line → the study with its default protocol; ``.quick()`` is the same in seconds, ``.full()`` as
large as published ones."""
