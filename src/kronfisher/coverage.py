"""What an estimate would cover, before any work."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from kronfisher.batches import Forward, passes_over
from kronfisher.claims import detached, misused, unclaimed
from kronfisher.errors import DataError
from kronfisher.fits import Choice
from kronfisher.isolation import isolated
from kronfisher.likelihoods import Categorical
from kronfisher.models import unwrapped
from kronfisher.passes import Recipe

__all__ = ["Coverage", "CoverageRow", "coverage"]


@dataclass(frozen=True)
class CoverageRow:
    """One trainable parameter: how the model uses it and how it would be treated.

    Attributes:
        parameter: its name.
        shape: its shape.
        numel: how many numbers it holds.
        operators: the operators of torch that use it.
        treatment: the fit, ``"unused"`` or ``"unsupported"``.
        reason: why it is not supported, if it is not.
    """

    parameter: str
    shape: tuple[int, ...]
    numel: int
    operators: tuple[str, ...]
    treatment: str
    reason: str = ""


@dataclass(frozen=True)
class Coverage:
    """Which parameters an estimate covers; printing it gives a table.

    Attributes:
        rows: one per trainable parameter, in the model's order.
        frozen: how many numbers do not require a gradient and are left out.
    """

    rows: tuple[CoverageRow, ...]
    frozen: int

    @property
    def share(self) -> float:
        """Share of the trainable numbers that are covered."""
        total = sum(row.numel for row in self.rows)
        return sum(row.numel for row in self.rows if row.treatment != "unsupported") / total

    @property
    def complete(self) -> bool:
        """Whether nothing is unsupported."""
        return all(row.treatment != "unsupported" for row in self.rows)

    def __str__(self) -> str:
        total = sum(row.numel for row in self.rows)
        cells = [("parameter", "shape", "share", "used by", "treated by")]
        for row in self.rows:
            shape = "x".join(map(str, row.shape)) or "scalar"
            share = f"{100 * row.numel / total:.1f} %"
            cells.append((row.parameter, shape, share, ", ".join(row.operators) or "-", row.treatment))
        widths = [max(len(line[k]) for line in cells) for k in range(5)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        facts = f"{100 * self.share:.1f} % of {total:,} trainable numbers covered"
        lines.append(facts + (f"; {self.frozen:,} frozen" if self.frozen else ""))
        return "\n".join([*lines, *dict.fromkeys(row.reason for row in self.rows if row.reason)])


def coverage(model: nn.Module, batch: Any, *, fit: Choice = "kfac", forward: Forward | None = None) -> Coverage:
    """What `estimate` would cover: parameters that are not supported are listed with the reason, not raised.

    It takes one forward pass, and a few backward where it has to be found out which datum owns a row.

    Args:
        model: as for `estimate`.
        batch: one batch (or a loader, whose first batch is taken); targets are not needed.
        fit: as for `estimate`.
        forward: as for `estimate`.

    Raises:
        UnsupportedError: the model cannot be treated at all (BatchNorm in train mode, scripted parts, no trainable
            parameter on the way to the outputs).
        DataError: there is no batch, or it does not fit the model.

    Example:
        >>> import torch, kronfisher as kf
        >>> print(kf.coverage(torch.nn.Linear(3, 2), torch.randn(5, 3)))
        parameter  shape  share   used by  treated by
        ---------  -----  ------  -------  -------------------
        weight     2x3    75.0 %  linear   KFAC(mode='expand')
        bias       2      25.0 %  linear   KFAC(mode='expand')
        100.0 % of 8 trainable numbers covered
    """
    run = Recipe(unwrapped(model), Categorical(), forward=forward).accumulator(fit)  # any: no label is drawn
    batches, _ = passes_over(batch)
    with isolated(run.model, 0):
        first = next(iter(batches), None)
        if first is None:
            raise DataError("The data hold no batch, so there is nothing to run the model on.")
        capture, outputs, _ = run.observe(first, "the batch")
        proof = capture.prove(outputs)
        if not proof.alive and not proof.unclaimed:
            raise detached("the batch")
        reasons = {name: unclaimed(name, operators) for name, operators in proof.unclaimed.items()}
        parts = run.parts(capture, proof)
        blocks = {part.block.key: part.block for several in parts.values() for part in several}
        reasons |= misused(blocks.values())
        fine = {
            index: [part for part in several if not reasons.keys() & set(part.block.parameters)]
            for index, several in parts.items()
        }
        planned = run.planned(
            {part.block.key: part.block for several in fine.values() for part in several}.values(), ""
        )
        owned = {block.key for entry in planned if entry.plan.owned for block in entry.blocks}
        _, problems = run.find_owners(capture, outputs, proof, fine, owned, masked=False)
    for block in blocks.values():
        reasons.update({name: problems[block.name] for name in block.parameters if block.name in problems})
    operators: dict[str, set[str]] = {name: set() for name in run.parameters}
    for block in blocks.values():
        for name in block.parameters:
            operators[name].add(block.operator)
    rows = []
    for name, parameter in run.parameters.items():
        treatment = repr(run.fits[name]) if name in proof.reached else "unused"
        used = operators[name] | proof.unclaimed.get(name, set())
        if name in reasons:
            treatment = "unsupported"
        shape = tuple(parameter.shape)
        rows.append(CoverageRow(name, shape, parameter.numel(), tuple(sorted(used)), treatment, reasons.get(name, "")))
    frozen = sum(p.numel() for p in run.model.parameters() if not p.requires_grad)
    return Coverage(tuple(rows), frozen)
