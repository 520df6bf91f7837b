"""A training run as a page: its state, and its course where reports were kept."""

from collections.abc import Mapping, Sequence

from kronfisher.pages import Figure, Page, Section, Sheet, figure
from kronfisher.pages.figures import bars, lines
from kronfisher.pages.page import Cell

__all__ = ["page"]

Course = Sequence[tuple[int, float]]


def page(
    title: str,
    facts: Mapping[str, str],
    notes: Sequence[str],
    course: Mapping[str, Course],
    seconds: Mapping[str, float],
    layers: Sequence[tuple[str, str]],
) -> Page:
    """The state of training, with curves of how it came about.

    Args:
        title: the heading.
        facts: name → value.
        notes: lines of text.
        course: what is measured → steps and values; fewer than two, or one value alone, are not drawn.
        seconds: phase → how long it took.
        layers: layer or parameter, and what is to be said of it.
    """
    sections = [Section("State", notes)]
    if curves := [drawn for name, known in course.items() if (drawn := _curve(name, known))]:
        sections.append(Section("Course", figures=curves))
    if any(seconds.values()):
        names, spent = zip(*sorted(seconds.items(), key=lambda pair: -pair[1]), strict=True)
        alt = f"A bar for each phase; {names[0]} took longest, {spent[0]:.2f} seconds."
        drawn = figure(bars(names, spent, "seconds"), "Seconds by phase", alt, size=(9.0, 1.2 + 0.3 * len(names)))
        sections.append(Section("Time", figures=[drawn]))
    if layers:
        cells = [(Cell(name, name), Cell(text, text)) for name, text in layers]
        sheet = Sheet("What to know of single layers", ("layer or parameter", "what"), cells, frozenset({0, 1}))
        sections.append(Section("Layers", sheets=[sheet]))
    return Page(title, facts, sections)


def _curve(name: str, known: Course) -> Figure | None:
    if len({value for _, value in known}) < 2:
        return None
    steps, values = zip(*known, strict=True)
    alt = f"From {values[0]:.3g} at step {steps[0]} to {values[-1]:.3g} at step {steps[-1]}."
    wide = min(values) > 0 and max(values) > 20 * min(values)
    drawn = lines([(name, steps, values)], "step", name, log="y" if wide else "")
    return figure(drawn, name[0].upper() + name[1:], alt)
