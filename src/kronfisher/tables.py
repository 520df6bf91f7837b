"""Numbers and tables that people read."""

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class Table:
    """Rows of text under a title; ``str()`` aligns columns of text left and columns of numbers right.

    Attributes:
        title: the first line; empty: none.
        header: what the columns are called.
        text: how many columns at the front hold text.
        also_text: places of further columns that do.
        total: the last row sums up the others, and stands below a rule.
        rows: cells.

    Example:
        >>> table = Table("Two fits", ("fit", "error"))
        >>> table.add("kfac", "0.41"), table.add("full", "0")
        (None, None)
        >>> print(table)
        Two fits
        fit   error
        ───────────
        kfac   0.41
        full      0
    """

    title: str
    header: tuple[str, ...]
    text: int = 1
    also_text: tuple[int, ...] = ()
    total: bool = False
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """Append one row, as many cells as the header has."""
        if len(cells) != len(self.header):
            raise ValueError(f"{len(cells)} cells for {len(self.header)} columns")
        self.rows.append(cells)

    def __str__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[k]) for line in lines) for k in range(len(self.header))]

        def aligned(line: tuple[str, ...]) -> str:
            cells = (
                cell.ljust(width) if k < self.text or k in self.also_text else cell.rjust(width)
                for k, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            return "  ".join(cells).rstrip()

        rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
        lines = [aligned(self.header), rule, *map(aligned, self.rows)]
        if self.total:
            lines.insert(-1, rule)
        return "\n".join([self.title, *lines] if self.title else lines)


def number(value: float, decimals: int = 3) -> str:
    """Three decimals: what is below is rounding noise in an error of float32 matrices.

    Example:
        >>> number(0.41234), number(12.3), number(3e-6), number(0.41234, 2), number(float("nan"))
        ('0.412', '12.300', '0.000', '0.41', '–')
    """
    return "–" if math.isnan(value) else f"{value:.{decimals}f}"


def significant(value: float, digits: int = 4) -> str:
    """So many significant digits, for values of any size.

    Example:
        >>> significant(0.00123456), significant(1234.5678), significant(float("nan"))
        ('0.001235', '1235', '–')
    """
    return "–" if math.isnan(value) else f"{value:.{digits}g}"


def count(value: float) -> str:
    """A whole number.

    Example:
        >>> count(60_000), count(float("nan"))
        ('60,000', '–')
    """
    return "–" if math.isnan(value) else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """A wall time with its unit.

    Example:
        >>> duration(0.0005), duration(0.0123), duration(3.21), duration(75.0)
        ('0.5 ms', '12 ms', '3.2 s', '75 s')
    """
    if math.isnan(seconds):
        return "–"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms" if seconds < 0.00095 else f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds:.0f} s"


def size(number_of_bytes: int) -> str:
    """A number of bytes in decimal units.

    Example:
        >>> size(0), size(512), size(5_400), size(4_000_000_000)
        ('–', '512 B', '5.4 kB', '4.0 GB')
    """
    if not number_of_bytes:
        return "–"
    value, units = float(number_of_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def together(notes: Mapping[str, str], most: int = 3) -> list[str]:
    """One line for everything that has the same note; a note may begin with a name that it is about.

    Example:
        >>> together({"a": "a: used by exp", "b": "b: used by exp", "c": "used by cos", "d": ""})
        ['a, b: used by exp', 'c: used by cos']
        >>> together({name: "unused" for name in "abcde"})
        ['a, b, c and 2 more: unused']
    """
    names: dict[str, list[str]] = {}
    for name, note in notes.items():
        if note:
            names.setdefault(_without_name(note, notes), []).append(name)
    return [f"{some(several, most)}{note}" for note, several in names.items()]


def _without_name(note: str, names: Container[str]) -> str:
    """What a note says after the name that it begins with, if any: ``" (why): what"`` or ``": what"``."""
    for mark in (" (", ":"):
        name, found, rest = note.partition(mark)
        if found and name in names:
            return mark + rest
    return f": {note}"


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are.

    Example:
        >>> some("abcde"), some("ab")
        ('a, b, c and 2 more', 'a, b')
    """
    left = len(names) - most
    return ", ".join(names) if left <= 0 else f"{', '.join(names[:most])} and {left} more"


def shares(parts: Iterable[tuple[str, int]]) -> str:
    """Parts of a whole in percent, the same words once, in the order of their first mention.

    Example:
        >>> shares([("by layers", 90), ("diagonal", 7), ("by layers", 3)])
        '93.0 % by layers, 7.0 % diagonal'
    """
    sums: dict[str, int] = {}
    for words, number in parts:
        sums[words] = sums.get(words, 0) + number
    total = sum(sums.values())
    return ", ".join(f"{100 * number / total:.1f} % {words}" for words, number in sums.items() if number)
