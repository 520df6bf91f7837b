"""Base of the studies of attribution: what was trained, where results of trainings are kept, what the findings say."""

import time
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from kronfisher.experiments.influence.findings import InfluenceFindings
from kronfisher.experiments.progress import Say, Step
from kronfisher.experiments.studies.experiment import Experiment
from kronfisher.experiments.studies.findings import Record
from kronfisher.influence.files import digest

__all__ = ["InfluenceStudy", "training_again"]


class InfluenceStudy(Experiment):
    """A study that trains a network and judges the scores that fits give its training data.

    Attributes:
        study: its name on the command line.
        judged: names of the settings that the judgement depends on, and the training does not.
        dataset: name of the data set.
        folder: of the trainings' results, from which an interrupted study goes on.
    """

    study: ClassVar[str]
    judged: ClassVar[tuple[str, ...]] = ()
    dataset: str
    folder: Path

    @property
    @abstractmethod
    def trained(self) -> tuple[str, ...]:
        """Names of the settings that trainings depend on."""

    def trainings(self) -> Path:
        """The file of the trainings' results: another one for other settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{digest(repr(self._settings(self.trained)))[:12]}.jsonl"

    def note(self, networks: list[Record], say: Say, what: str, started: float, **measures: float) -> None:
        """A record of a network that was trained since `started`, and a line about it."""
        networks.append(
            {"note": f"{self.dataset}: {what}", **measures, "seconds": time.perf_counter() - started},
        )
        say(networks[-1]["note"])

    def settings(self) -> dict[str, Any]:
        """Of the findings."""
        return {"study": self.study, **self._settings((*self.trained, *self.judged))}

    def findings(self, networks: list[Record], rows: list[Record], finished: bool) -> InfluenceFindings:
        return InfluenceFindings(self.settings(), networks, rows, finished)

    def _settings(self, names: tuple[str, ...]) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in names}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def training_again(step: Step) -> Callable[[str], None]:
    """What reports trainings on parts of the data, whose number is not known beforehand."""
    return lambda text: step(text or "trainings", 0, 1)
