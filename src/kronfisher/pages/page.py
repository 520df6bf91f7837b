"""The parts of a report: facts, tables and pictures, in sections."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from kronfisher.pages.figures import Figure
from kronfisher.pages.template import render

__all__ = ["Cell", "Page", "Section", "Sheet"]


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what is shown.
        value: what the column is sorted by; None: unknown, which comes last.
    """

    text: str
    value: float | str | None = None

    @property
    def key(self) -> str:
        """The value as text."""
        if self.value is None or (isinstance(self.value, float) and math.isnan(self.value)):
            return ""
        return self.value if isinstance(self.value, str) else repr(float(self.value))


@dataclass(frozen=True)
class Sheet:
    """A table that the reader can sort by any column.

    Attributes:
        title: says what is in it, also to those who do not see it.
        header: what the columns are called.
        rows: cells.
        text: places of columns that hold text.
        total: a last row that stays where it is.
    """

    title: str
    header: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]
    text: frozenset[int] = frozenset({0})
    total: Sequence[Cell] = ()

    def __post_init__(self) -> None:
        for row in [*self.rows, *([self.total] if self.total else [])]:
            if len(row) != len(self.header):
                raise ValueError(f"{len(row)} cells for {len(self.header)} columns")


@dataclass(frozen=True)
class Section:
    """A heading with lines of text, tables and pictures below it, in this order."""

    title: str
    lines: Sequence[str] = ()
    sheets: Sequence[Sheet] = ()
    figures: Sequence[Figure] = ()


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: the heading.
        facts: name → value, below it.
        sections: what follows.

    Example:
        >>> sheet = Sheet("Fits", ("fit", "error"), [[Cell("kfac", "kfac"), Cell("0.41", 0.41)]])
        >>> text = Page("A comparison", {"examples": "100"}, [Section("Fits", sheets=[sheet])]).html()
        >>> '<td class="" data-key="0.41">0.41</td>' in text, "http" in text.replace("http-equiv", "")
        (True, False)
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    sections: Sequence[Section] = ()

    def html(self) -> str:
        """The text of the page, which needs no other file and no network.

        Raises:
            ImportError: jinja2 is missing; ``pip install "kronfisher[report]"``.
        """
        maker = f"kronfisher {version('kronfisher')}"
        return render("report.html", title=self.title, facts=self.facts, sections=self.sections, maker=maker)

    def save(self, path: str | Path) -> Path:
        """Write the page, into a folder that is made if need be; the path written."""
        path = Path(path)
        text = self.html()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path
