"""A comparison of fits as a page."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kronfisher.estimation.row import Row
from kronfisher.fits import FITS
from kronfisher.pages import Figure, Page, Section, Sheet, figure
from kronfisher.pages.figures import bars
from kronfisher.pages.page import Cell
from kronfisher.tables import duration, number, size

__all__ = ["page"]


def page(rows: Sequence[Row], settings: Mapping[str, Any], notes: Sequence[str], title: str) -> Page:
    """Tables and pictures of the rows of a comparison.

    Args:
        rows: one for each fit.
        settings: that the numbers depend on.
        notes: lines of text.
        title: the heading.
    """
    facts = {name.replace("_", " "): str(value) for name, value in settings.items() if value is not None}
    measured = [row for row in rows if math.isfinite(row.error)]
    sections = [Section("Fits", notes, [_overview(rows)], _pictures(measured))]
    if blocks := [row for row in rows if row.blocks]:
        sections.append(Section("Blocks", [], [_blocks(blocks)]))
    return Page(title, facts, sections)


def _overview(fits: Sequence[Row]) -> Sheet:
    header = ("fit", "what it is", "relative error", "trace ratio", "time", "memory")
    rows = []
    for row in fits:
        words = FITS[row.fit].description if row.fit in FITS else row.failure
        rows.append(
            (
                Cell(row.fit, row.fit),
                Cell(words, words),
                Cell(number(row.error), row.error),
                Cell(number(row.trace), row.trace),
                Cell(duration(row.seconds), row.seconds),
                Cell(size(row.bytes), row.bytes or None),
            )
        )
    return Sheet("One row for each fit", header, rows, frozenset({0, 1}))


def _blocks(rows: Sequence[Row]) -> Sheet:
    names = list(dict.fromkeys(name for row in rows for name in row.blocks))
    cells = [
        [Cell(name, name), *(Cell(number(e), e) for row in rows for e in [row.blocks.get(name, math.nan)])]
        for name in names
    ]
    return Sheet("Relative error of each block", ("block", *(row.fit for row in rows)), cells)


def _pictures(rows: Sequence[Row]) -> list[Figure]:
    if not rows:
        return []
    ordered = sorted(rows, key=lambda row: row.error)
    best, worst = ordered[0], ordered[-1]
    names, tall = [row.fit for row in ordered], (9.0, 1.2 + 0.3 * len(ordered))
    alt = f"A bar for each fit, from {best.error:.3g} ({best.fit}) to {worst.error:.3g} ({worst.fit})."
    drawn = bars(names, [row.error for row in ordered], "‖F̂ − F‖ / ‖F‖")
    found = [figure(drawn, "Relative error of each fit", alt, "0 is exact, 1 no better than zero.", tall)]
    if all(math.isfinite(row.seconds) for row in ordered) and len(ordered) > 1:

        def scatter(axes: Any) -> None:
            for row in ordered:
                axes.scatter(row.seconds, row.error, s=36)
                axes.annotate(row.fit, (row.seconds, row.error), textcoords="offset points", xytext=(6, 4), fontsize=9)
            axes.set_xscale("log")
            axes.set_xlabel("seconds of the estimate")
            axes.set_ylabel("relative error")

        quick = min(ordered, key=lambda row: row.seconds)
        alt = f"A point for each fit; {quick.fit} is quickest ({duration(quick.seconds)}), {best.fit} most accurate."
        found.append(figure(scatter, "Time against error", alt, "Lower left is better."))
    return found
