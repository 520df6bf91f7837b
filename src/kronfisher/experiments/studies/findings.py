"""The results of a paper's study: flat records, as tables for people, as JSON for programs, as pictures."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from kronfisher.estimation.documents import document
from kronfisher.tables import Table

__all__ = ["Findings", "Record", "deviation"]

Record = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Findings:
    """Base of the results of studies; a subclass decides on tables and pictures.

    Attributes:
        settings: what the numbers depend on.
        networks: one record a trained network.
        rows: one record an estimate; one that failed has the reason under "failure" instead of numbers.
        finished: whether everything asked for is there.
    """

    settings: Mapping[str, Any]
    networks: Sequence[Record]
    rows: Sequence[Record]
    finished: bool = True

    def tables(self) -> list[Table]:
        """The numbers that matter, for people."""
        raise NotImplementedError

    def draw(self, folder: str | Path) -> list[Path]:
        """Write the figures as PNG files into `folder`, which is made if need be; their paths.

        Raises:
            ImportError: matplotlib is not installed.
        """
        raise NotImplementedError

    def notes(self) -> list[str]:
        """A line for every reason why there is no number, and one if the study was interrupted."""
        failed = dict.fromkeys(
            f"{row['problem']}, {row['fit']}: {row['failure']}" for row in self.rows if "failure" in row
        )
        return [*failed] if self.finished else [*failed, "Interrupted: the rest is missing."]

    def to_json(self) -> str:
        """Everything, as JSON."""
        return document(self.settings, self.finished, networks=list(self.networks), rows=list(self.rows))

    def select(self, **where: Any) -> list[Record]:
        """The records that have numbers and these values.

        Example:
            >>> Findings({}, (), ({"fit": "a", "error": 0.5}, {"fit": "b", "failure": "too large"})).select(fit="b")
            []
        """
        return [
            row for row in self.rows if "failure" not in row and all(row.get(key) == it for key, it in where.items())
        ]

    def distinct(self, key: str, **where: Any) -> list[Any]:
        """The values of `key` among those records, in order of appearance."""
        return list(dict.fromkeys(row[key] for row in self.select(**where)))

    def __str__(self) -> str:
        return "\n\n".join(map(str, [*self.tables(), *self.notes()]))


def deviation(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard deviation (of the sample; 0 for one value).

    Example:
        >>> deviation([1.0, 3.0])
        (2.0, 1.4142135623730951)
    """
    values = list(values)
    return mean(values), stdev(values) if len(values) > 1 else 0.0
