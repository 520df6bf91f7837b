"""A Fisher matrix in a table: structures, errors, memory and time of its blocks."""

from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import fill

from kronfisher.fisher.info import BlockInfo, Info
from kronfisher.operators.operator import Operator
from kronfisher.tables import Table, shares, size, together

__all__ = ["BY_LAYERS", "Report", "Row", "report", "treatment"]


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

    @property
    def treatment(self) -> str:
        """In a word or two, for the sum over blocks."""
        return treatment(self.method, diagonal=self.structure.startswith("diagonal "))


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
        """The number of parameters (numbers) covered."""
        return sum(row.parameters for row in self.rows)

    @property
    def coverage(self) -> str:
        """How much is treated by layers, and how much has only a diagonal or per-example gradients."""
        by_layers = sorted(self.rows, key=lambda row: row.treatment != BY_LAYERS)
        return shares((row.treatment, row.parameters) for row in by_layers)

    def __str__(self) -> str:
        header = ("block", "parameters", "share", "structure", "error", "memory", "seconds")
        table = Table("", header, also_text=(3,), total=True)
        for r in self.rows:
            structure = ("fallback: " if r.method.startswith("fallback") else "") + r.structure
            cells = (r.name, f"{r.parameters:,}", f"{r.share:.1%}", structure)
            table.add(*cells, _error(r.error), size(r.bytes), f"{r.seconds:.2f}")
        cells = ("total", f"{self.parameters:,}", "", "")
        table.add(*cells, _error(self.error), size(self.bytes), f"{self.seconds:.2f}")
        lines = str(table)
        width = max(110, *map(len, lines.splitlines()))
        facts = fill(", ".join(f"{key}: {value}" for key, value in self.facts.items()), width)
        notes = [fill(line, width) for line in together({r.name: r.notes for r in self.rows})]
        return "\n".join([self.coverage, lines, facts, *notes])


def report(
    blocks: Mapping[str, Operator], info: Info, errors: Mapping[str, float] | None = None, error: float | None = None
) -> Report:
    """The report of a Fisher matrix.

    Args:
        blocks: block name to operator.
        info: how the matrix was made.
        errors: block name to error, as measured since; None: as the fits know it.
        error: of all blocks together, if it was measured.

    Example:
        >>> import torch
        >>> from kronfisher.fisher.blocks import Block, Window
        >>> from kronfisher.operators import Diagonal
        >>> from kronfisher.fisher import Fisher, Info
        >>> block = Block("w", "linear", Window.of("w", torch.zeros(1, 1, 3)))
        >>> print(Fisher([(block, Diagonal(torch.ones(3)))], {"w": (1, 1, 3)}, Info(count=8, trainable=4)).report())
        100.0 % diagonal
        block  parameters   share  structure   error  memory  seconds
        ─────────────────────────────────────────────────────────────
        w               3  100.0%  diagonal 3      –    12 B     0.00
        ─────────────────────────────────────────────────────────────
        total           3                          –    12 B     0.00
        examples: 8, reduction: mean, labels: sampled (1 per example), coverage: 75.0% of 4 trainable parameters
    """
    rows, total = [], sum(operator.dim for operator in blocks.values())
    for name, operator in blocks.items():
        block = info.blocks.get(name, BlockInfo())
        share = operator.dim / total
        own = block.error if errors is None else errors.get(name)
        notes = "; ".join(filter(None, (block.notes, operator.notes)))
        made = (block.method, own, operator.bytes, block.seconds, notes)
        rows.append(Row(name, operator.dim, share, operator.structure, *made))
    facts = {"examples": f"{info.count:g}", "reduction": info.reduction, "labels": info.labels}
    if info.labels == "sampled":
        facts["labels"] += f" ({info.samples} per example)"
    if info.likelihood:
        facts["likelihood"] = info.likelihood
    if info.targets:
        facts["targets"] = info.targets
    if info.trainable:
        facts["coverage"] = f"{total / info.trainable:.1%} of {info.trainable:,} trainable parameters"
    if info.ranks > 1:
        sent = f"{size(info.sent)} in {info.collectives} collectives, {size(info.planned)} of it sums, as planned"
        facts["processes"] = f"{info.ranks}, which sent {sent}"
    if info.changes:
        facts["then"] = ", ".join(info.changes)
    return Report(tuple(rows), facts, info.seconds, error)


BY_LAYERS = "by layers"


def treatment(method: str, *, diagonal: bool) -> str:
    """What the first line of a report calls the treatment of a block or parameter."""
    if method.startswith("unused"):
        return "unused"
    if diagonal:
        return "diagonal"
    return "from per-example gradients" if method.startswith("fallback") else BY_LAYERS


def _error(error: float | None) -> str:
    return "–" if error is None else f"{error:.3g}"
