"""The value of an accurate Fisher matrix in a posterior: ``kronfisher uncertainty uci``, ``ood`` and ``picture``."""

from kronfisher.experiments.uncertainty.ood import OODStudy
from kronfisher.experiments.uncertainty.picture import Picture
from kronfisher.experiments.uncertainty.uci import UCIStudy

__all__ = ["STUDIES", "OODStudy", "Picture", "UCIStudy"]

STUDIES: dict[str, type[UCIStudy] | type[OODStudy] | type[Picture]] = {
    "uci": UCIStudy,
    "ood": OODStudy,
    "picture": Picture,
}
"""Name on the command line → the study with its default protocol; ``.quick()`` is the same in seconds."""
