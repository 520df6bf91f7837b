"""The papers' studies, each one command: ``kronfisher compare --study kfoc`` and ``--study kpsvd``."""

from kronfisher.experiments.studies.findings import Findings
from kronfisher.experiments.studies.kfoc import KFOCStudy
from kronfisher.experiments.studies.kpsvd import KPSVDStudy

__all__ = ["STUDIES", "Findings", "KFOCStudy", "KPSVDStudy"]

STUDIES: dict[str, type[KFOCStudy] | type[KPSVDStudy]] = {"kfoc": KFOCStudy, "kpsvd": KPSVDStudy}
"""Name on the command line → the study with its published protocol; ``.quick()`` is the same in seconds."""
