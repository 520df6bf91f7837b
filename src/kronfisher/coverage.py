"""What an estimate would cover, before any work."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from kronfisher.accumulate import Choice, choose
from kronfisher.batches import Forward, passes_over, run
from kronfisher.capture import Capture
from kronfisher.isolation import isolated, trainable, unwrapped

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
    """

    parameter: str
    shape: tuple[int, ...]
    numel: int
    operators: tuple[str, ...]
    treatment: str


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
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        facts = f"{100 * self.share:.1f} % of {total:,} trainable numbers covered"
        return "\n".join([*lines, facts + (f"; {self.frozen:,} frozen" if self.frozen else "")])


def coverage(model: nn.Module, batch: Any, *, fit: Choice = "kfac", forward: Forward | None = None) -> Coverage:
    """What `estimate` would cover, from one forward pass; parameters that are not supported are listed, not raised.

    Args:
        model: as for `estimate`.
        batch: one batch (or a loader, whose first batch is taken); targets are not needed.
        fit: as for `estimate`.
        forward: as for `estimate`.

    Raises:
        UnsupportedError: the model cannot be treated at all (BatchNorm in train mode, scripted parts, no trainable parameter).
        DataError: the batch does not fit the model.

    Example:
        >>> import torch, kronfisher as kf
        >>> print(kf.coverage(torch.nn.Linear(3, 2), torch.randn(5, 3)))
        parameter  shape  share   used by  treated by
        ---------  -----  ------  -------  -------------------
        weight     2x3    75.0 %  linear   KFAC(mode='expand')
        bias       2      25.0 %  linear   KFAC(mode='expand')
        100.0 % of 8 trainable numbers covered
    """
    model = unwrapped(model)
    parameters = trainable(model)
    fits = choose(fit, parameters)
    batches, _ = passes_over(batch)
    with isolated(model, 0):
        first = next(iter(batches))
        with Capture(parameters) as capture:
            outputs, _ = run(model, first, forward, next(iter(parameters.values())).device, "the batch")
        proof = capture.prove(outputs)
    operators: dict[str, dict[str, None]] = {name: {} for name in parameters}
    for call in capture.calls:
        for use in call.uses:
            for view in (use.weight, use.bias):
                if view is not None and call.index in proof.alive:
                    operators[view.parameter][call.operator] = None
    rows = []
    for name, parameter in parameters.items():
        if name in proof.unclaimed:
            used, treatment = tuple(sorted(proof.unclaimed[name])), "unsupported"
        elif name in proof.reached:
            used, treatment = tuple(operators[name]), repr(fits[name])
        else:
            used, treatment = (), "unused"
        rows.append(CoverageRow(name, tuple(parameter.shape), parameter.numel(), used, treatment))
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return Coverage(tuple(rows), frozen)
