"""A Fisher matrix as a page: what its blocks are, what they cost, how wrong they are, and their spectra."""

from collections.abc import Mapping, Sequence

import torch

from kronfisher.errors import NumericalError, UnsupportedError
from kronfisher.fisher.report import Report
from kronfisher.operators.operator import Operator
from kronfisher.pages import Figure, Page, Section, Sheet, figure
from kronfisher.pages.figures import bars, lines
from kronfisher.pages.page import Cell
from kronfisher.tables import size, together

__all__ = ["page"]

MOST_BARS, MOST_CURVES = 24, 10  # more of them cannot be told apart
POINTS = 200  # of a spectrum that are drawn


def page(blocks: Mapping[str, Operator], report: Report, title: str, *, spectra: bool = True) -> Page:
    """The report of a matrix with pictures of it.

    Args:
        blocks: block name → operator.
        report: of these.
        title: the heading.
        spectra: draw eigenvalues, which takes their computation.
    """
    facts = {
        "parameters": f"{report.parameters:,} in {len(report.rows)} block{'s' if len(report.rows) != 1 else ''}",
        "treatment": report.coverage,
        **report.facts,
        "memory": size(report.bytes),
        "seconds": f"{report.seconds:.2f}",
    }
    if report.error is not None:
        facts["relative error"] = f"{report.error:.3g}"
    notes = together({row.name: row.notes for row in report.rows})
    sections = [
        Section("Blocks", notes, [_sheet(blocks, report)]),
        Section("Sizes and costs", figures=_costs(report)),
    ]
    if errors := _errors(report):
        sections.append(
            Section(
                "Errors", ["‖F̂ − F‖ / ‖F‖ in the Frobenius norm: 0 is exact, 1 no better than zero."], figures=errors
            )
        )
    if spectra:
        sections.append(_spectra(blocks))
    return Page(title, facts, sections)


def _sheet(blocks: Mapping[str, Operator], report: Report) -> Sheet:
    header = ("block", "parameters", "share", "structure", "fit", "error", "memory", "seconds", "mean eigenvalue")
    rows = []
    for row in report.rows:
        mean = float(blocks[row.name].trace()) / row.parameters
        rows.append(
            (
                Cell(row.name, row.name),
                Cell(f"{row.parameters:,}", row.parameters),
                Cell(f"{row.share:.1%}", row.share),
                Cell(row.structure, row.structure),
                Cell(row.method, row.method),
                Cell("–" if row.error is None else f"{row.error:.3g}", row.error),
                Cell(size(row.bytes), row.bytes),
                Cell(f"{row.seconds:.2f}", row.seconds),
                Cell(f"{mean:.3g}", mean),
            )
        )
    error = "–" if report.error is None else f"{report.error:.3g}"
    last = ("total", f"{report.parameters:,}", "", "", "", error, size(report.bytes), f"{report.seconds:.2f}", "")
    return Sheet("One row for each block", header, rows, frozenset({0, 3, 4}), [Cell(text) for text in last])


def _costs(report: Report) -> list[Figure]:
    rows = sorted(report.rows, key=lambda row: row.bytes, reverse=True)[:MOST_BARS]
    left = len(report.rows) - len(rows)
    caption = f"The {MOST_BARS} largest of {len(report.rows)} blocks." if left else ""
    first = rows[0]
    names, tall = [row.name for row in rows], (9.0, 1.2 + 0.28 * len(rows))
    found = [
        figure(
            bars(names, [row.bytes for row in rows], "bytes"),
            "Memory of each block",
            f"A bar for each of {len(rows)} blocks; the largest is {first.name} with {size(first.bytes)}.",
            caption,
            tall,
        )
    ]
    if any(row.seconds >= 0.005 for row in rows):  # what a table with two decimals would show as nothing is noise
        slowest = max(rows, key=lambda row: row.seconds)
        alt = f"A bar for each of {len(rows)} blocks; {slowest.name} took longest, {slowest.seconds:.2f} seconds."
        drawn = bars(names, [row.seconds for row in rows], "seconds")
        found.append(figure(drawn, "Seconds spent on each block alone", alt, caption, tall))
    return found


def _errors(report: Report) -> list[Figure]:
    known = [(row.name, row.error) for row in report.rows if row.error is not None]
    if not known:
        return []
    known = sorted(known, key=lambda pair: pair[1], reverse=True)[:MOST_BARS]
    names, errors = zip(*known, strict=True)
    alt = f"A bar for each of {len(known)} blocks, from {errors[0]:.3g} ({names[0]}) to {errors[-1]:.3g} ({names[-1]})."
    drawn = bars(names, errors, "relative error")
    return [figure(drawn, "Relative error of each block", alt, size=(9.0, 1.2 + 0.28 * len(known)))]


def _spectra(blocks: Mapping[str, Operator]) -> Section:
    curves: list[tuple[str, Sequence[float], Sequence[float]]] = []
    missing: dict[str, str] = {}
    for name, operator in sorted(blocks.items(), key=lambda pair: pair[1].dim, reverse=True)[:MOST_CURVES]:
        try:
            values = operator.eigenvalues()
        except (UnsupportedError, NumericalError) as error:
            missing[name] = str(error)
            continue
        places = torch.logspace(0, 1, POINTS, base=max(len(values), 1), dtype=torch.float64).round().long().unique() - 1
        kept = values[places.to(values.device)].double().cpu()
        positive = kept > 0  # zeros have no place on a logarithmic scale
        if bool(positive.any()):
            curves.append((name, (places[positive] + 1).tolist(), kept[positive].tolist()))
        else:
            missing[name] = "all eigenvalues are zero"
    words = [f"{name}: no spectrum is drawn: {why}" for name, why in missing.items()]
    if len(blocks) > MOST_CURVES:
        words.insert(0, f"The {MOST_CURVES} largest of {len(blocks)} blocks.")
    if not curves:
        return Section("Spectra", words)
    alt = "Eigenvalues in descending order, positive ones only: " + "; ".join(
        f"{name} from {values[0]:.2g} to {values[-1]:.2g}" for name, _, values in curves
    )
    drawn = lines(curves, "number", "eigenvalue", log="xy")
    return Section("Spectra", words, figures=[figure(drawn, "Eigenvalues of each block", alt, size=(10.0, 4.2))])
