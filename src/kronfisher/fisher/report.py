"""What a Fisher matrix consists of and what it cost, for people."""

from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING

from kronfisher.fisher.info import BlockInfo

if TYPE_CHECKING:
    from kronfisher.fisher.fisher import Fisher

__all__ = ["Report", "Row", "report"]


@dataclass(frozen=True)
class Row:
    """One block.

    Attributes:
        name: of the block.
        parameters: how many numbers it covers.
        share: of all covered parameters, from 0 to 1.
        structure: of its operator.
        method: the fit that made it.
        error: relative Frobenius error, None where it was not measured.
        bytes: memory of its operator.
        seconds: spent on it alone.
        notes: what else its fit has to say, such as iterations and convergence.
    """

    name: str
    parameters: int
    share: float
    structure: str
    method: str
    error: float | None
    bytes: int
    seconds: float
    notes: str = ""


@dataclass(frozen=True)
class Report:
    """Rows and facts; ``str`` of it is a table with the notes below.

    Attributes:
        rows: one per block.
        facts: what holds for all of them, by name.
        seconds: of the whole estimate; those of the rows are a part of it.
        error: relative Frobenius error of all blocks together, None where it was not measured.
    """

    rows: tuple[Row, ...]
    facts: dict[str, str]
    seconds: float
    error: float | None = None

    @property
    def bytes(self) -> int:
        """The memory of all operators."""
        return sum(row.bytes for row in self.rows)

    @property
    def parameters(self) -> int:
        """How many numbers are covered."""
        return sum(row.parameters for row in self.rows)

    def __str__(self) -> str:
        head = ("block", "parameters", "share", "structure", "error", "memory", "seconds")
        body = [
            (
                *(r.name, f"{r.parameters:,}", f"{r.share:.1%}"),
                ("fallback: " if r.method.startswith("fallback") else "") + r.structure,
                *(_error(r.error), _bytes(r.bytes), f"{r.seconds:.2f}"),
            )
            for r in self.rows
        ]
        total = ("total", f"{self.parameters:,}", "", "", _error(self.error), _bytes(self.bytes), f"{self.seconds:.2f}")
        lines = _table([head, *body, total], left=(0, 3))
        rule = "-" * max(map(len, lines))
        facts = fill(", ".join(f"{key}: {value}" for key, value in self.facts.items()), max(len(rule), 110))
        notes = [fill(f"{r.name}: {r.notes}", max(len(rule), 110)) for r in self.rows if r.notes]
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], facts, *notes])


def report(fisher: "Fisher") -> Report:
    """The report of a Fisher matrix.

    Example:
        >>> import torch
        >>> from kronfisher.fisher.blocks import Block, Window
        >>> from kronfisher.operators import Diagonal
        >>> from kronfisher.fisher import Fisher, Info
        >>> block = Block("w", "linear", Window.of("w", torch.zeros(1, 1, 3)))
        >>> print(Fisher([(block, Diagonal(torch.ones(3)))], {"w": (1, 1, 3)}, Info(count=8, trainable=4)).report())
        block  parameters   share  structure   error  memory  seconds
        -------------------------------------------------------------
        w               3  100.0%  diagonal 3      -    12 B     0.00
        -------------------------------------------------------------
        total           3                          -    12 B     0.00
        data: 8, reduction: mean, labels: sampled (1 per datum), coverage: 75.0% of 4 trainable parameters
    """
    info, total, measured = fisher.info, fisher.dim, vars(fisher).get("_measured")
    rows = []
    for name, operator in fisher.blocks.items():
        block = info.blocks.get(name, BlockInfo())
        share = operator.dim / total
        error = block.error if measured is None else measured.blocks.get(name)
        notes = "; ".join(filter(None, (block.notes, operator.notes)))
        made = (block.method, error, operator.bytes, block.seconds, notes)
        rows.append(Row(name, operator.dim, share, operator.structure, *made))
    facts = {"data": f"{info.count:g}", "reduction": info.reduction, "labels": info.labels}
    if info.labels == "sampled":
        facts["labels"] += f" ({info.samples} per datum)"
    if info.likelihood:
        facts["likelihood"] = info.likelihood
    if info.trainable:
        facts["coverage"] = f"{total / info.trainable:.1%} of {info.trainable:,} trainable parameters"
    if info.changes:
        facts["then"] = ", ".join(info.changes)
    return Report(tuple(rows), facts, info.seconds, None if measured is None else measured.relative)


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.3g}"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _table(rows: list[tuple[str, ...]], left: tuple[int, ...]) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if k in left else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
