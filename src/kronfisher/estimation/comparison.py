"""The results of a comparison of fits: one row per fit, as tables for people and as JSON for programs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kronfisher.estimation.documents import document
from kronfisher.fits import FITS
from kronfisher.tables import Table, duration, number, size

__all__ = ["Comparison", "Row"]


@dataclass(frozen=True, eq=False)
class Row:
    """The results of one fit.

    Attributes:
        fit: its name, or its settings where it was given as an object.
        count: N, the number of examples.
        seconds: wall time of the estimate alone, warmed up; the shortest of three if it is short.
        bytes: of the operator.
        error: ‖F̂ − F‖ / ‖F‖ in the Frobenius norm over all blocks, F the exact blocks of the same data and labels.
        blocks: the same for every block, by name.
        trace: tr F̂ / tr F.
        shown: the name and the dense matrix ``[D, D]`` of one small block, the same for all
            fits; None if there is none.
        failure: why there is no result, or no error; missing numbers are NaN or 0.
    """

    fit: str
    count: int = 0
    seconds: float = math.nan
    bytes: int = 0
    error: float = math.nan
    blocks: Mapping[str, float] = field(default_factory=dict)
    trace: float = math.nan
    shown: tuple[str, Tensor] | None = None
    failure: str = ""

    def __str__(self) -> str:
        numbers = f"relative error {number(self.error)}, {duration(self.seconds)}, {size(self.bytes)}"
        return f"{self.fit}: {self.failure or numbers}"


@dataclass(frozen=True, eq=False)
class Comparison:
    """All rows of a comparison; ``str()`` gives two tables for people, `to_json` everything for programs.

    Attributes:
        rows: one per fit, in the order asked for.
        settings: everything that the numbers depend on: labels, samples, seed, number of parameters, …
        finished: whether every fit asked for is there.
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

    def __str__(self) -> str:
        return "\n\n".join(map(str, [*self.tables(), *self.notes()]))
