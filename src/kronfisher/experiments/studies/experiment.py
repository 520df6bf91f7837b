"""Base of the studies: files are found beforehand, and an interruption returns what is finished."""

from abc import ABC, abstractmethod
from pathlib import Path

from kronfisher.experiments.progress import Say, Step, ignore
from kronfisher.experiments.studies.findings import Findings, Record

__all__ = ["Experiment"]


class Experiment(ABC):
    """A study that trains networks and measures what fits make of them; a subclass holds its settings.

    Attributes:
        data_dir: folder of the data sets' files; None takes KRONFISHER_DATA.
    """

    data_dir: Path | None

    @abstractmethod
    def check(self) -> None:
        """Find every data set before hours of work.

        Raises:
            FileNotFoundError: a file is missing; the message says which, and where it comes from.
        """

    def run(self, say: Say = ignore, step: Step = ignore) -> Findings:
        """Train every network and measure everything.

        A `KeyboardInterrupt` ends the study early: what is finished is returned, and its `finished` is False.

        Args:
            say: called with a line of text whenever a part is done.
            step: called with what is being done, how many parts of it are done, and of how many.
        """
        networks: list[Record] = []
        rows: list[Record] = []
        finished = True
        try:
            self.measure(networks, rows, say, step)
        except KeyboardInterrupt:
            finished = False
        return self.findings(networks, rows, finished)

    @abstractmethod
    def measure(self, networks: list[Record], rows: list[Record], say: Say, step: Step) -> None:
        """Do the work, and append a record for each trained network and each estimate."""

    @abstractmethod
    def findings(self, networks: list[Record], rows: list[Record], finished: bool) -> Findings:
        """The measurements, ready for tables and pictures."""
