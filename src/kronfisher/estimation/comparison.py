"""The results of a comparison of fits: one row per fit, as tables for people and as JSON for programs."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kronfisher.errors import DataError
from kronfisher.estimation.documents import document
from kronfisher.estimation.page import page
from kronfisher.estimation.row import Row
from kronfisher.fits import FITS
from kronfisher.tables import Table, duration, number, size

__all__ = ["Comparison", "Row"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """All rows of a comparison; ``str()`` gives two tables for people, `to_json` everything for programs.

    Attributes:
        rows: one per fit, in the order asked for.
        settings: everything that the numbers depend on: labels, samples, seed, number of parameters, …
        finished: whether every fit asked for is there.

    Example:
        >>> import torch, kronfisher as kf
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(20, 3)
        >>> found = kf.compare(model, x, kf.Categorical(), fits=["kfac", "diagonal"], labels="exact")
        >>> [row.fit for row in found.rows], found.finished
        (['kfac', 'diagonal'], True)
        >>> again = kf.Comparison.from_json(found.to_json())
        >>> [table.title for table in again.tables()][1]
        'Relative error of each block'
    """

    rows: tuple[Row, ...]
    settings: Mapping[str, Any]
    finished: bool = True

    def tables(self) -> list[Table]:
        """The overview, and the error of every block if any fit has one."""
        done, s = [row for row in self.rows if row.blocks], self.settings
        where = f" of {s['network']} on {s['data']}" if "network" in s and "data" in s else ""
        draws = f", {s['samples']} per example" if s["labels"] == "sampled" else ""
        count = f"{done[0].count:,} examples, " if done else ""
        title = f"Fisher matrix{where}: {s['parameters']:,} parameters, {count}{s['labels']} labels{draws}"
        overview = Table(title, ("fit", "what it is", "relative error", "trace ratio", "time", "memory"), text=2)
        for row in self.rows:
            numbers = (number(row.error), number(row.trace), duration(row.seconds), size(row.bytes))
            overview.add(row.fit, FITS[row.fit].description if row.fit in FITS else "", *numbers)
        names = list(dict.fromkeys(name for row in done for name in row.blocks))
        blocks = Table("Relative error of each block", ("block", *(row.fit for row in done)))
        for name in names:
            blocks.add(name, *(number(row.blocks.get(name, math.nan)) for row in done))
        return [overview, blocks] if names else [overview]

    def notes(self) -> list[str]:
        """A line for every fit that has no numbers, and one if fits are missing."""
        failed = [f"{row.fit}: {row.failure}" for row in self.rows if row.failure]
        return failed if self.finished else [*failed, "Interrupted: the other fits are missing."]

    def to_json(self) -> str:
        """Settings, versions and rows as JSON; a number that is not finite is null."""
        rows = [
            {
                "fit": r.fit,
                "seconds": r.seconds,
                "bytes": r.bytes,
                "count": r.count,
                "relative_error": r.error,
                "trace_ratio": r.trace,
            }
            | {"blocks": dict(r.blocks), "failure": r.failure or None}
            for r in self.rows
        ]
        return document(self.settings, self.finished, rows=rows)

    @classmethod
    def from_json(cls, text: str) -> "Comparison":
        """What `to_json` wrote, but for the dense blocks, which it leaves out.

        Raises:
            DataError: the text is something else.
        """
        try:
            whole = json.loads(text)
            rows = [
                Row(
                    row["fit"],
                    row["count"],
                    _number(row["seconds"]),
                    row["bytes"],
                    _number(row["relative_error"]),
                    {name: _number(error) for name, error in row["blocks"].items()},
                    _number(row["trace_ratio"]),
                    failure=row["failure"] or "",
                )
                for row in whole["rows"]
            ]
            return cls(tuple(rows), whole["settings"], whole["finished"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"this is no comparison that `to_json` wrote ({type(error).__name__}: {error})") from error

    def save_report(self, path: str | Path, title: str = "") -> Path:
        """Write tables and pictures as one HTML page, which needs no other file and no network.

        Args:
            path: of the page, such as ``"comparison.html"``.
            title: its heading; default: that of the first table.

        Returns:
            The path written.

        Raises:
            ImportError: jinja2 or matplotlib is missing; ``pip install "kronfisher[report]"``.
        """
        return page(self.rows, self.settings, self.notes(), title or self.tables()[0].title).save(path)

    def __str__(self) -> str:
        return "\n\n".join(map(str, [*self.tables(), *self.notes()]))


def _number(value: float | None) -> float:
    return math.nan if value is None else value
